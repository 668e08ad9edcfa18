"""Mismatch by lag and by sequence: by hand, by enumeration, and what its standard error must satisfy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.mismatch import (
    effective_share,
    lag_sums,
    log_ratios,
    mean_and_cluster_error,
    mismatch_metrics,
    sequence_sums,
    sequence_totals,
)

LOG_2 = math.log(2)


def metrics_of(ratios: Tensor, trusted: Tensor, lags: Tensor) -> dict[str, float]:
    """All on one rank."""
    totals, counts = sequence_totals(ratios, trusted)
    log_weights = totals[counts > 0]
    sums = lag_sums(ratios, trusted, lags, lag_count=int(lags.max()) + 1)
    sequences = sequence_sums(log_weights, float(log_weights.max()))
    return mismatch_metrics(sums, sequences, float(ratios[trusted].abs().max()))


def test_two_sequences_by_hand() -> None:
    """Weights by lag: sequence 0 has 4 (lag 0) and 1 (lag 1), sequence 1 has ½ and ½ (lag 0).

    With k(w) = w − 1 − log w: k(4) = 3 − 2·log 2, k(1) = 0, k(½) = −½ + log 2. Of lag 0, then,
    y = (3 − 2·log 2, −1 + 2·log 2) and n = (1, 2): R = 2/3, and the residuals y − R·n are
    ±(7/3 − 2·log 2), so SE² = 2/1 · 2·(7/3 − 2·log 2)² / 3².
    """
    weights = torch.tensor([[4.0, 1.0, 9.0], [0.5, 0.5, 9.0]], dtype=torch.float64)
    trusted = torch.tensor([[True, True, False], [True, True, False]])
    metrics = metrics_of(weights.log(), trusted, torch.tensor([[0, 1, 1], [0, 0, 0]]))
    assert metrics == pytest.approx(
        {
            "mismatch/tokens": 4,
            "mismatch/ess": 6**2 / (4 * 17.5),
            "mismatch/sequence_ess": (4 + 1 / 4) ** 2 / (2 * (16 + 1 / 16)),
            "mismatch/kl": 2 / 4,
            "mismatch/m2": (4 + 0 + 1 + 1) * LOG_2**2 / 4,
            "mismatch/weight_mean": 6 / 4,
            "mismatch/abs_logprob_difference": LOG_2,
            "mismatch/log_ratio_max": 2 * LOG_2,
            "mismatch/tokens_by_lag/0": 3,
            "mismatch/kl_by_lag/0": 2 / 3,
            "mismatch/kl_se_by_lag/0": 2 * (7 / 3 - 2 * LOG_2) / 3,
            "mismatch/ess_by_lag/0": 5**2 / (3 * 16.5),
            # One sequence only: a mean, but nothing to say how uncertain it is.
            "mismatch/tokens_by_lag/1": 1,
            "mismatch/kl_by_lag/1": 0,
            "mismatch/ess_by_lag/1": 1,
        }
    )


def test_a_lag_that_no_token_has_has_no_entry() -> None:
    ratios = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64)
    metrics = metrics_of(ratios, torch.ones(2, 2, dtype=torch.bool), torch.tensor([[0, 3], [0, 3]]))
    assert {name.rsplit("/", 1)[1] for name in metrics if "_by_lag/" in name} == {"0", "3"}


def test_expectation_over_the_sampler_by_enumeration() -> None:
    """With tokens in proportion to μ: mean w = 1, ESS/B = 1/(1 + χ²(π‖μ)) and the estimate is KL(μ‖π)."""
    mu = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    pi = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    drawn = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)  # ten tokens, exactly in proportion
    ratios = log_ratios(pi.log()[drawn], mu.log()[drawn])[:, None]
    metrics = metrics_of(ratios, torch.ones(10, 1, dtype=torch.bool), torch.zeros(10, 1, dtype=torch.long))
    chi_squared = float((pi**2 / mu).sum() - 1)
    assert metrics["mismatch/weight_mean"] == pytest.approx(1.0)
    assert metrics["mismatch/ess"] == pytest.approx(1 / (1 + chi_squared))
    assert metrics["mismatch/sequence_ess"] == pytest.approx(1 / (1 + chi_squared))  # of length 1
    assert metrics["mismatch/kl"] == pytest.approx(float((mu * (mu / pi).log()).sum()))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), sequences=st.integers(2, 8), length=st.integers(1, 6))
def test_of_equal_lengths_the_error_is_that_of_the_mean_of_sequence_means(
    seed: int, sequences: int, length: int
) -> None:
    """n_b = n for all: y_b − R·n_b = n·(mean_b − R), so SE = std(mean_b, m − 1)/√m."""
    generator = torch.Generator().manual_seed(seed)
    ratios = torch.randn(sequences, length, generator=generator, dtype=torch.float64)
    every = torch.ones(sequences, length, dtype=torch.bool)
    mean, error = mean_and_cluster_error(lag_sums(ratios, every, every.long() * 0, lag_count=1)[0])
    means = (ratios.exp() - 1 - ratios).mean(dim=1)
    assert mean == pytest.approx(float(means.mean()))
    assert error == pytest.approx(float(means.std()) / sequences**0.5, rel=1e-6)


def test_tokens_that_repeat_each_other_add_no_certainty() -> None:
    """Ten copies of every token inside its sequence leave mean and error as they were."""
    ratios = torch.tensor([[0.5], [-0.2], [0.1]], dtype=torch.float64)
    results = []
    for copies in (1, 10):
        shape = (3, copies)
        sums = lag_sums(
            ratios.expand(shape),
            torch.ones(shape, dtype=torch.bool),
            torch.zeros(shape, dtype=torch.long),
            lag_count=1,
        )
        results.append(mean_and_cluster_error(sums[0]))
    assert results[1] == pytest.approx(results[0])


def test_the_error_covers_the_truth() -> None:
    """400 batches of 60 sequences of 1 to 8 tokens, of unlike means a sequence: |R − truth| < 1.96·SE in
    nine of ten at least; an error that took tokens for independent covers far fewer.

    ℓ = a_b + noise, a_b ~ N(0, 0.3²), noise ~ N(0, 0.1²): k has the mean e^{σ²/2} − 1 with σ² = 0.1,
    whatever the lengths.
    """
    generator = torch.Generator().manual_seed(0)
    truth = math.exp(0.05) - 1
    covered = naive = 0
    for _ in range(400):
        lengths = torch.randint(1, 9, (60, 1), generator=generator)
        mask = torch.arange(8)[None] < lengths
        ratios = 0.3 * torch.randn(60, 1, generator=generator, dtype=torch.float64)
        ratios = ratios + 0.1 * torch.randn(60, 8, generator=generator, dtype=torch.float64)
        mean, error = mean_and_cluster_error(lag_sums(ratios, mask, mask.long() * 0, lag_count=1)[0])
        assert error is not None
        covered += abs(mean - truth) < 1.96 * error
        values = (ratios.exp() - 1 - ratios)[mask]
        naive += abs(mean - truth) < 1.96 * float(values.std()) / len(values) ** 0.5
    assert covered >= 0.9 * 400
    assert naive < 0.75 * 400


def test_parts_add_up_with_the_shift_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    ratios = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    trusted = torch.rand(5, 4, generator=generator) < 0.7
    lags = torch.randint(0, 3, (5, 4), generator=generator)
    cuts = (slice(0, 2), slice(2, 2), slice(2, 5))  # a rank may have nothing
    whole = lag_sums(ratios, trusted, lags, lag_count=3)
    parts = [lag_sums(ratios[cut], trusted[cut], lags[cut], lag_count=3) for cut in cuts]
    torch.testing.assert_close(whole, sum(parts))
    log_weights, _ = sequence_totals(ratios, trusted)
    largest = float(log_weights.max())
    torch.testing.assert_close(
        sequence_sums(log_weights, largest), sum(sequence_sums(log_weights[cut], largest) for cut in cuts)
    )


def test_sequence_weights_of_any_size_stay_finite() -> None:
    """e^2000 and e^2000/3 are no floats, but their effective share is (1 + ⅓)²/(2·(1 + 1/9)) = 0.8."""
    log_weights = torch.tensor([2000.0, 2000.0 - math.log(3)], dtype=torch.float64)
    assert effective_share(*sequence_sums(log_weights, 2000.0).tolist()) == pytest.approx(0.8)
    alone = torch.tensor([0.0, -5000.0, -5000.0], dtype=torch.float64)
    assert effective_share(*sequence_sums(alone, 0.0).tolist()) == pytest.approx(1 / 3)


def test_a_ratio_beyond_any_float_stays_finite_and_is_shown_as_it_was() -> None:
    ratios = log_ratios(torch.tensor([[0.0, -900.0]]), torch.tensor([[-900.0, 0.0]]))
    metrics = metrics_of(ratios, torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long))
    assert all(map(math.isfinite, metrics.values()))
    assert metrics["mismatch/log_ratio_max"] == 900.0


def test_where_no_token_can_be_measured_nothing_is_claimed() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    sums = lag_sums(torch.zeros(2, 3, dtype=torch.float64), nothing, nothing.long(), lag_count=1)
    sequences = sequence_sums(torch.zeros(0, dtype=torch.float64), -math.inf)
    assert mismatch_metrics(sums, sequences, 0.0) == {"mismatch/tokens": 0.0}

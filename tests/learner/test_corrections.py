"""Importance weights, effective sample size and mismatch KL by hand and by enumeration."""

import math

import pytest
import torch

from learner.corrections import mismatch_metrics, mismatch_sums, truncated_weights


def test_weights_are_cut_off_and_carry_no_gradient() -> None:
    # e^ℓ = 4, 1, ½ with C = 2 gives 2, 1, ½.
    proximal = torch.tensor([4.0, 1.0, 0.5]).log().requires_grad_()
    weights, raw = truncated_weights(proximal, torch.zeros(3), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, 1.0, 0.5]))
    torch.testing.assert_close(raw, torch.tensor([4.0, 1.0, 0.5]))
    assert not weights.requires_grad
    ones, _ = truncated_weights(proximal, torch.zeros(3), cap=None)
    assert ones.tolist() == [1.0, 1.0, 1.0]


def test_effective_sample_size_is_of_raw_weights() -> None:
    # w = 4, 1, ½, ½: Σw = 6, Σw² = 17.5, ESS/B = 36/(4·17.5). One of four is above C = 2.
    # KL(μ‖π): mean of w − 1 − log w = (3 − log 4 + 0 + 2·(−½ + log 2))/4 = (2)/4.
    # |ℓ|: (log 4 + 0 + 2 log 2)/4 = log 2.
    proximal = torch.tensor([4.0, 1.0, 0.5, 0.5]).log()
    _, raw = truncated_weights(proximal, torch.zeros(4), cap=2.0)
    metrics = mismatch_metrics(mismatch_sums(proximal, torch.zeros(4), raw, cap=2.0))
    assert metrics["mismatch/ess"] == pytest.approx(36 / 70)
    assert metrics["mismatch/cut_fraction"] == pytest.approx(0.25)
    assert metrics["mismatch/kl"] == pytest.approx(0.5)
    assert metrics["mismatch/abs_logprob_difference"] == pytest.approx(math.log(2))


def test_expectation_over_the_sampler_by_enumeration() -> None:
    """With tokens in proportion to μ: mean w = 1, ESS/B = 1/(1 + χ²(π‖μ)) and the estimate is KL(μ‖π)."""
    mu = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    pi = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    drawn = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)  # ten tokens, exactly in proportion
    proximal, sampler = pi.log()[drawn], mu.log()[drawn]
    _, raw = truncated_weights(proximal, sampler, cap=2.0)
    assert raw.mean().item() == pytest.approx(1.0)
    metrics = mismatch_metrics(mismatch_sums(proximal, sampler, raw, cap=2.0))
    chi_squared = float((pi**2 / mu).sum() - 1)
    assert metrics["mismatch/ess"] == pytest.approx(1 / (1 + chi_squared))
    assert metrics["mismatch/kl"] == pytest.approx(float((mu * (mu / pi).log()).sum()))
    assert metrics["mismatch/cut_fraction"] == pytest.approx(0.2)  # 0.5/0.2 > 2, two of ten tokens


def test_huge_ratios_stay_finite() -> None:
    proximal, sampler = torch.tensor([0.0, -900.0]), torch.tensor([-900.0, 0.0])
    weights, raw = truncated_weights(proximal, sampler, cap=2.0)
    assert raw.isfinite().all()
    assert weights[0].item() == 2.0
    assert all(map(math.isfinite, mismatch_metrics(mismatch_sums(proximal, sampler, raw, cap=2.0)).values()))


def test_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    proximal, sampler = torch.randn(2, 9, generator=generator)
    _, raw = truncated_weights(proximal, sampler, cap=2.0)
    whole = mismatch_sums(proximal, sampler, raw, cap=2.0)
    parts = sum(
        mismatch_sums(proximal[part], sampler[part], raw[part], cap=2.0)
        for part in (slice(0, 4), slice(4, 9))
    )
    torch.testing.assert_close(whole, parts)


def test_nothing_to_weigh_is_not_a_mismatch() -> None:
    empty = torch.zeros(0)
    assert mismatch_metrics(mismatch_sums(empty, empty, empty, cap=2.0))["mismatch/ess"] == 1.0

"""Figures of reward models by hand, against scipy, and as their intervals behave."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from rewards.preferences.evaluation import (
    Estimate,
    accuracy,
    accuracy_by_subset,
    accuracy_difference,
    best_of_n,
    calibration,
    clustered_bootstrap,
    length_report,
    partial_correlation,
    pearson,
    pooled_spearman,
    reliability,
    wilson,
    within_prompt_spearman,
)


def test_ties_are_wrong() -> None:
    found = accuracy([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 1.0, 1.0])
    assert (found.value, found.count, found.prompts) == (0.5, 4, 4)


@pytest.mark.parametrize(("right", "total"), [(0, 9), (4, 9), (9, 9), (81, 263)])
def test_interval_of_independent_pairs_is_wilsons(right: int, total: int) -> None:
    expected = stats.binomtest(right, total).proportion_ci(method="wilson")
    found = accuracy([1.0] * right + [-1.0] * (total - right), [0.0] * total)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_pairs_of_one_prompt_are_no_evidence_of_their_own() -> None:
    # Every prompt's pairs agree: 5 copies of 40 pairs tell as much as the 40.
    lead = np.array([1.0] * 30 + [-1.0] * 10)
    once = accuracy(lead, np.zeros(40))
    copied = accuracy(np.repeat(lead, 5), np.zeros(200), [f"p{i}" for i in np.repeat(np.arange(40), 5)])
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=1e-12)
    assert (copied.count, copied.prompts) == (200, 40)
    # All right: no more certain than the number of prompts allows.
    perfect = accuracy(np.ones(200), np.zeros(200), np.repeat(np.arange(4), 50))
    assert (perfect.low, perfect.high) == pytest.approx(wilson(1.0, 4), abs=1e-12)


def test_clustered_interval_holds_the_truth_about_95_times_in_100() -> None:
    # 60 prompts of 8 pairs; each prompt has its own chance of a right pair, Beta(3, 1), mean 3/4.
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(60), 8)
    held = naive = 0
    for _ in range(400):
        right = rng.random(480) < np.repeat(rng.beta(3, 1, 60), 8)
        found = accuracy(right.astype(float), np.full(480, 0.5), prompts)
        held += found.low <= 0.75 <= found.high
        low, high = wilson(right.mean(), 480)
        naive += low <= 0.75 <= high
    assert 0.92 <= held / 400 <= 0.98
    assert naive / 400 < 0.87  # what ignoring the prompts would give


def test_difference_of_accuracies_is_newcombes() -> None:
    # Newcombe 1998, table II, (a): 56/70 − 48/80 = .2, method 10 gives .0524 to .3339.
    first = accuracy([1.0] * 56 + [-1.0] * 14, [0.0] * 70)
    second = accuracy([1.0] * 48 + [-1.0] * 32, [0.0] * 80)
    found = accuracy_difference(first, second)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_accuracy_by_subset() -> None:
    found = accuracy_by_subset([1, 1, 0, 1], [0, 2, 1, 0], ["b", "a", "a", "b"], ["x", "x", "y", "y"])
    assert list(found) == ["a", "b"]
    assert (found["a"].value, found["b"].value) == (0.0, 1.0)
    assert found["a"].prompts == 2


def test_reliability_by_hand() -> None:
    # Three of four at .75 came true: exact. At .9 the bin is off by .15; at σ(½·log 3) = .634 by .116.
    assert reliability([0.75] * 4, [1, 1, 1, 0]).ece == pytest.approx(0.0)
    assert reliability([0.9] * 4, [1, 1, 1, 0]).ece == pytest.approx(0.15)
    half = 1 / (1 + math.exp(-0.5 * math.log(3)))
    assert reliability([half] * 4, [1, 1, 1, 0]).ece == pytest.approx(0.75 - half)
    # Two bins, weighted by what they hold: (2·|.05 − .5| + 1·|1 − 1|)/3 = .3; p = 1 is in the last bin.
    found = reliability([0.05, 0.05, 1.0], [0, 1, 1])
    assert found.ece == pytest.approx(0.3)
    assert [(b.low, b.high, b.count, b.predicted, b.observed) for b in found.bins] == [
        (0.0, 0.1, 2, pytest.approx(0.05), 0.5),
        (0.9, 1.0, 1, 1.0, 1.0),
    ]


def test_presentation_order_is_random_and_repeatable() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0.5, 1, 500), rng.normal(size=500)
    found = calibration(chosen, rejected, seed=3)
    assert found == calibration(chosen, rejected, seed=3)
    assert found.ece != calibration(chosen, rejected, seed=4).ece
    # About half of the pairs are shown the other way round: both halves of the scale are used.
    below = sum(b.count for b in found.bins if b.high <= 0.5)
    assert 150 < below < 350


def test_what_calibration_error_chance_gives() -> None:
    # Of 200 calibrated sets of 200 pairs about 95 % must lie under `ece_by_chance`.
    rng = np.random.default_rng(1)
    under = 0
    for seed in range(200):
        p = rng.random(200)
        found = reliability(p, rng.random(200) < p, seed=seed)
        under += found.ece <= found.ece_by_chance
    assert 0.89 <= under / 200 <= 0.99


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores with ties, gold, length and prompts of 2 to 9 responses, every prompt with its own level."""
    rng = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(40), rng.integers(2, 10, 40))
    gold = rng.normal(size=len(prompts)) + 3 * rng.normal(size=40)[prompts]
    length = np.round(10 + 2 * gold + rng.normal(scale=3, size=len(prompts)))
    scores = np.round(gold + 0.2 * length + rng.normal(size=len(prompts)) - 5 * np.sin(prompts))
    return scores, gold, length, prompts


def test_within_prompt_spearman_is_the_mean_of_scipys() -> None:
    scores, gold, _, prompts = rows()
    each = [
        stats.spearmanr(scores[prompts == p], gold[prompts == p]).statistic
        for p in range(40)
        if np.ptp(scores[prompts == p]) > 0
    ]
    order = np.random.default_rng(1).permutation(len(prompts))  # rows of a prompt need not stand together
    found = within_prompt_spearman(scores[order], gold[order], prompts[order])
    assert found is not None
    assert found.value == pytest.approx(np.mean(each), abs=1e-12)
    assert found.prompts == len(each)
    half = 1.96 * np.std(each, ddof=1) / math.sqrt(len(each))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.15)


def test_what_cannot_be_told_is_none() -> None:
    # Nothing varies within a prompt, or one column not at all.
    assert within_prompt_spearman([1.0, 1.0, 2.0], [1.0, 2.0, 3.0], ["a", "a", "b"]) is None
    assert pearson([0.1] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert partial_correlation([1.0, 2.0, 4.0], [1.0, 3.0, 2.0], [2.0, 4.0, 8.0]) is None
    report = length_report([1.0, 2.0, 3.0, 5.0], [4.0, 4.0, 4.0, 4.0], ["a", "a", "b", "b"])
    assert report.pearson is report.spearman is report.pearson_within is report.spearman_within is None
    assert report.partial is report.partial_within is None


def test_a_score_that_is_not_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"not finite, at \[1\]"):
        accuracy([1.0, math.nan], [0.0, 0.0])


def test_length_report_against_scipy_and_regression() -> None:
    scores, gold, length, prompts = rows(2)
    found = length_report(scores, length, prompts, gold)

    def centred(x: np.ndarray) -> np.ndarray:
        return x - np.array([x[prompts == p].mean() for p in prompts])

    def left(x: np.ndarray, by: np.ndarray) -> np.ndarray:
        """What a regression on `by` leaves: the partial correlation is that of the residuals."""
        design = np.stack([np.ones(len(by)), by], axis=1)
        return x - design @ np.linalg.lstsq(design, x, rcond=None)[0]

    within = [centred(x) for x in (scores, length, gold)]
    expected = {
        "pearson": stats.pearsonr(scores, length).statistic,
        "spearman": stats.spearmanr(scores, length).statistic,
        "pearson_within": stats.pearsonr(within[0], within[1]).statistic,
        "partial": stats.pearsonr(left(scores, gold), left(length, gold)).statistic,
        "partial_within": stats.pearsonr(left(within[0], within[2]), left(within[1], within[2])).statistic,
    }
    for name, value in expected.items():
        estimate = getattr(found, name)
        assert isinstance(estimate, Estimate)
        assert estimate.value == pytest.approx(value, abs=1e-10), name
        assert estimate.low < value < estimate.high


def test_fast_bootstrap_agrees_with_the_general_one() -> None:
    scores, _, length, prompts = rows(3)
    fast = pearson(scores, length, prompts)
    slow = clustered_bootstrap(
        lambda index: float(np.corrcoef(scores[index], length[index])[0, 1]), prompts, len(prompts)
    )
    assert fast is not None
    assert fast.value == pytest.approx(slow.value, abs=1e-12)
    # Two sets of 1000 draws: the ends agree to their own noise.
    assert (fast.low, fast.high) == pytest.approx((slow.low, slow.high), abs=0.03)
    # Whole prompts are drawn, so the interval is wider than one that takes the rows for independent.
    loose = pearson(scores, length)
    assert loose is not None
    assert fast.high - fast.low > 1.2 * (loose.high - loose.low)


def test_pooled_rank_correlation_sees_what_is_added_to_prompts_and_the_other_does_not() -> None:
    scores, gold, _, prompts = rows(4)
    shifted = scores + 100 * np.cos(prompts)
    assert within_prompt_spearman(shifted, gold, prompts) == within_prompt_spearman(scores, gold, prompts)
    before, after = pooled_spearman(scores, gold, prompts), pooled_spearman(shifted, gold, prompts)
    assert before is not None
    assert after is not None
    assert after.value < before.value - 0.2


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    proxy, gold = [3.0, 1.0, 2.0, 2.0, 5.0, 0.0], [1.0, -1.0, 4.0, 0.0, 2.0, 7.0]
    for n in range(1, 7):
        values = []
        for subset in itertools.combinations(range(6), n):
            top = max(proxy[i] for i in subset)
            # 2 and 3 tie: either may be the best, whichever of them the subset holds.
            values.append({5.0: 2.0, 3.0: 1.0, 2.0: 2.0, 1.0: -1.0, 0.0: 7.0}[top])
        assert best_of_n(proxy, gold, [n])[0] == pytest.approx(np.mean(values), abs=1e-12)
    with pytest.raises(ValueError, match="1 ≤ n ≤ 6"):
        best_of_n(proxy, gold, [7])

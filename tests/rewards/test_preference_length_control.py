"""The length-controlled win rate against an independent optimiser, and where the answer is known."""

import numpy as np
import pytest
from scipy import optimize
from scipy.special import expit

from rewards.preferences.length_control import (
    STRENGTHS,
    choose_strength,
    fit_l1_logistic,
    length_controlled_win_rate,
    tells_quality,
)


def lengths(count: int = 400, seed: int = 0, longer: float = 40.0) -> tuple[np.ndarray, np.ndarray]:
    """Of the model, which writes more, and of the baseline."""
    rng = np.random.default_rng(seed)
    return rng.normal(200 + longer, 30, count).round(), rng.normal(200, 30, count).round()


def test_preferences_for_length_alone_give_one_half() -> None:
    # P(win) = σ(2·tanh(Δ/std Δ)) and nothing else: θ = 0 fits exactly, whatever the raw win rate.
    ours, theirs = lengths()
    delta = ours - theirs
    found = length_controlled_win_rate(expit(2 * np.tanh(delta / delta.std(ddof=1))), ours, theirs)
    assert found.raw > 0.65
    assert found.controlled == pytest.approx(0.5, abs=1e-4)
    assert (found.theta, found.phi) == pytest.approx((0.0, 2.0), abs=0.01)
    assert found.low <= 0.5 + 1e-3
    # The same with one label each: one half is within the interval, the raw win rate is far from it.
    rng = np.random.default_rng(1)
    labels = (rng.random(400) < expit(2 * np.tanh(delta / delta.std(ddof=1)))).astype(float)
    noisy = length_controlled_win_rate(labels, ours, theirs)
    assert noisy.low < 0.5 < noisy.high < noisy.raw_low


def test_where_the_longer_one_always_wins_the_even_point_is_at_equal_length() -> None:
    # Length separates the labels, so φ is as large as the penalty lets it and the even point, where
    # θ + φ·tanh(Δ/std) = 0, lies in the gap between Δ = −1 and Δ = 1. σ(θ) itself may be anything there,
    # so it is said not to be identified.
    ours, theirs = lengths()
    ours = np.where(ours == theirs, ours + 1, ours)
    delta = ours - theirs
    found = length_controlled_win_rate((delta > 0).astype(float), ours, theirs, resamples=20)
    assert not found.identified
    assert found.phi > 10
    assert abs(found.theta / found.phi) < np.tanh(1 / delta.std(ddof=1))


@pytest.mark.parametrize(
    ("preference", "delta", "told"),
    [
        ([1, 1, 0, 0], [3, 1, -1, -2], False),  # the longer one wins
        ([0, 0, 1, 1], [3, 1, -1, -2], False),  # the shorter one wins
        ([1, 1, 1, 1], [3, 1, 1, 2], False),  # always longer, always won: either may be why
        ([1, 1, 1, 1], [3, 1, -1, 2], True),  # won when shorter, too
        ([1, 1, 0, 0], [3, -1, -2, -3], True),  # length decides, but at less than equal length
        ([1, 1, 0.5, 0], [3, 1, 0, -2], True),  # a tie at equal length: θ is 0
        ([1, 1, 0.9, 0], [3, 1, 2, -2], True),  # a chance of .9 bounds φ
        ([1, 0, 1, 0], [0, 0, 0, 0], True),  # no lengths at all
    ],
)
def test_when_the_comparisons_tell_quality(preference: list, delta: list, told: bool) -> None:
    assert tells_quality(np.array(preference, dtype=float), np.array(delta, dtype=float)) is told


def profile(theta: float, preference: np.ndarray, x: np.ndarray) -> float:
    """The smallest log loss over φ at this θ, for φ of up to 1,000."""
    losses = [
        (np.logaddexp(0, theta + phi * x) - preference * (theta + phi * x)).sum()
        for phi in np.linspace(-1000, 1000, 20_001)
    ]
    return float(min(losses))


def test_unidentified_means_that_every_theta_fits_as_well() -> None:
    x = np.tanh([1.5, 0.5, -0.5, -1.0])
    by_length, against = np.array([1.0, 1.0, 0.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0])
    assert [profile(theta, by_length, x) for theta in (-5.0, 0.0, 5.0)] == pytest.approx([0.0] * 3, abs=1e-6)
    # A win at −.5 and a loss at −1: with θ = −5 no φ fits both, with θ = 7.5 one does.
    assert profile(-5.0, against, x) > 1.0
    assert profile(7.5, against, x) < 0.5


def test_a_better_model_of_equal_length_keeps_its_win_rate() -> None:
    # Δ is 0 everywhere: no length term. 3 of 4 won; the penalty takes at most a little off.
    found = length_controlled_win_rate([1.0, 1.0, 1.0, 0.0] * 50, [10] * 200, [10] * 200)
    assert found.phi == 0.0
    assert found.controlled == pytest.approx(0.75, abs=0.01)
    assert found.low < 0.75 < found.high


def test_quality_is_told_from_length() -> None:
    # θ = 1, φ = 1.5, exact chances: the controlled rate is σ(1) although the raw one is higher.
    ours, theirs = lengths()
    delta = ours - theirs
    chance = expit(1 + 1.5 * np.tanh(delta / delta.std(ddof=1)))
    found = length_controlled_win_rate(chance, ours, theirs)
    assert found.controlled == pytest.approx(expit(1.0), abs=2e-3)
    assert found.raw > found.controlled + 0.02
    # Swapping the two models gives the other's rate: 1 minus this one.
    swapped = length_controlled_win_rate(1 - chance, theirs, ours)
    assert swapped.controlled == pytest.approx(1 - found.controlled, abs=1e-6)


def test_difficulty_is_averaged_over_and_not_set_to_zero() -> None:
    # logit = .5 + ψ·difficulty with ψ = 2: the rate is the mean of σ over prompts, not σ(.5).
    ours, theirs = lengths(longer=0.0)
    hard = np.random.default_rng(2).normal(1.0, 1.0, 400)
    found = length_controlled_win_rate(expit(0.5 + 2 * hard), ours, theirs, difficulty=hard)
    assert found.psi == pytest.approx(2.0, abs=0.02)
    assert found.controlled == pytest.approx(expit(0.5 + 2 * hard).mean(), abs=2e-3)


@pytest.mark.parametrize("strength", [0.02, 1.0, 1000.0])
def test_fit_against_an_independent_optimiser(strength: float) -> None:
    # ‖w‖₁ made smooth by w = u − v with u, v ≥ 0: scipy's bounded quasi-Newton on 2·P variables.
    rng = np.random.default_rng(3)
    x, y, weight = rng.normal(size=(150, 3)), rng.random(150), rng.integers(0, 3, 150).astype(float)

    def objective(uv: np.ndarray) -> tuple[float, np.ndarray]:
        logits = x @ (uv[:3] - uv[3:])
        value = uv.sum() + strength * (weight * (np.logaddexp(0, logits) - y * logits)).sum()
        slope = strength * x.T @ (weight * (expit(logits) - y))
        return value, np.concatenate([1 + slope, 1 - slope])

    best = optimize.minimize(
        objective,
        np.full(6, 0.1),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * 6,
        options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10},
    )
    expected = best.x[:3] - best.x[3:]
    np.testing.assert_allclose(fit_l1_logistic(x, y, strength, weight=weight), expected, atol=1e-5)
    start = np.array([5.0, -5.0, 5.0])
    np.testing.assert_allclose(
        fit_l1_logistic(x, y, strength, weight=weight, start=start), expected, atol=1e-5
    )


def independent_fit(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    """argmin ‖w‖₁/C + Σ log loss by a general constrained solver, with w = u − v and u, v ≥ 0."""
    p = x.shape[1]

    def objective(uv: np.ndarray) -> tuple[float, np.ndarray]:
        logits = x @ (uv[:p] - uv[p:])
        slope = x.T @ (expit(logits) - y)
        value = uv.sum() / strength + (np.logaddexp(0, logits) - y * logits).sum()
        return value, np.concatenate([slope, -slope]) + 1 / strength

    found = optimize.minimize(
        objective,
        np.full(2 * p, 0.1),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * 2 * p,
        options={"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-9},
    )
    return np.asarray(found.x[:p] - found.x[p:])


@pytest.mark.parametrize("seed", [6, 7, 8])
def test_the_whole_procedure_against_an_independent_one(seed: int) -> None:
    """Folds, cross-validated C, refit and rate, written anew from the definition."""
    rng = np.random.default_rng(seed)
    ours, theirs = lengths(180, seed)
    hard = rng.normal(size=60).repeat(3)
    prompts = [f"p{number}" for number in np.arange(60).repeat(3)]
    delta = ours - theirs
    spread = np.sqrt(((delta - delta.mean()) ** 2).sum() / 179)
    labels = (rng.random(180) < expit(0.3 + 0.8 * delta / spread + 0.5 * hard)).astype(float)
    found = length_controlled_win_rate(labels, ours, theirs, difficulty=hard, prompts=prompts, resamples=2)
    x = np.stack([np.ones(180), np.tanh(delta / spread), hard], axis=1)
    fold = np.array([int(prompt[1:]) % 5 for prompt in prompts])
    losses = []
    for strength in np.logspace(-4, 4, 10):
        of_folds = []
        for k in range(5):
            z = x[fold == k] @ independent_fit(x[fold != k], labels[fold != k], strength)
            won = labels[fold == k]
            of_folds.append(np.mean(-won * np.log(expit(z)) - (1 - won) * np.log(expit(-z))))
        losses.append(np.mean(of_folds))
    strength = np.logspace(-4, 4, 10)[int(np.argmin(losses))]
    w = independent_fit(x, labels, strength)
    assert found.strength == pytest.approx(strength)
    assert (found.theta, found.phi, found.psi) == pytest.approx(tuple(w), abs=1e-4)
    assert found.controlled == pytest.approx(np.mean(expit(w[0] + w[2] * hard)), abs=1e-5)


def test_penalty_is_chosen_on_what_was_left_out() -> None:
    # Pure noise is fitted best by nothing at all, exact chances by all that the data say.
    rng = np.random.default_rng(4)
    x = rng.normal(size=(60, 3))
    fold = np.arange(60) % 5
    assert choose_strength(x, (rng.random(60) < 0.5).astype(float), fold) <= 1.0
    assert choose_strength(x, expit(x @ np.array([1.0, 0.5, -1.0])), fold) == STRENGTHS[-1]


def test_prompts_are_the_unit() -> None:
    # Four copies of each comparison under one prompt tell as much as one, and are never in two folds.
    ours, theirs = lengths(120)
    labels = (np.random.default_rng(5).random(120) < 0.6).astype(float)
    once = length_controlled_win_rate(labels, ours, theirs, seed=1)
    prompts = [f"p{i}" for i in np.repeat(np.arange(120), 4)]
    copied = length_controlled_win_rate(
        *(np.repeat(v, 4) for v in (labels, ours, theirs)), prompts=prompts, seed=1
    )
    assert (copied.count, copied.prompts) == (480, 120)
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.15)
    assert (copied.raw_low, copied.raw_high) == pytest.approx((once.raw_low, once.raw_high), abs=1e-12)


@pytest.mark.parametrize(
    ("preference", "prompts", "message"),
    [
        ([1.0, 2.0], None, r"must lie in \[0, 1\]"),
        ([1.0, float("nan")], None, r"must lie in \[0, 1\]"),
        ([1.0], None, r"1 preferences, 2 lengths"),
        ([1.0, 0.0], ["a", "a"], r"at least 2 prompts, got 1"),
        ([1.0, 0.0], ["a"], r"1 prompts for 2 comparisons"),
    ],
)
def test_what_cannot_be_is_refused(preference: list, prompts: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        length_controlled_win_rate(preference, [3, 4], [4, 4], prompts=prompts)

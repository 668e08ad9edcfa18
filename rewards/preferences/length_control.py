"""Length-controlled win rate: what a model would win if its responses were as long as the baseline's.

Legend: N comparisons of a model with a baseline, P features. With Δ = length − baseline's length,

    logit P(model wins) = θ + φ·tanh(Δ/std(Δ)) + ψ·difficulty

is fitted with an L1 penalty, whose strength is chosen by cross-validation over prompts, and the win rate is
the mean of σ(θ + ψ·difficulty): the length term is set to 0. θ takes the place of an intercept and is
penalised as the rest. Source: Dubois et al., arXiv 2404.04475.

Folds: prompts are dealt out in turn, in the order in which they first come, so folds are of equal size and
need no seed. Rows whose kind repeats with the number of folds as its period should be shuffled first.
"""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

Array = NDArray[np.float64]

STRENGTHS: Array = np.logspace(-4, 4, 10)
_SWEEPS = 20  # of coordinate descent, before the quadratic model is solved by its signs


@dataclass(frozen=True, slots=True)
class WinRate:
    """`raw` and `controlled` are shares of 1, each with a 95 % bootstrap interval over prompts.

    θ, φ and ψ are the fitted coefficients, `strength` is C, the weight of the data against the penalty.
    `identified` is False where the data say nothing of σ(θ), and so of `controlled` and its interval: see
    `tells_quality`.
    """

    raw: float
    raw_low: float
    raw_high: float
    controlled: float
    low: float
    high: float
    theta: float
    phi: float
    psi: float
    strength: float
    identified: bool
    count: int
    prompts: int


def length_controlled_win_rate(
    preference: ArrayLike,
    lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    *,
    difficulty: ArrayLike | None = None,
    prompts: Sequence[Hashable] | None = None,
    folds: int = 5,
    resamples: int = 200,
    seed: int = 0,
) -> WinRate:
    """All (N,). preference: the chance in [0, 1] that the model's response wins, 1/2 for a tie.

    `difficulty` is one number a comparison that says how hard its prompt is for the baseline; without it
    there is no ψ. `prompts` keeps a prompt's comparisons in one fold and one draw of the bootstrap, which
    keeps C and std(Δ) as they are. If all Δ are 0, φ is 0 and only the penalty sets the result apart from the
    raw win rate. Where length alone decides every comparison, without noise, the data do not tell σ(θ):
    `identified` is then False.
    """
    y = np.asarray(preference, dtype=np.float64)
    delta = np.asarray(lengths, dtype=np.float64) - np.asarray(baseline_lengths, dtype=np.float64)
    hard = np.zeros(len(y)) if difficulty is None else np.asarray(difficulty, dtype=np.float64)
    _check(y, delta, hard)
    place, groups = _prompt_numbers(prompts, len(y))
    if groups < 2:
        raise ValueError(
            f"a length-controlled win rate needs at least 2 prompts, got {groups}: compare on more"
        )
    spread = float(delta.std(ddof=1))
    x = np.stack([np.ones(len(y)), np.tanh(delta / spread) if spread > 0 else 0.0 * delta, hard], axis=1)
    strength = choose_strength(x, y, place % min(folds, groups))
    coefficients = fit_l1_logistic(x, y, strength)
    rng = np.random.default_rng(seed)
    raws, rates = [], []
    for _ in range(resamples):
        weight = np.bincount(rng.integers(0, groups, groups), minlength=groups)[place].astype(np.float64)
        again = fit_l1_logistic(x, y, strength, weight=weight, start=coefficients)
        raws.append(float(weight @ y / weight.sum()))
        rates.append(_rate(again, hard, weight))
    raw_low, raw_high = (float(v) for v in np.quantile(raws, [0.025, 0.975]))
    low, high = (float(v) for v in np.quantile(rates, [0.025, 0.975]))
    theta, phi, psi = (float(v) for v in coefficients)
    return WinRate(
        raw=float(y.mean()),
        raw_low=raw_low,
        raw_high=raw_high,
        controlled=_rate(coefficients, hard, np.ones(len(y))),
        low=low,
        high=high,
        theta=theta,
        phi=phi,
        psi=psi,
        strength=strength,
        identified=tells_quality(y, delta),
        count=len(y),
        prompts=groups,
    )


def tells_quality(preference: Array, delta: Array) -> bool:
    """Whether the comparisons (N,) tell θ at all.

    They do not where who is longer decides each one in the same direction: no outcome between 0 and 1, no Δ
    of 0, and every longer response won, or every one lost. Then any θ, and any ψ, has a φ large enough to fit
    all outcomes as closely as one likes, so the likelihood maximised over φ is the same for every θ, and
    only the penalty chooses among them. One comparison at equal length, or one against the rest, ends that.
    """
    if ((preference > 0) & (preference < 1)).any() or (delta == 0).any():
        return True
    longer_won = (preference == 1) == (delta > 0)
    return bool(longer_won.any() and not longer_won.all())


def choose_strength(features: Array, targets: Array, fold: NDArray[np.intp]) -> float:
    """The C of `STRENGTHS` with the smallest log loss on the folds left out; the first of equals."""
    losses = np.zeros(len(STRENGTHS))
    names = np.unique(fold)
    for name in names:
        test = fold == name
        start = None
        for index, strength in enumerate(STRENGTHS):
            start = fit_l1_logistic(features[~test], targets[~test], float(strength), start=start)
            losses[index] += _log_loss(features[test] @ start, targets[test]).mean() / len(names)
    return float(STRENGTHS[int(np.argmin(losses))])


def fit_l1_logistic(
    features: Array,
    targets: Array,
    strength: float,
    *,
    weight: Array | None = None,
    start: Array | None = None,
) -> Array:
    """argmin_w ‖w‖₁ + C·Σ_i c_i·[log(1 + e^{x_i·w}) − y_i·x_i·w], (P,); y in [0, 1], c = `weight` or 1.

    Proximal Newton: coordinate descent on the quadratic model, then a line search (arXiv 1206.1623).
    """
    c = strength * (np.ones(len(targets)) if weight is None else weight)
    w = np.zeros(features.shape[1]) if start is None else start.copy()

    def objective(at: Array) -> float:
        return float(np.abs(at).sum() + c @ _log_loss(features @ at, targets))

    value = objective(w)
    for _ in range(200):
        p = expit(features @ w)
        gradient = features.T @ (c * (p - targets))
        hessian = (features * (c * p * (1 - p))[:, None]).T @ features
        step = _coordinate_descent(w, gradient, hessian)
        promised = float(gradient @ step + np.abs(w + step).sum() - np.abs(w).sum())
        size = 1.0
        while (reached := objective(w + size * step)) > value + 0.01 * size * promised and size > 1e-10:
            size *= 0.5
        w, value = w + size * step, min(value, reached)
        if np.abs(step).max() <= 1e-9 * (1.0 + np.abs(w).max()):
            return w
    return w


def _coordinate_descent(w: Array, gradient: Array, hessian: Array) -> Array:
    """argmin_d g·d + ½·dᵀHd + ‖w + d‖₁; exact where it crawls, as it does on features that go together."""
    d = np.zeros_like(w)
    for _ in range(_SWEEPS):
        largest = 0.0
        for j in range(len(w)):
            curvature = hessian[j, j] + 1e-12
            slope = gradient[j] + float(hessian[j] @ d) + 1e-12 * d[j]
            target = w[j] + d[j] - slope / curvature
            moved = np.sign(target) * max(0.0, abs(target) - 1.0 / curvature) - w[j]
            largest = max(largest, abs(moved - d[j]))
            d[j] = moved
        if largest <= 1e-12 * (1.0 + np.abs(w + d).max()):
            return d
    return _by_signs(w, gradient, hessian, d)


def _by_signs(w: Array, gradient: Array, hessian: Array, best: Array) -> Array:
    """The same minimum, by solving for each pattern of signs of w + d: 3^P linear systems, P is 3 here."""

    def value(d: Array) -> float:
        return float(gradient @ d + 0.5 * d @ hessian @ d + np.abs(w + d).sum())

    least = value(best)
    for pattern in itertools.product((-1.0, 0.0, 1.0), repeat=len(w)):
        signs = np.array(pattern)
        free = signs != 0
        d = -w.copy()  # those of sign 0 are at 0
        if free.any():
            system = hessian[np.ix_(free, free)] + 1e-12 * np.eye(int(free.sum()))
            known = gradient[free] + signs[free] + hessian[np.ix_(free, ~free)] @ d[~free]
            d[free] = np.linalg.solve(system, -known)
        if (reached := value(d)) < least:
            best, least = d, reached
    return best


def _log_loss(logits: Array, targets: Array) -> Array:
    return np.asarray(np.logaddexp(0.0, logits) - targets * logits, dtype=np.float64)


def _rate(coefficients: Array, difficulty: Array, weight: Array) -> float:
    """Mean of σ(θ + ψ·difficulty)."""
    return float(weight @ expit(coefficients[0] + coefficients[2] * difficulty) / weight.sum())


def _check(y: Array, delta: Array, hard: Array) -> None:
    if not len(y) == len(delta) == len(hard):
        raise ValueError(
            f"{len(y)} preferences, {len(delta)} lengths, {len(hard)} difficulties: one of each a comparison"
        )
    if not (np.isfinite(delta).all() and np.isfinite(hard).all()):
        raise ValueError("lengths and difficulties must be finite numbers")
    if not ((y >= 0) & (y <= 1)).all():
        raise ValueError(
            "preferences must lie in [0, 1]: 1 where the model's response wins, 0 where the baseline's does, "
            "1/2 for a tie"
        )


def _prompt_numbers(prompts: Sequence[Hashable] | None, count: int) -> tuple[NDArray[np.intp], int]:
    if prompts is None:
        return np.arange(count), count
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    if len(prompts) != count:
        raise ValueError(f"{len(prompts)} prompts for {count} comparisons: one a comparison")
    return np.array([numbers[prompt] for prompt in prompts], dtype=np.intp), len(numbers)

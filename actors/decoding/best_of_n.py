"""Best-of-n: an unbiased estimator from N samples, exact laws where all responses can be listed, soft choice.

The best of n draws from p by a score, ties broken at random, has the law (F the mass at or below a level of
the score, F₋ the mass below it)

    π_n(y) = p(y)/p(level of y) · (Fⁿ − F₋ⁿ),     KL(π_n‖p) ≤ log n − (n−1)/n  with equality without ties.

Soft best-of-n draws one of the n with probability ∝ e^{r/λ}; for n → ∞ it becomes p·e^{r/λ}/Z (Verdun et al.,
arXiv 2505.03156). pass@k is best-of-k of a reward that is 0 or 1 (Chen et al., arXiv 2107.03374).

Legend: N samples or responses, n candidates that the choice is made from.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

Array = NDArray[np.float64]


# ---- from samples ----------------------------------------------------------------------------------------


def best_of_n_weights(scores: ArrayLike, n: int) -> Array:
    """(N,): the probability that each sample is the best of n that are drawn from the N without replacement.

    Sorted upwards the i-th of N (from 1) is it with probability C(i−1, n−1)/C(N, n); samples of one score
    share theirs equally. Σ weight·value is then an unbiased estimate of the value under best-of-n.
    """
    values = _vector(scores, "scores")
    N = len(values)
    if not 1 <= n <= N:
        raise ValueError(f"n = {n}: best-of-n is estimated from N = {N} samples for n from 1 to N")
    places = np.arange(n, N + 1)
    by_place = np.zeros(N)
    by_place[n - 1 :] = np.exp(_log_choose(places - 1, n - 1) - _log_choose(np.array([N]), n))
    _, level, counts = np.unique(values, return_inverse=True, return_counts=True)
    shares = np.bincount(np.sort(level), by_place, len(counts)) / counts
    return np.asarray(shares[level], dtype=np.float64)


def best_of_n_estimate(scores: ArrayLike, values: ArrayLike, n: int) -> float:
    """Unbiased estimate of E[value of the best of n by score] from N samples with (N,) scores and values."""
    found = _vector(values, "values")
    weights = best_of_n_weights(scores, n)
    if found.shape != weights.shape:
        raise ValueError(f"values has shape {found.shape}, scores {weights.shape}: one value a sample")
    return float(weights @ found)


def pass_at_k(passes: ArrayLike, k: int) -> float:
    """1 − C(N − c, k)/C(N, k): the chance that at least one of k samples passes, c of N having passed."""
    hits = (_vector(passes, "passes") > 0).astype(np.float64)
    return best_of_n_estimate(hits, hits, k)


def sampled_kl(scores: ArrayLike, n: int) -> float:
    """KL(π_n‖p) with the N samples' own distribution of scores for that of p, in nats.

    It sees ties, which the bound does not. With N samples it is too small by O(n/N): keep N ≥ 4n.
    """
    values = _vector(scores, "scores")
    return best_of_n_kl(np.full(len(values), 1 / len(values)), values, n)


# ---- exact laws ------------------------------------------------------------------------------------------


def best_of_n_law(p: ArrayLike, scores: ArrayLike, n: int) -> Array:
    """(S,) probabilities of the best of n draws from (S,) probabilities p."""
    mass, score = _vector(p, "p"), _vector(scores, "scores")
    level, at, chosen = _level_masses(mass, score, n)
    ratio = np.divide(chosen, at, out=np.zeros_like(at), where=at > 0)
    return np.asarray(mass * ratio[level], dtype=np.float64)


def best_of_n_kl(p: ArrayLike, scores: ArrayLike, n: int) -> float:
    """KL(π_n‖p) in nats: Σ over levels of (Fⁿ − F₋ⁿ)·log((Fⁿ − F₋ⁿ)/p(level))."""
    _, at, chosen = _level_masses(_vector(p, "p"), _vector(scores, "scores"), n)
    seen = chosen > 0
    return max(0.0, float((chosen[seen] * np.log(chosen[seen] / at[seen])).sum()))


def best_of_n_win_rate(p: ArrayLike, scores: ArrayLike, n: int) -> float:
    """P(the best of n scores above one draw from p) + half of P(they tie); n/(n+1) without ties."""
    _, at, chosen = _level_masses(_vector(p, "p"), _vector(scores, "scores"), n)
    below = np.cumsum(at) - at
    return float(chosen @ (below + at / 2))


def kl_bound(n: int) -> float:
    """log n − (n−1)/n, the largest KL(π_n‖p) that there is, in nats."""
    return math.log(n) - (n - 1) / n


def win_rate_bound(n: int) -> float:
    """n/(n+1), the largest win rate of the best of n over one draw."""
    return n / (n + 1)


def _level_masses(p: Array, scores: Array, n: int) -> tuple[NDArray[np.intp], Array, Array]:
    """Each response's level, and for each level its mass under p and under the best of n."""
    if p.shape != scores.shape:
        raise ValueError(f"p has shape {p.shape}, scores {scores.shape}: one score a response")
    if n < 1:
        raise ValueError(f"n = {n}: the best of n needs at least one draw")
    levels, level = np.unique(scores, return_inverse=True)
    at = np.bincount(level, p, len(levels)) / p.sum()
    upto = np.minimum(np.cumsum(at), 1.0)
    upto[-1] = 1.0
    # Fⁿ − F₋ⁿ = Fⁿ·(1 − (F₋/F)ⁿ), without cancellation where a level has little mass.
    ratio = np.divide(at, upto, out=np.zeros_like(at), where=upto > 0)
    with np.errstate(divide="ignore"):
        return level, at, -(upto**n) * np.expm1(n * np.log1p(-ratio))


# ---- soft best-of-n --------------------------------------------------------------------------------------


def soft_choice(scores: ArrayLike, temperature: float) -> Array:
    """(n,) probabilities of choosing each candidate, ∝ e^{r/λ}."""
    return tilted(np.ones(len(_vector(scores, "scores"))), scores, temperature)


def tilted(p: ArrayLike, scores: ArrayLike, temperature: float) -> Array:
    """p·e^{r/λ}/Z: what soft best-of-n tends to, and the optimum of E[r] − λ·KL(π‖p)."""
    mass, score = _vector(p, "p"), _vector(scores, "scores")
    _require_temperature(temperature)
    weights = mass * np.exp((score - score.max()) / temperature)
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def soft_best_of_n_law(p: ArrayLike, scores: ArrayLike, n: int, temperature: float) -> Array:
    """(S,) probabilities of soft best-of-n, by one quadrature.

    With w = e^{r/λ} and 1/Σ = ∫₀^∞ e^{−uΣ} du, π(y) = n·p(y)·w(y)·∫ e^{−u·w(y)}·(E_p e^{−u·w})^{n−1} du. In
    log u the integrand is smooth and vanishes fast at both ends, where the trapezoidal rule is exact to
    rounding.
    """
    mass, score = _vector(p, "p"), _vector(scores, "scores")
    _require_temperature(temperature)
    if n < 1:
        raise ValueError(f"n = {n}: the best of n needs at least one draw")
    mass = mass / mass.sum()
    log_w = (score - score.max()) / temperature
    low, high = -45.0, 4.0 - float(log_w.min())
    grid = np.linspace(low, high, max(600, 16 * math.ceil(high - low)))
    total = np.zeros_like(mass)
    for v in grid:
        decay = np.exp(-np.exp(v + log_w))
        total += np.exp(v + log_w) * decay * (mass @ decay) ** (n - 1)
    return np.asarray(n * mass * total * (grid[1] - grid[0]), dtype=np.float64)


def _require_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature λ = {temperature}: give a number above 0")


def _log_choose(a: NDArray[np.int_], b: int) -> Array:
    """log C(a, b)."""
    return np.asarray(gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1), dtype=np.float64)


def _vector(values: ArrayLike, name: str) -> Array:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not found.size or not np.isfinite(found).all():
        raise ValueError(f"{name} must be a list of finite numbers, at least one; got shape {found.shape}")
    return found

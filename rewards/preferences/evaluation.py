"""How good a reward model is, on pairs and on responses, with intervals.

Legend: N pairs or responses, G prompts. What comes from one prompt is not independent, so every interval
takes prompts, not rows, as its unit; `prompts` names each row's prompt (any hashable values). Without it
every row is a prompt of its own. Intervals are at 95 %. A figure that the rows cannot tell is None.

Rewards learned from pairs within prompts are known up to a function of the prompt: figures within prompts
tell what was learned, pooled ones also what happened to be added to each prompt.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import expit

Array = NDArray[np.float64]
Index = NDArray[np.intp]
Prompts = Sequence[Hashable] | NDArray[np.generic] | None

_Z = float(stats.norm.ppf(0.975))
_AT_ONCE = 4_000_000  # numbers that a bootstrap holds at a time


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval; `count` rows of `prompts` prompts went into it."""

    value: float
    low: float
    high: float
    count: int
    prompts: int


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions between two bounds: how many, their (weighted) mean, and the share that came true."""

    low: float
    high: float
    count: int
    predicted: float
    observed: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """`ece` is Σ n_b·|predicted_b − observed_b|/N over the bins that hold anything; n may be sums of weights.

    `ece_by_chance` is what a perfectly calibrated model would stay under with 95 % probability, given as many
    pairs: an error below it is no evidence of miscalibration.
    """

    ece: float
    ece_by_chance: float
    bins: list[Bin]


@dataclass(frozen=True, slots=True)
class LengthReport:
    """Correlation of a reward with length; the partial ones hold gold fixed (None without gold)."""

    pearson: Estimate | None
    spearman: Estimate | None
    pearson_within: Estimate | None
    spearman_within: Estimate | None
    partial: Estimate | None
    partial_within: Estimate | None


# ---- accuracy ----------------------------------------------------------------------------------------------


def accuracy(chosen: ArrayLike, rejected: ArrayLike, prompts: Prompts = None) -> Estimate:
    """The share of pairs with r_chosen > r_rejected, so that a tie is wrong.

    The interval is Wilson's at the effective number of pairs n = p(1 − p)/Var(p), with Var(p) from the spread
    of the prompts' sums (linearised ratio); n is at most N, and G where all pairs are right or all wrong.
    """
    right = (_vector(chosen) > _vector(rejected)).astype(np.float64)
    assert len(right) > 0, "accuracy of no pairs"
    place, groups = _places(prompts, len(right))
    p, total = float(right.mean()), len(right)
    effective = float(groups)
    if 0.0 < p < 1.0 and groups > 1:
        residuals = np.bincount(place, weights=right - p, minlength=groups)
        variance = float(np.square(residuals).sum()) / total**2
        effective = min(float(total), p * (1 - p) / variance) if variance > 0 else float(total)
    low, high = wilson(p, effective)
    return Estimate(p, low, high, total, groups)


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's interval of a share p of n trials; n need not be whole."""
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * float(np.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)))
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_difference(first: Estimate, second: Estimate) -> Estimate:
    """first − second of two accuracies on different prompts (Newcombe 1998, method 10).

    low = d − √((p₁ − l₁)² + (u₂ − p₂)²), high = d + √((u₁ − p₁)² + (p₂ − l₂)²). A drop off the distribution
    is detected where `low` of (on the distribution) − (off it) is above 0.
    """
    d = first.value - second.value
    low = d - float(np.hypot(first.value - first.low, second.high - second.value))
    high = d + float(np.hypot(first.high - first.value, second.value - second.low))
    return Estimate(d, low, high, first.count + second.count, first.prompts + second.prompts)


def accuracy_by_subset(
    chosen: ArrayLike, rejected: ArrayLike, subsets: Sequence[str], prompts: Prompts = None
) -> dict[str, Estimate]:
    """`accuracy` of each subset's pairs, by the subset's name, sorted."""
    won, lost = _vector(chosen), _vector(rejected)
    place, _ = _places(prompts, len(won))
    names = np.asarray(subsets, dtype=object)
    assert len(names) == len(won)
    return {
        name: accuracy(won[rows], lost[rows], place[rows])
        for name in sorted(set(subsets))
        for rows in [np.flatnonzero(names == name)]
    }


# ---- calibration -------------------------------------------------------------------------------------------


def calibration(chosen: ArrayLike, rejected: ArrayLike, *, seed: int = 0, bins: int = 10) -> Calibration:
    """Each pair in a random order, p = σ(r₁ − r₂) against whether the first was chosen.

    Without the random order every outcome would be "the first". Scaling the rewards leaves the accuracy as it
    is and changes this. Where labels are deterministic it says nothing but how small the rewards are.
    """
    gap = _vector(chosen) - _vector(rejected)
    first = np.random.default_rng(seed).random(len(gap)) < 0.5
    return reliability(expit(np.where(first, gap, -gap)), first, bins=bins, seed=seed)


def reliability(
    predicted: ArrayLike,
    outcome: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    bins: int = 10,
    seed: int = 0,
) -> Calibration:
    """Calibration of probabilities (N,) against what happened (N,), in bins of equal width.

    `outcome` may be probabilities too, and `weight` (N,) those of the rows: with every case listed, the
    error is then the exact one.
    """
    p, happened = _vector(predicted), _vector(outcome)
    w = np.ones(len(p)) if weight is None else _vector(weight)
    assert len(p) == len(happened) == len(w) > 0
    place = np.minimum((p * bins).astype(np.intp), bins - 1)
    counts = np.bincount(place, minlength=bins)
    mass, sums, came = (np.bincount(place, weights=v, minlength=bins) for v in (w, w * p, w * happened))
    table = [
        Bin(b / bins, (b + 1) / bins, int(counts[b]), float(sums[b] / mass[b]), float(came[b] / mass[b]))
        for b in range(bins)
        if mass[b] > 0
    ]
    rng = np.random.default_rng([seed, 1])
    chance = [_ece(place, p, (rng.random(len(p)) < p).astype(np.float64), w, bins) for _ in range(200)]
    return Calibration(_ece(place, p, happened, w, bins), float(np.quantile(chance, 0.95)), table)


def _ece(place: Index, predicted: Array, happened: Array, weight: Array, bins: int) -> float:
    gaps = np.bincount(place, weights=weight * (predicted - happened), minlength=bins)
    return float(np.abs(gaps).sum() / weight.sum())


# ---- rank correlation with gold, correlation with length ---------------------------------------------------


def within_prompt_spearman(
    scores: ArrayLike, gold: ArrayLike, prompts: Prompts, *, seed: int = 0
) -> Estimate | None:
    """Mean over prompts of Spearman's ρ between scores and gold of the prompt's responses.

    Prompts of fewer than two responses, or where either does not vary, tell nothing and are left out;
    `Estimate.prompts` says how many were used. The interval is a bootstrap over prompts.
    """
    x, y = _vector(scores), _vector(gold)
    place, groups = _places(prompts, len(x))
    ranks = [_centred(_ranks_within(values, place), place, groups) for values in (x, y)]
    xx, yy, xy = (
        np.bincount(place, ranks[i] * ranks[j], minlength=groups) for i, j in ((0, 0), (1, 1), (0, 1))
    )
    told = (xx > 0) & (yy > 0)
    if not told.any():
        return None
    rho = xy[told] / np.sqrt(xx[told] * yy[told])
    rows = int(np.bincount(place, minlength=groups)[told].sum())
    sums = np.stack([rho, np.ones(len(rho))], axis=1)
    return _bootstrap_sums(sums, lambda s: s[:, 0] / s[:, 1], rows, seed)


def pooled_spearman(x: ArrayLike, y: ArrayLike, prompts: Prompts = None, *, seed: int = 0) -> Estimate | None:
    """Spearman's ρ over all rows; in the bootstrap over prompts the ranks stay those of all rows."""
    return pearson(stats.rankdata(_vector(x)), stats.rankdata(_vector(y)), prompts, seed=seed)


def pearson(x: ArrayLike, y: ArrayLike, prompts: Prompts = None, *, seed: int = 0) -> Estimate | None:
    """Pearson's correlation over all rows, bootstrapped over prompts; None where one does not vary."""
    return _correlation([_vector(x), _vector(y)], prompts, within=False, seed=seed)


def partial_correlation(
    x: ArrayLike,
    y: ArrayLike,
    given: ArrayLike,
    prompts: Prompts = None,
    *,
    within: bool = False,
    seed: int = 0,
) -> Estimate | None:
    """ρ_xy·g = (ρ_xy − ρ_xg·ρ_yg)/√((1 − ρ_xg²)(1 − ρ_yg²)); `within` centres all three in each prompt first.

    None where the given variable, or any, leaves nothing of the others to correlate.
    """
    return _correlation([_vector(x), _vector(y), _vector(given)], prompts, within=within, seed=seed)


def length_report(
    scores: ArrayLike, lengths: ArrayLike, prompts: Prompts, gold: ArrayLike | None = None, *, seed: int = 0
) -> LengthReport:
    """Every correlation of a reward with length that the rows can tell.

    `pearson_within` is over values less their prompt's mean, `spearman_within` the mean over prompts.
    """
    partial, partial_within = (
        None
        if gold is None
        else partial_correlation(scores, lengths, gold, prompts, within=within, seed=seed)
        for within in (False, True)
    )
    return LengthReport(
        pearson=pearson(scores, lengths, prompts, seed=seed),
        spearman=pooled_spearman(scores, lengths, prompts, seed=seed),
        pearson_within=_correlation([_vector(scores), _vector(lengths)], prompts, within=True, seed=seed),
        spearman_within=within_prompt_spearman(scores, lengths, prompts, seed=seed),
        partial=partial,
        partial_within=partial_within,
    )


def _correlation(columns: list[Array], prompts: Prompts, *, within: bool, seed: int) -> Estimate | None:
    """(Partial) correlation of the first two columns from sums that are added up by prompt."""
    place, groups = _places(prompts, len(columns[0]))
    assert all(len(column) == len(place) for column in columns)
    data = np.stack(columns, axis=1)
    size = np.sqrt(np.square(data).mean(axis=0))
    data = data - data.mean(axis=0)
    if within:
        data = np.stack([_centred(column, place, groups) for column in data.T], axis=1)
    spread = np.sqrt(np.square(data).mean(axis=0))
    if (spread <= 1e-12 * size).any():  # nothing but rounding
        return None
    data = data / spread
    pairs = [(i, j) for i in range(len(columns)) for j in range(i, len(columns))]
    products = [np.bincount(place, data[:, i] * data[:, j], groups) for i, j in pairs]
    firsts = [np.bincount(place, data[:, i], groups) for i in range(len(columns))]
    counts = np.bincount(place, minlength=groups).astype(np.float64)
    sums = np.stack([counts, *firsts, *products], axis=1)

    def statistic(total: Array) -> Array:
        mean = total[:, 1 : 1 + len(columns)] / total[:, :1]
        moment = {pair: total[:, 1 + len(columns) + place] / total[:, 0] for place, pair in enumerate(pairs)}
        with np.errstate(invalid="ignore", divide="ignore"):
            cov = {(i, j): moment[i, j] - mean[:, i] * mean[:, j] for i, j in pairs}
            rho = {(i, j): cov[i, j] / np.sqrt(cov[i, i] * cov[j, j]) for i, j in pairs}
            if len(columns) == 2:
                return np.asarray(rho[0, 1])
            left = (1 - rho[0, 2] ** 2) * (1 - rho[1, 2] ** 2)
            return np.where(left > 1e-12, (rho[0, 1] - rho[0, 2] * rho[1, 2]) / np.sqrt(left), np.nan)

    return _bootstrap_sums(sums, statistic, len(place), seed)


# ---- intervals ---------------------------------------------------------------------------------------------


def clustered_bootstrap(
    statistic: Callable[[Index], float], prompts: Prompts, count: int, *, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Any statistic of row indices, with a percentile interval over prompts drawn with replacement.

    `count` is the number of rows. The figures of this module use sums by prompt instead, which is faster.
    """
    place, groups = _places(prompts, count)
    rows = _rows_by_group(place, groups)
    rng = np.random.default_rng(seed)
    values = [
        statistic(np.concatenate([rows[g] for g in rng.integers(0, groups, groups)]))
        for _ in range(resamples)
    ]
    low, high = (float(v) for v in np.nanquantile(values, [0.025, 0.975]))
    return Estimate(float(statistic(np.arange(count))), low, high, count, groups)


def _bootstrap_sums(
    sums: Array, statistic: Callable[[Array], Array], count: int, seed: int, resamples: int = 1000
) -> Estimate | None:
    """`statistic` maps sums over prompts (R, S) to values (R,); sums (G, S) are each prompt's."""
    value = float(statistic(sums.sum(axis=0, keepdims=True))[0])
    if not np.isfinite(value):
        return None
    groups = len(sums)
    rng = np.random.default_rng(seed)
    values: list[Array] = []
    step = max(1, _AT_ONCE // groups)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, groups, (rows, groups)) + groups * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups)
        values.append(statistic(times.astype(np.float64) @ sums))
    low, high = (float(v) for v in np.nanquantile(np.concatenate(values), [0.025, 0.975]))
    return Estimate(value, low, high, count, groups)


# ---- best of n ---------------------------------------------------------------------------------------------


def best_of_n(proxy: ArrayLike, gold: ArrayLike, sizes: Sequence[int]) -> Array:
    """Expected gold reward of the best of n by proxy, for each n of `sizes`, from one prompt's N ≥ n samples.

    Ê_n = Σ_{i=n}^N C(i−1, n−1)/C(N, n)·gold_(i), sorted by proxy: the mean over all subsets of n, unbiased.
    Where proxies tie, each of those tied is as likely: their gold is averaged first. Keep N ≥ 4n.
    """
    by, value = _vector(proxy), _vector(gold)
    total = len(by)
    assert len(value) == total
    if not all(1 <= n <= total for n in sizes):
        raise ValueError(f"best of n for n in {list(sizes)} needs 1 ≤ n ≤ {total}, the number of samples")
    _, level = np.unique(by, return_inverse=True)
    averaged = (np.bincount(level, value) / np.bincount(level))[level][np.argsort(by, kind="stable")]
    result = []
    for n in sizes:
        # weight_i = C(i−1, n−1)/C(N, n), from weight_N = n/N downwards: w_{i−1} = w_i·(i − n)/(i − 1).
        i = np.arange(total, 1, -1, dtype=np.float64)
        weights = n / total * np.concatenate([[1.0], np.cumprod(np.maximum(0.0, i - n) / (i - 1.0))])
        result.append(float(weights @ averaged[::-1]))
    return np.asarray(result)


def best_of_n_kl(n: int) -> float:
    """log n − (n − 1)/n: KL of the best of n from what it is drawn from, an upper bound where proxies tie."""
    return float(np.log(n) - (n - 1) / n)


# ---- shared ------------------------------------------------------------------------------------------------


def _vector(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    assert array.ndim == 1, "(N,)"
    if not np.isfinite(array).all():
        where = np.flatnonzero(~np.isfinite(array))[:5].tolist()
        raise ValueError(f"values that are not finite, at {where}: a reward model must score every response")
    return array


def _places(prompts: Prompts, count: int) -> tuple[Index, int]:
    """Each row's prompt as a number from 0, and how many prompts there are."""
    if prompts is None:
        return np.arange(count), count
    numbers: Mapping[Hashable, int]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    place = np.fromiter((numbers[prompt] for prompt in prompts), dtype=np.intp, count=len(prompts))
    assert len(place) == count, "a prompt for every row"
    return place, len(numbers)


def _centred(values: Array, place: Index, groups: int) -> Array:
    """Values (N,) less the mean of their group."""
    means = np.bincount(place, values, groups) / np.bincount(place, minlength=groups)
    return np.asarray(values - means[place], dtype=np.float64)


def _ranks_within(values: Array, place: Index) -> Array:
    """Ranks (N,) among the rows of the same group, ties sharing their mean, up to a constant a group."""
    order = np.lexsort((values, place))
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (np.diff(place[order]) != 0) | (np.diff(values[order]) != 0)
    run = np.cumsum(starts) - 1
    means = np.bincount(run, np.arange(len(order), dtype=np.float64)) / np.bincount(run)
    ranks = np.empty(len(order))
    ranks[order] = means[run]
    return ranks


def _rows_by_group(place: Index, groups: int) -> list[Index]:
    """The rows of each group."""
    order = np.argsort(place, kind="stable")
    return np.split(order, np.cumsum(np.bincount(place, minlength=groups))[:-1])

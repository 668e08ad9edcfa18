"""A line D(s) = a + b·s through measurements of several steps at several lags, with honest errors.

Pure functions of numbers (numpy and scipy.special only). Legend: n observations (step, lag) of N steps; p = 2
parameters, 1 where a single lag was seen; σ an observation's own standard error, τ the scatter beyond it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

Floats = npt.NDArray[np.float64]

_FEW_STEPS = 4.0  # degrees of freedom below which scatter is also taken as independent between lags


@dataclass(frozen=True, slots=True)
class DriftFit:
    """D(s) = a + b·s, a and b ≥ 0, as the last steps show it.

    With tokens of a single lag s₀ a line is not determined: `b` is nan and `b_se` infinite (and so are those
    of `a` unless s₀ = 0); `at(s₀)` is still known, and `upper` and `lower` say what a, b ≥ 0 leave possible
    elsewhere.
    """

    a: float
    b: float
    a_se: float
    b_se: float
    cov: tuple[tuple[float, float], tuple[float, float]]  # of (a, b), before the constraint a, b ≥ 0
    steps: int  # steps in the memory
    lags: tuple[int, ...]  # lags with tokens in it
    dof: float  # of the t distribution that the errors are read with
    scatter: float  # standard deviation of an observation beyond its own sampling error
    curvature: float  # coefficient of s² where it is added to the line; nan with fewer than three lags
    curvature_t: float  # that over its standard error: beyond about ±2 the line is a bad model
    level: float  # mean over the memory where a single lag was seen, else nan
    level_se: float

    @property
    def has_slope(self) -> bool:
        """Whether the drift a version is known."""
        return math.isfinite(self.b_se)

    def at(self, lag: float) -> float:
        """D(lag); nan where the data do not determine it."""
        if self.has_slope:
            return self.a + self.b * lag
        return self.level if lag == self.lags[0] else math.nan

    def se_at(self, lag: float) -> float:
        """Standard error of D(lag): √((1, s) Σ (1, s)ᵀ); infinite where D is not determined."""
        if self.has_slope:
            (aa, ab), (_, bb) = self.cov
            return math.sqrt(max(0.0, aa + 2 * lag * ab + lag * lag * bb))
        return self.level_se if lag == self.lags[0] else math.inf

    def quantile(self, sigmas: float) -> float:
        """The t quantile that leaves as much beyond it as `sigmas` of a normal distribution."""
        return float(stdtrit(self.dof, ndtr(sigmas)))

    def upper(self, lag: float, sigmas: float = 1.0) -> float:
        """Upper confidence bound of D(lag).

        With one lag s₀ known: D(s) ≤ D(s₀) for s ≤ s₀ as b ≥ 0, and D(s) ≤ D(s₀)·s/s₀ beyond as a ≥ 0.
        """
        if self.has_slope:
            return self.at(lag) + self.quantile(sigmas) * self.se_at(lag)
        seen, bound = self.lags[0], self.level + self.quantile(sigmas) * self.level_se
        if lag <= seen:
            return bound
        return bound * lag / seen if seen else math.inf

    def lower(self, lag: float, sigmas: float = 1.0) -> float:
        """Lower confidence bound of D(lag), at least 0; with one lag s₀ known the mirror of `upper`."""
        if self.has_slope:
            return max(0.0, self.at(lag) - self.quantile(sigmas) * self.se_at(lag))
        seen, bound = self.lags[0], max(0.0, self.level - self.quantile(sigmas) * self.level_se)
        return bound if lag >= seen else bound * lag / seen

    def largest_lag_within(self, limit: float, most: int, sigmas: float = 1.0) -> int:
        """Largest s in 0 … most with `upper` within `limit` up to s; −1 where not even s = 0 is."""
        lag = -1
        while lag < most and self.upper(lag + 1, sigmas) <= limit:
            lag += 1
        return lag


class _Common(TypedDict):
    steps: int
    lags: tuple[int, ...]
    dof: float
    scatter: float


def fit_line(rows: Sequence[tuple[int, int, float, float]], half_life: float) -> DriftFit:
    """Fit D(s) = a + b·s to rows of (step, lag, value, standard error).

    1. Scatter τ² of the observations beyond their own errors (Paule and Mandel): the τ² ≥ 0 at which
       Σ r²/(σ² + τ²) is its expectation n − p.
    2. Weighted least squares with w = fade / (σ² + τ²), fade = 2^(−age / half_life), under a, b ≥ 0.
    3. Covariance: a sandwich over whole steps, the independent units (the lags of one step share its luck),
       with leverages taken out (Bell and McCaffrey, "CR2"); in no direction less than what σ² alone implies,
       or σ² + τ² where the steps are too few for a sandwich.
    4. Errors are read with a t distribution: N_eff − p degrees of freedom, 1/N_eff = Σ h², h a step's share
       of the leverage, so that old or uninformative steps do not count as full ones.
    """
    steps, lags, values, errors = (np.asarray(column, dtype=np.float64) for column in zip(*rows, strict=True))
    scale = max(float(np.abs(values).max()), 1e-9)
    values, own = values / scale, _mended_errors(values / scale, errors / scale) ** 2
    seen = tuple(int(lag) for lag in np.unique(lags))
    unit = max(1.0, float(lags.max()))  # lags in units of the largest, so that no matrix is badly scaled
    powers = np.stack([np.ones_like(lags), lags / unit, (lags / unit) ** 2], axis=1)  # (n, 3)
    design = powers[:, : min(2, len(seen))]
    tau2 = _scatter(design, values, own)
    weights = 0.5 ** ((steps.max() - steps) / half_life) / (own + tau2)
    step_of = np.unique(steps, return_inverse=True)[1]
    free, cov, dof = _estimate(design, values, weights, own=own, tau2=tau2, step_of=step_of)
    common = _Common(steps=int(step_of.max()) + 1, lags=seen, dof=dof, scatter=scale * math.sqrt(tau2))
    if len(seen) == 1:
        return _level_only(seen[0], scale * float(free[0]), scale * math.sqrt(cov[0, 0]), common)
    a, b = _not_negative(float(free[0]), float(free[1]) / unit, lags, values, weights)
    cov = scale**2 * cov / np.array([[1, unit], [unit, unit**2]])
    curvature = curvature_t = math.nan
    if len(seen) > 2:
        bent, bent_cov, _ = _estimate(powers, values, weights, own=own, tau2=tau2, step_of=step_of)
        curvature, curvature_t = scale * float(bent[2]) / unit**2, float(bent[2] / math.sqrt(bent_cov[2, 2]))
    return DriftFit(
        a=scale * a,
        b=scale * b,
        a_se=math.sqrt(cov[0, 0]),
        b_se=math.sqrt(cov[1, 1]),
        cov=((float(cov[0, 0]), float(cov[0, 1])), (float(cov[1, 0]), float(cov[1, 1]))),
        curvature=curvature,
        curvature_t=curvature_t,
        level=math.nan,
        level_se=math.nan,
        **common,
    )


def _level_only(lag: int, level: float, se: float, common: _Common) -> DriftFit:
    """One lag seen: its level, and no slope. At lag 0 the level is a."""
    a, a_se = (level, se) if lag == 0 else (math.nan, math.inf)
    return DriftFit(
        a=a,
        b=math.nan,
        a_se=a_se,
        b_se=math.inf,
        cov=((a_se**2, math.nan), (math.nan, math.inf)),
        curvature=math.nan,
        curvature_t=math.nan,
        level=level,
        level_se=se,
        **common,
    )


def _mended_errors(values: Floats, errors: Floats) -> Floats:
    """Standard errors fit for weights, in units of the largest value: an unknown one counts as the value
    itself, and none is nearly 0 or ∞."""
    known = np.isfinite(errors) & (errors >= 0)
    return np.clip(np.where(known, errors, np.maximum(np.abs(values), 0.1)), 1e-3, 10)


def _solve(design: Floats, values: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """(XᵀWX)⁻¹ and the weighted least-squares estimate."""
    weighted = design.T * weights
    inverse = np.asarray(np.linalg.inv(weighted @ design), dtype=np.float64)
    return inverse, inverse @ (weighted @ values)


def _scatter(design: Floats, values: Floats, own: Floats) -> float:
    """τ² of Paule and Mandel. Q(τ²) is convex and falls, its slope is −Σ w² r²: Newton from 0 stays below."""
    target = len(values) - design.shape[1]
    tau2 = 0.0
    for _ in range(20 if target else 0):
        weights = 1 / (own + tau2)
        _, free = _solve(design, values, weights)
        squares = weights * (values - design @ free) ** 2
        excess = float(squares.sum()) - target
        if excess <= 0.01 * target:
            break
        tau2 += excess / float((weights * squares).sum())
    return tau2


def _estimate(
    design: Floats,
    values: Floats,
    weights: Floats,
    *,
    own: Floats,
    tau2: float,
    step_of: npt.NDArray[np.intp],
) -> tuple[Floats, Floats, float]:
    """Free estimate, its covariance and degrees of freedom.

    With M = (XᵀWX)⁻¹, A_g = X_gᵀ W_g X_g, B_g = M^½ A_g M^½ and q_g = X_gᵀ W_g e_g of each step g, the
    sandwich with (I − H_g)^(−½) e_g for the residuals of a step is M^½ (Σ z_g z_gᵀ) M^½, where
    z_g = (I − B_g)^(−½) M^½ q_g.
    """
    inverse, free = _solve(design, values, weights)
    root = _root(inverse)
    count, p = int(step_of.max()) + 1, design.shape[1]
    moments, scores = np.zeros((count, p, p)), np.zeros((count, p))
    np.add.at(moments, step_of, weights[:, None, None] * design[:, :, None] * design[:, None, :])
    np.add.at(scores, step_of, (weights * (values - design @ free))[:, None] * design)
    shares = root @ moments @ root  # (N, p, p): B_g
    leverage = np.trace(shares, axis1=1, axis2=2)
    dof = max(1.0, p**2 / float(leverage @ leverage) - p)
    left, turns = np.linalg.eigh(np.eye(p) - shares)
    # A direction that one step alone determines has no residual to judge it by: it adds nothing.
    stretch = np.where(left > 1e-6, 1 / np.sqrt(np.maximum(left, 1e-6)), 0.0)
    z = np.einsum("gij,gj,gkj,gk->gi", turns, stretch, turns, scores @ root)
    sandwich = root @ (z.T @ z) @ root
    variance = own + (tau2 if dof < _FEW_STEPS else 0.0)
    implied = inverse @ ((design.T * (weights**2 * variance)) @ design) @ inverse
    return free, _larger(implied, sandwich), dof


def _larger(first: Floats, second: Floats) -> Floats:
    """A covariance at least as large as both in every direction: R max(1, R⁻¹ second R⁻¹) R, R² = first."""
    root = _root(first)
    whitened = np.linalg.solve(root, np.linalg.solve(root, second).T)
    sizes, axes = np.linalg.eigh((whitened + whitened.T) / 2)
    result: Floats = root @ (axes * np.maximum(1.0, sizes)) @ axes.T @ root
    return result


def _root(matrix: Floats) -> Floats:
    """Symmetric root of a covariance, kept away from singular by 1e-12 of its largest eigenvalue."""
    sizes, axes = np.linalg.eigh((matrix + matrix.T) / 2)
    result: Floats = (axes * np.sqrt(np.maximum(sizes, 1e-12 * sizes[-1]))) @ axes.T
    return result


def _not_negative(a: float, b: float, lags: Floats, values: Floats, weights: Floats) -> tuple[float, float]:
    """The least-squares line under a, b ≥ 0: on the border that the free one crosses."""
    if b < 0:
        return max(0.0, float(weights @ values / weights.sum())), 0.0
    if a < 0:
        return 0.0, max(0.0, float((weights * lags) @ values / ((weights * lags) @ lags)))
    return a, b

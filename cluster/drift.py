"""How far the learner has moved from the samplers, by lag: D(s) = a + b·s with its uncertainty.

Each learner step gives one observation per lag s: the mean of e^ℓ − 1 − ℓ over its tokens of that lag, with
ℓ = log π_learner − log μ, an estimate of KL(μ‖π) in nats a token. *a* is what sampler and learner differ by
with the very same weights (engine mismatch), *b* what one version adds (drift). The same line is fitted to
χ² = 1/ESS − 1, from which the effective sample size at a lag follows.
"""

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.drift_fit import DriftFit, fit_line

__all__ = ["Drift", "DriftFit", "LagBin", "bins_from_row", "usable_bins"]

_MOST_KL = 100.0  # nats a token: whatever is beyond is as bad
_MOST_CHI2 = 1e4  # as if one token in ten thousand counted
_TOKENS_KEY = re.compile(r"mismatch/tokens_by_lag/(\d+)")


@dataclass(frozen=True, slots=True)
class LagBin:
    """One step's tokens at one lag."""

    lag: int
    tokens: float
    kl: float  # mean e^ℓ − 1 − ℓ, nats a token
    kl_se: float  # its standard error, clustered by sequence
    ess: float  # (Σw)² / (n Σw²) on raw weights w = e^ℓ


def bins_from_row(row: Mapping[str, float]) -> tuple[LagBin, ...]:
    """Read the `mismatch/*_by_lag/<s>` values of a metrics row, by lag; lags without tokens are left out."""
    bins = []
    for key, tokens in row.items():
        found = _TOKENS_KEY.fullmatch(key)
        if found is None or not _number(tokens) > 0:
            continue
        lag = found[1]
        kl, kl_se, ess = (
            _number(row.get(f"mismatch/{name}_by_lag/{lag}")) for name in ("kl", "kl_se", "ess")
        )
        bins.append(LagBin(int(lag), float(tokens), kl, kl_se, ess))
    return tuple(sorted(bins, key=lambda found: found.lag))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


class Drift:
    """A sliding memory of the last steps' bins, and the line through them.

    A step that is `age` steps old weighs 2^(−2·age/memory_steps) as much as the newest: half of it in the
    middle of the memory, a quarter at its end, nothing after.
    """

    def __init__(self, memory_steps: int = 16) -> None:
        if memory_steps < 2:
            raise ValueError(f"memory_steps must be at least 2, got {memory_steps}")
        self.memory_steps = memory_steps
        self.left_out = 0  # bins that were not finite numbers, so far
        self._steps: deque[tuple[int, tuple[LagBin, ...]]] = deque()
        self._fits: dict[str, DriftFit | None] = {}

    def add(self, step: int, bins: Sequence[LagBin]) -> None:
        """Take in one learner step; steps come in rising order. Bins whose KL is no number are left out."""
        if self._steps and step <= self._steps[-1][0]:
            raise ValueError(f"steps must rise: {step} came after {self._steps[-1][0]}")
        usable = usable_bins(bins)
        self.left_out += len(bins) - len(usable)
        if usable:
            self._steps.append((step, usable))
        while self._steps and self._steps[0][0] <= step - self.memory_steps:
            self._steps.popleft()
        self._fits.clear()

    def forget_before(self, step: int) -> None:
        """Drop what came before `step`: another regime has begun."""
        while self._steps and self._steps[0][0] < step:
            self._steps.popleft()
        self._fits.clear()

    def fit(self) -> DriftFit | None:
        """The line through KL by lag; None without data."""
        if "kl" not in self._fits:
            rows = [(step, b.lag, b.kl, b.kl_se) for step, bins in self._steps for b in bins]
            self._fits["kl"] = fit_line(rows, half_life=self.memory_steps / 2) if rows else None
        return self._fits["kl"]

    def fit_chi2(self) -> DriftFit | None:
        """The line through χ² = 1/ESS − 1 by lag, so that ESS(s) = 1 / (1 + χ²(s)); None without data.

        A bin's own error is taken as that of a sample variance of n tokens, χ²·√(2/n) with the mean χ² of the
        memory; what tokens of one sequence have in common shows in the scatter between steps.
        """
        if "chi2" not in self._fits:
            found = [(step, b) for step, bins in self._steps for b in bins if 0 < b.ess <= 1 + 1e-6]
            values = [min(max(0.0, 1 / b.ess - 1), _MOST_CHI2) for _, b in found]
            total = sum(b.tokens for _, b in found)
            mean = (
                sum(v * b.tokens for v, (_, b) in zip(values, found, strict=True)) / total if found else 0.0
            )
            rows = [
                (step, b.lag, value, mean * math.sqrt(2 / b.tokens))
                for value, (step, b) in zip(values, found, strict=True)
            ]
            self._fits["chi2"] = fit_line(rows, half_life=self.memory_steps / 2) if rows else None
        return self._fits["chi2"]

    def state(self) -> dict[str, object]:
        """All that `restore` needs, as JSON."""
        steps = [
            [step, [[b.lag, b.tokens, b.kl, _plain(b.kl_se), _plain(b.ess)] for b in bins]]
            for step, bins in self._steps
        ]
        return {"steps": steps, "left_out": self.left_out}

    def restore(self, state: Mapping[str, object]) -> None:
        """Take up the memory that `state` gave."""
        steps, left_out = state["steps"], state["left_out"]
        assert isinstance(steps, list)
        assert isinstance(left_out, int)
        self._steps = deque(
            (
                int(step),
                tuple(LagBin(int(b[0]), b[1], b[2], _number(b[3]), _number(b[4])) for b in bins),
            )
            for step, bins in steps
        )
        self.left_out = left_out
        self._fits.clear()


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def usable_bins(bins: Sequence[LagBin]) -> tuple[LagBin, ...]:
    """Those with tokens whose KL is a number. One beyond 100 nats a token, infinity too, counts as 100."""
    return tuple(
        replace(found, kl=min(max(found.kl, 0.0), _MOST_KL))
        for found in bins
        if found.lag >= 0 and 0 < found.tokens < math.inf and found.kl >= -1e-6  # nan compares false
    )

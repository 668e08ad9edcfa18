"""What the last steps have shown: times and waits, the lines of mismatch and ESS, and what they permit."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, stdtrit

from cluster.adaptive_records import CAUSES, WINDOW_CAUSES, AdaptiveSettings, StepMeasurement
from cluster.drift import Drift, DriftFit, usable_bins

HISTORY_STEPS = 256
_LONGEST_STEP = 1e9  # seconds: whatever is beyond is no measurement
_RECENT_STEPS = 3  # a lag counts as present if one of so many last steps had tokens of it
_RUN_STEPS = 3  # so many steps in a row well beyond the limit are no chance …
_RUN_MARGIN = 1.25  # … where well beyond is this much
_ESS_STEPS = 8

Inputs = dict[str, float | int | None]


@dataclass(frozen=True, slots=True)
class Seen:
    """What is kept of one step; nan where the step's value was no usable number."""

    step: int
    seconds: float
    mendable: float  # seconds that a larger window can save of the learner's wait
    ahead: float  # seconds of it that more groups under way can mend
    waited: float  # seconds of it for whatever cause
    ready_left: int
    top_lag: int  # largest lag with tokens; −1 if none was told
    top_kl_low: float  # mean e^ℓ − 1 − ℓ at that lag, less one standard error
    top_ess: float  # effective sample size at that lag
    ess: float

    @property
    def is_timed(self) -> bool:
        """Whether its times can be reasoned with."""
        return math.isfinite(self.seconds + self.waited)


def summarise(m: StepMeasurement) -> Seen:
    """Reduce a step to what is kept. A time that is no positive number becomes nan, never 0."""

    def wait(*causes: str) -> float:
        found = [m.wait_seconds.get(cause, 0.0) for cause in causes]
        return sum(found) if all(0 <= seconds <= _LONGEST_STEP for seconds in found) else math.nan

    # However far sampling runs ahead, a step takes at least as long as scoring is at work without a break.
    saturated = m.saturated_seconds if 0 <= m.saturated_seconds <= _LONGEST_STEP else 0.0
    top = max(usable_bins(m.bins), key=lambda found: found.lag, default=None)
    low = math.nan if top is None else top.kl - (top.kl_se if math.isfinite(top.kl_se) else top.kl)
    return Seen(
        step=m.step,
        seconds=m.step_seconds if 0 < m.step_seconds <= _LONGEST_STEP else math.nan,
        mendable=min(wait(*WINDOW_CAUSES), max(0.0, m.step_seconds - saturated)),
        ahead=wait("ahead"),
        waited=wait(*CAUSES),
        ready_left=max(0, m.ready_left),
        top_lag=-1 if top is None else top.lag,
        top_kl_low=low,
        top_ess=math.nan if top is None else top.ess,
        ess=m.ess if 0 <= m.ess <= 1 + 1e-6 else math.nan,
    )


def wait_share(steps: list[Seen]) -> float:
    """Share of these steps' time that the learner waited for a cause which a larger window can mend."""
    return math.fsum(s.mendable for s in steps) / math.fsum(s.seconds for s in steps)


class Evidence:
    """Memory of the last steps, and the questions that the rules put to it."""

    def __init__(self, settings: AdaptiveSettings, drift: Drift) -> None:
        self.settings = settings
        self.drift = drift
        self._seen: deque[Seen] = deque(maxlen=HISTORY_STEPS)

    def add(self, m: StepMeasurement) -> Seen:
        """Take in one step."""
        self.drift.add(m.step, m.bins)
        self._seen.append(summarise(m))
        return self._seen[-1]

    @property
    def last_step(self) -> int:
        """The newest step."""
        return self._seen[-1].step

    def timed_after(self, step: int, most: int = HISTORY_STEPS) -> list[Seen]:
        """The last steps after `step` whose times are known, oldest first."""
        found: list[Seen] = []
        for seen in reversed(self._seen):
            if seen.step <= step or len(found) == most:
                break
            if seen.is_timed:
                found.append(seen)
        return found[::-1]

    # ---- what mismatch permits --------------------------------------------------------------------------

    @property
    def kl(self) -> DriftFit | None:
        """The line of KL by lag."""
        return self.drift.fit()

    @property
    def chi2(self) -> DriftFit | None:
        """The line of 1/ESS − 1 by lag."""
        return self.drift.fit_chi2()

    @property
    def chi2_limit(self) -> float:
        """The χ² at which ESS is at its least."""
        return 1 / self.settings.min_ess - 1 if self.settings.min_ess > 0 else math.inf

    def safe_window(self) -> int | None:
        """S*: largest s ≤ S_max with D(s) and χ²(s) within their limits; −1 if none, None unmeasured."""
        kl, chi2, most = self.kl, self.chi2, self.settings.max_window
        if kl is None:
            return None
        by_ess = chi2.largest_lag_within(self.chi2_limit, most) if chi2 is not None else most
        return min(kl.largest_lag_within(self.settings.max_drift, most), by_ess)

    def permits(self, lag: int) -> bool:
        """Whether tokens of this lag may be expected to keep to the limits; False where nothing is measured.

        Upper bounds of one standard error count. While only lag 0 was seen the slope is unknown: lag 1 may
        then be explored if lag 0 is within the limits.
        """
        lines = [(self.kl, self.settings.max_drift)]
        if self.chi2 is not None:
            lines.append((self.chi2, self.chi2_limit))
        return all(line is not None and _permits(line, limit, lag) for line, limit in lines)

    def violation(self, window: int, settled_at: int, step: int) -> str | None:
        """Why what was measured at lags up to `window` is beyond a limit, or None until `settled_at`.

        One noisy step is no violation. These are: the lower bound (one standard error) of a line at the
        largest lag present, from at least three steps, and for χ² with three of the last eight steps below
        e_min at their own largest lag; three steps in a row beyond 1.25 D_max by their own
        standard errors, upon which older steps are forgotten; the mean ESS of steps after `settled_at`, three
        at least, beyond e_min by its standard error.
        """
        if step <= settled_at:
            return None
        recent = list(self._seen)[-_RECENT_STEPS:]
        top = min(window, max((seen.top_lag for seen in recent), default=-1))
        return self._line_violation(top) or self._run_violation(window) or self._ess_violation(settled_at)

    def _line_violation(self, top: int) -> str | None:
        limit = self.settings.max_drift
        kl, chi2 = self.kl, self.chi2
        if top < 0 or kl is None or kl.steps < _RUN_STEPS:
            return None
        if (low := kl.lower(top)) > limit:
            return f"D({top}) is at least {low:.3g} over {kl.steps} steps, beyond max_drift = {limit:g}"
        # A single weight can make a step's χ² huge, and the line with it: several steps must agree.
        steps = [seen.top_ess for seen in self._seen][-_ESS_STEPS:]
        if sum(ess < self.settings.min_ess for ess in steps) < _RUN_STEPS:
            return None
        if chi2 is not None and chi2.steps >= _RUN_STEPS and (low := chi2.lower(top)) > self.chi2_limit:
            return (
                f"the effective sample size at lag {top} is at most {1 / (1 + low):.3g} over {chi2.steps} "
                f"steps, below min_ess = {self.settings.min_ess:g}"
            )
        return None

    def _run_violation(self, window: int) -> str | None:
        run = list(self._seen)[-_RUN_STEPS:]
        limit = _RUN_MARGIN * self.settings.max_drift
        if len(run) < _RUN_STEPS or not all(0 <= s.top_lag <= window and s.top_kl_low > limit for s in run):
            return None
        self.drift.forget_before(run[0].step)
        return (
            f"mismatch at the largest lag was beyond {limit:.3g}, {_RUN_MARGIN} times max_drift, in each of "
            f"the last {_RUN_STEPS} steps"
        )

    def _ess_violation(self, settled_at: int) -> str | None:
        found = [s.ess for s in self._seen if s.step > settled_at and math.isfinite(s.ess)][-_ESS_STEPS:]
        if len(found) < _RUN_STEPS:
            return None
        error = float(np.std(found, ddof=1)) / math.sqrt(len(found))
        high = float(np.mean(found)) + float(stdtrit(len(found) - 1, ndtr(1.0))) * error
        if high >= self.settings.min_ess:
            return None
        return (
            f"the effective sample size was at most {high:.3g} over the last {len(found)} steps, below "
            f"min_ess = {self.settings.min_ess:g}"
        )

    # ---- for the log and for checkpoints ----------------------------------------------------------------

    def inputs(self, window: int) -> Inputs:
        """What the lines say at this window and the next, for a decision's line."""
        kl, chi2 = self.kl, self.chi2
        found: Inputs = {"max_drift": self.settings.max_drift, "min_ess": self.settings.min_ess}
        if kl is not None:
            found |= {
                "drift_a": kl.a,
                "drift_a_se": kl.a_se,
                "drift_b": kl.b,
                "drift_b_se": kl.b_se,
                "drift_steps": kl.steps,
                "drift_curvature_t": kl.curvature_t,
                "drift_at_window": kl.at(window),
                "drift_upper_next": kl.upper(window + 1),
            }
        if chi2 is not None:
            found |= {
                "ess_at_window": 1 / (1 + chi2.at(window)),
                "ess_lower_next": 1 / (1 + chi2.upper(window + 1)),
            }
        if self._seen:
            found |= {"top_lag": self._seen[-1].top_lag, "ess": self._seen[-1].ess}
        found["safe_window"] = self.safe_window()
        return plain(found)

    def state(self) -> dict[str, object]:
        """All that `restore` needs, as JSON."""
        return {"drift": self.drift.state(), "seen": [plain(asdict(seen)) for seen in self._seen]}

    def restore(self, state: Mapping[str, object]) -> None:
        """Take up what `state` gave."""
        drift, rows = state["drift"], state["seen"]
        assert isinstance(drift, dict)
        assert isinstance(rows, list)
        self.drift.restore(drift)
        self._seen.clear()
        for row in rows:
            values: dict[str, Any] = {key: math.nan if value is None else value for key, value in row.items()}
            self._seen.append(Seen(**values))


def _permits(line: DriftFit, limit: float, lag: int) -> bool:
    is_unexplored = not line.has_slope and line.lags == (0,) and lag == 1
    return line.upper(0 if is_unexplored else lag) <= limit


def plain(values: Mapping[str, float | int | None]) -> Inputs:
    """The same with None for what is not finite, as JSON has no nan."""
    return {key: value if value is None or math.isfinite(value) else None for key, value in values.items()}

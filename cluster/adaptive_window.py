"""The window's rule: up by one while that pays and mismatch permits it, halved where it does not.

A pure state machine: steps in, at most one change a step out. S is the window.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean

from cluster.adaptive_evidence import Evidence, Inputs, Seen, wait_share

_FEWEST_STEPS = 2  # measured steps for a decision where the case is clear
_RAISE_STEPS = 3  # measured steps, in each of which the learner waited, are enough for a raise
_HORIZON_STEPS = 8  # steps a mean is taken over; more in a large window, where waits come in bursts
_LEAST_GAIN = 0.02  # share of a step that a raise must save; over fewer steps proportionally more
_PATIENCE = 16  # steps before a raise that failed is tried again; doubles each time
_LONGEST_PATIENCE = 256
_REGIME_CHANGE = 0.25  # a step time that differs by so much from what it was: what did not pay may pay now


@dataclass(frozen=True, slots=True)
class Change:
    """A new value, and why."""

    new: int
    reason: str
    inputs: Inputs


@dataclass(frozen=True, slots=True)
class _Trial:
    """A raise whose gain is being measured."""

    old: int
    before: float  # mean seconds of a step before it
    share_before: float  # of them that the learner waited


@dataclass(frozen=True, slots=True)
class _Block:
    """A window that failed, and until when it is not tried again."""

    until: int
    failures: int
    seconds: float | None  # mean step when a raise to it did not pay; None where mismatch forbade it


class WindowRule:
    """Holds S and moves it."""

    def __init__(self, evidence: Evidence, window: int) -> None:
        self.window = window
        self._evidence = evidence
        self._settled_at: int | None = None  # steps after it ran under the present window alone
        self._trial: _Trial | None = None
        self._blocks: dict[int, _Block] = {}
        self._lowered_to: int | None = None  # last window that was lowered to for want of use …
        self._slack_failures = 0  # … and how often that proved wrong

    def decide(self, step: int, *, slack_allowed: bool) -> Change | None:
        """At most one change after `step`. `slack_allowed`: nothing else needs a window of this size."""
        if self._settled_at is None:
            self._settled_at = step + self.window  # until then the first groups fill the pipeline
        if self.window > 0:
            violated = self._evidence.violation(self.window, self._settled_at, step)
            if violated is not None:
                return self._halve(step, violated)
        measured = self._evidence.timed_after(self._settled_at)
        if self._trial is not None:
            change = self._judge(step, self._trial, measured)
            if change is not None or self._trial is not None:
                return change
        if (waiting := self._waiting(measured)) is not None:
            return self._raise(step, waiting, measured[-self._horizon :])
        return self._lower(step, measured) if slack_allowed else None

    # ---- up, and back ------------------------------------------------------------------------------------

    def _waiting(self, measured: list[Seen]) -> list[Seen] | None:
        """Steps that show that the learner waits: the last three each, or many on the mean, few by more."""
        tolerance = self._evidence.settings.wait_tolerance
        last = measured[-_RAISE_STEPS:]
        if len(last) == _RAISE_STEPS and all(wait_share([seen]) > tolerance for seen in last):
            return last
        many = measured[-self._horizon :]
        if len(many) < _FEWEST_STEPS:
            return None
        return many if wait_share(many) > tolerance * self._horizon / len(many) else None

    @property
    def _horizon(self) -> int:
        return max(_HORIZON_STEPS, 2 * (self.window + 1))

    def _raise(self, step: int, waiting: list[Seen], before: list[Seen]) -> Change | None:
        target = self.window + 1
        share, seconds = wait_share(waiting), fmean(seen.seconds for seen in before)
        if target > self._evidence.settings.max_window or self._is_blocked(target, step, seconds):
            return None
        if not self._evidence.permits(target):
            return None
        kl = self._evidence.kl
        assert kl is not None, "nothing is permitted that was not measured"
        if kl.has_slope or kl.lags[0] > 0:
            why = f"D({target}) is at most {kl.upper(target):.3g}, within max_drift"
        else:
            why = (
                f"a is at most {kl.upper(0):.3g}, within max_drift, but the drift a version is not known "
                "yet: one step, to measure it"
            )
        reason = (
            f"the learner waited {share:.0%} of the last {len(waiting)} steps for what a larger window can "
            f"mend, and {why}"
        )
        inputs = self._inputs(share, seconds)
        if self._lowered_to == self.window:
            self._slack_failures += 1
        self._lowered_to = None
        self._trial = _Trial(self.window, seconds, wait_share(before))
        self._move(target, step, settle=1)
        return Change(target, reason, inputs)

    def _judge(self, step: int, trial: _Trial, measured: list[Seen]) -> Change | None:
        """Keep a raise that paid (`_trial` becomes None), take back one that did not, or wait for more."""
        if len(measured) < _FEWEST_STEPS:
            return None
        seconds, share = fmean(s.seconds for s in measured), wait_share(measured)
        is_final = len(measured) >= self._horizon
        if 1 - seconds / trial.before >= _LEAST_GAIN * max(1.0, self._horizon / len(measured)):
            self._trial = None
            if self._is_about_pay(self.window):
                del self._blocks[self.window]
            return None
        if not is_final:
            return None
        if share > trial.share_before:
            self._trial = None  # a larger window cannot lengthen the wait: the work has changed, no verdict
            return None
        patience = self._block(self.window, step, seconds)
        reason = (
            f"the raise from {trial.old} to {self.window} did not pay: a step took {seconds:.3g} s, before "
            f"it {trial.before:.3g} s; not tried again for {patience} steps"
        )
        inputs = self._inputs(share, seconds) | {"step_seconds_before": trial.before}
        self._trial = None
        self._move(trial.old, step, settle=1)
        return Change(trial.old, reason, inputs)

    # ---- down --------------------------------------------------------------------------------------------

    def _halve(self, step: int, violated: str) -> Change:
        old, new = self.window, self.window // 2
        patience = self._block(old, step, None)
        inputs = self._evidence.inputs(old)
        self._trial = None
        self._lowered_to = None
        # Groups that were admitted under the old window are trained within so many steps.
        self._move(new, step, settle=old + 1)
        return Change(new, f"{violated}: halved, {old} not tried again for {patience} steps", inputs)

    def _lower(self, step: int, measured: list[Seen]) -> Change | None:
        """Give back a window that no token has used for a while: the bound becomes tighter at no cost."""
        needed = min(_LONGEST_PATIENCE, self._horizon << min(self._slack_failures, 10))
        quiet = measured[-needed:]
        if self.window == 0 or len(quiet) < needed:
            return None
        largest = max(s.top_lag for s in quiet)
        share = wait_share(quiet)
        if not 0 <= largest < self.window or share > self._evidence.settings.wait_tolerance:
            return None
        new = self.window - 1
        reason = (
            f"no token of the last {needed} steps had a lag above {largest}, and the learner did not wait"
        )
        inputs = self._inputs(share, fmean(s.seconds for s in quiet))
        self._lowered_to = new
        self._move(new, step, settle=1)
        return Change(new, reason, inputs)

    # ---- memory ------------------------------------------------------------------------------------------

    def _move(self, window: int, step: int, settle: int) -> None:
        self.window = window
        self._settled_at = step + settle

    def _block(self, window: int, step: int, seconds: float | None) -> int:
        """Do not try `window` again for a patience that doubles with each failure."""
        last = self._blocks.get(window)
        failures = 1
        if last is not None and step - last.until <= _patience(last.failures):
            failures = last.failures + 1  # long after the last failure it would be the first again
        patience = _patience(failures)
        self._blocks[window] = _Block(step + patience, failures, seconds)
        return patience

    def _is_blocked(self, window: int, step: int, seconds: float) -> bool:
        block = self._blocks.get(window)
        if block is None or step >= block.until:
            return False
        if block.seconds is not None and abs(seconds / block.seconds - 1) > _REGIME_CHANGE:
            del self._blocks[window]
            return False
        return True

    def _is_about_pay(self, window: int) -> bool:
        return window in self._blocks and self._blocks[window].seconds is not None

    def _inputs(self, share: float, seconds: float) -> Inputs:
        return self._evidence.inputs(self.window) | {
            "wait_share": share,
            "wait_tolerance": self._evidence.settings.wait_tolerance,
            "step_seconds": seconds,
        }

    def state(self) -> dict[str, object]:
        """All that `restore` needs, as JSON."""
        return {
            "window": self.window,
            "settled_at": self._settled_at,
            "trial": None if self._trial is None else asdict(self._trial),
            "blocks": [
                [window, b.until, b.failures, b.seconds] for window, b in sorted(self._blocks.items())
            ],
            "lowered_to": self._lowered_to,
            "slack_failures": self._slack_failures,
        }

    def restore(self, state: Mapping[str, object]) -> None:
        """Take up what `state` gave."""
        found = dict(state)
        trial, blocks = found["trial"], found["blocks"]
        self.window = as_int(found["window"])
        self._settled_at = None if found["settled_at"] is None else as_int(found["settled_at"])
        self._slack_failures = as_int(found["slack_failures"])
        self._lowered_to = None if found["lowered_to"] is None else as_int(found["lowered_to"])
        assert trial is None or isinstance(trial, dict)
        self._trial = None if trial is None else _Trial(**trial)
        assert isinstance(blocks, list)
        self._blocks = {int(window): _Block(*block) for window, *block in blocks}


def _patience(failures: int) -> int:
    return min(_LONGEST_PATIENCE, _PATIENCE << min(failures - 1, 10))


def as_int(value: object) -> int:
    """An integer out of a checkpoint."""
    assert isinstance(value, int), f"{value!r} in a checkpoint is no integer"
    return value

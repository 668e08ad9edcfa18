"""The adaptive rule: window, publish interval and groups under way follow what the steps show.

    step's waits, times, mismatch by lag ─► Evidence ─► window S ─► publish_every M ─► ahead ─► decisions

As fresh as possible, as off-policy as is safe: S grows only while the learner waits for it and D(s) and
ESS(s) permit it, and is halved where they do not; M grows only while loading weights costs the actors too
much; `ahead` is what keeps the learner fed, and no more. docs/adaptive.md has the formulas. No clock, no
randomness.

Legend: P groups a step; S window, the largest lag; M steps between two publishes.
"""

from collections import deque
from collections.abc import Mapping
from math import ceil
from statistics import fmean, median

from cluster.adaptive_evidence import Evidence, Inputs, Seen, plain
from cluster.adaptive_records import AdaptiveSettings, Decision, Setting, StepMeasurement
from cluster.adaptive_window import Change, WindowRule, as_int
from cluster.drift import Drift, DriftFit

__all__ = ["AdaptiveRule", "AdaptiveSettings", "Decision", "StepMeasurement"]

_SYNC_STEPS = 3  # publishes measured before M moves, and again after each move
_LONGEST_SYNC = 1e9  # seconds: whatever is beyond is no measurement
_SYNC_MEMORY = 16  # steps whose times count
_SYNC_MARGIN = 0.9  # M falls where the share at M − 1 would be below so much of the limit
_QUEUE_STEPS = 4  # steps in which groups must have stood ready before `ahead` falls
_MOST_DOUBLINGS = 4


class AdaptiveRule:
    """Feed it each finished step; it says which of its three settings changed, and why."""

    def __init__(
        self,
        settings: AdaptiveSettings,
        groups_per_step: int,
        *,
        window: int,
        publish_every: int = 1,
        ahead: int | None = None,
    ) -> None:
        """Start at these values; `ahead` is by default what the window admits, (S + 1)·P."""
        most_ahead = (window + 1) * groups_per_step
        ahead = most_ahead if ahead is None else ahead
        if groups_per_step < 1 or not 0 <= window <= settings.max_window:
            raise ValueError(
                f"need P ≥ 1 and 0 ≤ window ≤ max_window, got P = {groups_per_step}, window = {window}, "
                f"max_window = {settings.max_window}: lower window or raise max_window"
            )
        if not 1 <= publish_every <= window + 1:
            raise ValueError(
                f"publish_every = {publish_every} must lie between 1 and window + 1 = {window + 1}: actors "
                "with older weights could not sample for the next step"
            )
        if not groups_per_step <= ahead <= most_ahead:
            raise ValueError(
                f"ahead = {ahead} must lie between P = {groups_per_step} and (window + 1)·P = {most_ahead}"
            )
        self.groups_per_step = groups_per_step
        self.publish_every = publish_every
        self.ahead = ahead
        self._settings = settings
        self._evidence = Evidence(settings, Drift())
        self._window_rule = WindowRule(self._evidence, window)
        self._sync_seconds: deque[float] = deque(maxlen=8)  # of publishes since M last moved
        self._warm_at: int | None = None  # steps after it ran with a full pipeline
        self._ahead_settled_at = -1
        self._ahead_fell = False  # whether its last move was a fall …
        self._ahead_failures = 0  # … and how often a fall had to be undone

    @property
    def window(self) -> int:
        """S."""
        return self._window_rule.window

    @property
    def safe_window(self) -> int | None:
        """S*, the largest window that mismatch permits; −1 if not even 0, None if none is measured."""
        return self._evidence.safe_window()

    @property
    def fit(self) -> DriftFit | None:
        """D(s) as the last steps show it."""
        return self._evidence.kl

    def after_step(self, m: StepMeasurement) -> list[Decision]:
        """Take in one step, in rising order of steps; returns what it changed, in order."""
        seen = self._evidence.add(m)
        if self._warm_at is None:
            self._warm_at = m.step + self.window
        if m.published and 0 <= m.sync_seconds < _LONGEST_SYNC:
            self._sync_seconds.append(m.sync_seconds)
        old = self.window
        slack_allowed = self.ahead <= old * self.groups_per_step and self.publish_every <= old
        change = self._window_rule.decide(m.step, slack_allowed=slack_allowed)
        if change is not None:
            return [_decision(m.step, "window", old, change), *self._follow_window(m.step, old)]
        decisions = []
        if (change := self._publish_change()) is not None:
            decisions.append(_decision(m.step, "publish_every", self.publish_every, change))
            self._set_publish_every(change.new)
        if (change := self._ahead_change(seen)) is not None:
            decisions.append(_decision(m.step, "ahead", self.ahead, change))
            self._set_ahead(change.new, m.step)
        return decisions

    # ---- what goes with the window -----------------------------------------------------------------------

    def _follow_window(self, step: int, old: int) -> list[Decision]:
        """Keep M ≤ S + 1 and ahead ≤ (S + 1)·P; a larger window is to be filled by P more groups."""
        new, P = self.window, self.groups_per_step
        inputs: Inputs = {"window": new, "groups_per_step": P}
        decisions = []
        if self.publish_every > new + 1:
            change = Change(new + 1, f"actors must hold weights that a window of {new} admits", inputs)
            decisions.append(_decision(step, "publish_every", self.publish_every, change))
            self._set_publish_every(change.new)
        bound = (new + 1) * P
        ahead = min(bound, self.ahead + P) if new > old else min(bound, self.ahead)
        if ahead != self.ahead:
            change = Change(ahead, f"goes with the window, which admits (S + 1)·P = {bound} groups", inputs)
            decisions.append(_decision(step, "ahead", self.ahead, change))
            self._set_ahead(ahead, step)
        self._ahead_fell = False
        self._ahead_failures = 0
        return decisions

    # ---- publish interval --------------------------------------------------------------------------------

    def _publish_change(self) -> Change | None:
        """M up by one while the learner waits and loading takes too much of the actors' time, or down."""
        timed = self._evidence.timed_after(max(self._evidence.last_step - _SYNC_MEMORY, self._warm_at or 0))
        if len(self._sync_seconds) < _SYNC_STEPS or not timed:
            return None
        M, S, limit = self.publish_every, self.window, self._settings.sync_share
        sync, seconds = median(self._sync_seconds), fmean(s.seconds for s in timed)
        share = sync / (M * seconds)
        waited = fmean(s.waited for s in timed) / seconds
        inputs = self._evidence.inputs(S) | plain(
            {
                "sync_seconds": sync,
                "step_seconds": seconds,
                "sync_share": share,
                "learner_waited": waited,
                "sync_share_limit": limit,
                "window": S,
            }
        )
        if (
            share > limit
            and waited > self._settings.wait_tolerance
            and M <= S
            and self._evidence.permits(S + M)
        ):
            reason = (
                f"loading weights takes {share:.0%} of the actors' time, above sync_share = {limit:g}, the "
                f"learner waits {waited:.0%} of its own, and D({S} + {M}) keeps within max_drift"
            )
            return Change(M + 1, reason, inputs)
        if M > 1 and (next_share := sync / ((M - 1) * seconds)) < _SYNC_MARGIN * limit:
            reason = (
                f"loading weights would take {next_share:.0%} of the actors' time at an interval of {M - 1}, "
                f"below sync_share = {limit:g}"
            )
            return Change(M - 1, reason, inputs)
        return None

    def _set_publish_every(self, value: int) -> None:
        self.publish_every = value
        self._sync_seconds.clear()

    # ---- groups under way --------------------------------------------------------------------------------

    def _ahead_change(self, seen: Seen) -> Change | None:
        """Up by half a step's groups when the learner waited for it; down by what stood ready for no use."""
        P, S, tolerance = self.groups_per_step, self.window, self._settings.wait_tolerance
        bound = (S + 1) * P
        if not seen.is_timed or seen.step <= self._ahead_settled_at:
            return None
        share = seen.ahead / seen.seconds
        inputs: Inputs = {
            "window": S,
            "groups_per_step": P,
            "ready_left": seen.ready_left,
            "wait_share": share,
        }
        if share > tolerance and self.ahead < bound:
            new = min(bound, self.ahead + ceil(P / 2))
            if self._ahead_fell:
                self._ahead_failures = min(_MOST_DOUBLINGS, self._ahead_failures + 1)
            self._ahead_fell = False
            reason = (
                f"the learner waited {share:.0%} of the step, as no more than {self.ahead} groups may be "
                "under way"
            )
            return Change(new, reason, inputs)
        return self._ahead_fall(inputs)

    def _ahead_fall(self, inputs: Inputs) -> Change | None:
        P, S = self.groups_per_step, self.window
        least = min((S + 1) * P, P + P // 8)  # a few more than a step takes, for those that fail
        base = max(_QUEUE_STEPS, S + 2)
        quiet = self._evidence.timed_after(self._ahead_settled_at)
        if len(quiet) < base or self.ahead <= least:
            return None
        needed = base << self._ahead_failures
        # Where a whole step's groups stand ready the stages have changed, and old failures say nothing.
        standing = min(s.ready_left for s in quiet[-base:])
        if standing < P:
            if len(quiet) < needed:
                return None
            standing = min(s.ready_left for s in quiet[-needed:])
        if standing == 0:
            return None
        new = max(least, self.ahead - standing)
        steps = base if standing >= P else needed
        self._ahead_fell = True
        reason = (
            f"at least {standing} ready groups were left over after each of the last {steps} steps: sampled "
            "too early, they only grow stale"
        )
        return Change(new, reason, inputs | {"standing": standing})

    def _set_ahead(self, value: int, step: int) -> None:
        self.ahead = value
        self._ahead_settled_at = step + 1

    # ---- checkpoints -------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """All that `restore` needs, as JSON."""
        return {
            "publish_every": self.publish_every,
            "ahead": self.ahead,
            "window": self._window_rule.state(),
            "evidence": self._evidence.state(),
            "sync_seconds": list(self._sync_seconds),
            "warm_at": self._warm_at,
            "ahead_settled_at": self._ahead_settled_at,
            "ahead_fell": self._ahead_fell,
            "ahead_failures": self._ahead_failures,
        }

    def restore(self, state: Mapping[str, object]) -> None:
        """Take up what `state` gave: the rule then decides as if it had never stopped."""
        window, evidence, sync = state["window"], state["evidence"], state["sync_seconds"]
        assert isinstance(window, dict)
        assert isinstance(evidence, dict)
        assert isinstance(sync, list)
        self._window_rule.restore(window)
        self._evidence.restore(evidence)
        self.publish_every, self.ahead = as_int(state["publish_every"]), as_int(state["ahead"])
        self._sync_seconds = deque(sync, maxlen=8)
        self._warm_at = None if state["warm_at"] is None else as_int(state["warm_at"])
        self._ahead_settled_at = as_int(state["ahead_settled_at"])
        self._ahead_fell = bool(state["ahead_fell"])
        self._ahead_failures = as_int(state["ahead_failures"])


def _decision(step: int, setting: Setting, old: int, change: Change) -> Decision:
    return Decision(step, setting, old, change.new, change.reason, plain(change.inputs))

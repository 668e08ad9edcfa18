"""How measurement reaches the scheduler: the drift model always, the adaptive rule where it is switched on.

    learner's row ─► Drift: D(s) = a + b·s ─► metrics ─► AdaptiveRule ─► set_window, set_ahead, publish_every
                                                              └─► decisions.jsonl

With a fixed window nothing is changed, and the drift is measured all the same.
"""

import math
from collections.abc import Mapping
from typing import Any

from cluster.adaptive import AdaptiveRule, Decision, StepMeasurement
from cluster.drift import Drift, DriftFit, bins_from_row
from cluster.scheduler import Scheduler, SchedulerSettings


class Adaptation:
    """Watches every learner step; where `scheduler.window` is adaptive it also steers the scheduler."""

    def __init__(
        self,
        settings: SchedulerSettings,
        scheduler: Scheduler,
        *,
        groups_per_step: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`state` is what `state` gave when a checkpoint was saved."""
        self._scheduler = scheduler
        self._drift = Drift()  # where there is no rule, which keeps its own
        self._rule: AdaptiveRule | None = None
        self.publish_every = settings.publish_every
        if not settings.is_adaptive:
            if state and "drift" in state:
                self._drift.restore(state["drift"])
            return
        self._rule = AdaptiveRule(
            settings,
            groups_per_step,
            window=settings.first_window,
            publish_every=min(settings.publish_every, settings.first_window + 1),
        )
        if state and "rule" in state:
            self._rule.restore(state["rule"])
        self._apply(self._rule)

    def after_step(
        self,
        step: int,
        row: dict[str, float],
        *,
        step_seconds: float,
        wait_seconds: Mapping[str, float],
        sync_seconds: float,
        published: bool,
        ready_left: int,
        saturated_seconds: float = 0.0,
    ) -> list[Decision]:
        """Take in what a step measured, add the drift to its row, and give the decisions that it led to.

        Called between a step and the publication of its weights: a narrower window then never strands actors
        with weights that nothing may be admitted with.
        """
        bins = bins_from_row(row)
        if self._rule is None:
            self._drift.add(step, bins)
            row |= _drift_metrics(self._drift.fit())
            return []
        decisions = self._rule.after_step(
            StepMeasurement(
                step=step,
                step_seconds=step_seconds,
                wait_seconds=wait_seconds,
                sync_seconds=sync_seconds,
                published=published,
                ready_left=ready_left,
                saturated_seconds=saturated_seconds,
                bins=bins,
                ess=row.get("mismatch/ess", math.nan),
            )
        )
        self._apply(self._rule)
        row |= _drift_metrics(self._rule.fit)
        if self._rule.safe_window is not None:
            row["scheduler/safe_window"] = self._rule.safe_window
        return decisions

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the rule with all it has seen, or the drift alone."""
        return {"drift": self._drift.state()} if self._rule is None else {"rule": self._rule.state()}

    def _apply(self, rule: AdaptiveRule) -> None:
        self._scheduler.set_window(rule.window)
        self._scheduler.set_ahead(rule.ahead)
        self.publish_every = rule.publish_every


def _drift_metrics(fit: DriftFit | None) -> dict[str, float]:
    """The fit as metrics; what the data do not determine is left out."""
    if fit is None:
        return {}
    metrics = {
        "mismatch/engine": fit.a,
        "mismatch/engine_se": fit.a_se,
        "mismatch/drift": fit.b,
        "mismatch/drift_se": fit.b_se,
        "mismatch/drift_curvature_t": fit.curvature_t,
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}

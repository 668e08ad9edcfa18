"""The controller: moves groups of samples from prompts to gradients, and weights back.

    prompts ─► scheduler.admit ─► rollout actors ─► scoring actors ─► scheduler.complete
                    ▲               (vLLM, log μ,     (reward, log-probs      │
                    │                a version a       of the frozen          │ P groups ready,
                    │ room           token)            reference)             ▼ nobody's bound broken
              rollout actors ◄── publish weights ◄── learner step ◄──── scheduler.take
              load and prove them       ▲                  │
                                        └── adaptation: S, groups ahead, publish interval, by measurement

Who waits for whom. A rollout actor waits only for room in the window (`Sampling.pump` fills every free slot
whenever something changed). Scoring waits for sampled groups. The learner waits for P ready groups, and for a
slow one only where its bound would otherwise break. Weights of step k load while step k + 1 may already be
training; the next publish waits for them. With a window of 0 the same path is synchronous.

Held-out evaluation goes on beside all this, on the same actors. From the load of the weights that it measures
to its end none are published, unless the bound asks for newer ones (then the learner waits for its end): so
every actor holds that one version, and training goes on for the S + 1 steps that the window allows. The
checkpoint that a best evaluation needs is saved before the next step changes the weights; a checkpoint of
another step waits for the evaluation under way, so that what it says of evaluations is whole.

A crash of any task ends all of them (asyncio.TaskGroup) with that one cause.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from actors.records import Group, SyncProof, WeightUpdate
from cluster.accounts import (
    TakenGroup,
    Totals,
    WaitCause,
    lag_split,
    length_metrics,
    pace_metrics,
    reward_components,
    sync_metrics,
    wait_cause,
)
from cluster.adaptation import Adaptation
from cluster.adaptive import Decision
from cluster.config import JobConfig
from cluster.learner_group import LearnerGroup
from cluster.sampling import Sampling


class StalledError(RuntimeError):
    """Nothing is under way and nothing can start: a defect, reported instead of waiting for ever."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One learner step as the monitor gets it: a flat row, the groups it trained on, and their times."""

    step: int
    row: dict[str, float]
    groups: list[Group]
    trace: list[dict[str, Any]]


@dataclass(slots=True)
class Hooks:
    """What the controller tells the outside: called in its own task, in the order of steps.

    `on_evaluate` gets the version that all actors hold until it returns, and the seconds of training that
    made it; it runs beside later steps, but never twice at once, nor beside the checkpoint of another step.
    """

    on_step: Callable[[StepReport], None]
    on_checkpoint: Callable[[int], Awaitable[None]]
    on_evaluate: Callable[[int, float], Awaitable[None]]
    on_decision: Callable[[Decision], None]


@dataclass(slots=True)
class _Step:
    """A learner step on its way to its report; `moments` are seconds since the run began."""

    number: int
    taken: list[TakenGroup]
    waits: dict[WaitCause, float]
    moments: dict[str, float]
    row: dict[str, float] = field(default_factory=dict)
    evaluates: bool = False


@dataclass(slots=True)
class Controller:
    """Runs learner steps until the configured number is reached or a stop is asked for."""

    config: JobConfig
    sampling: Sampling
    learner: LearnerGroup
    adaptation: Adaptation
    hooks: Hooks
    totals: Totals
    stopping: bool = False
    evaluated: int = 0  # the last version of which an evaluation ended; those before training do not count
    _idle_reported: float = 0.0
    _tasks: asyncio.TaskGroup | None = None
    _syncing: "asyncio.Task[None] | None" = None
    _evaluation: "asyncio.Task[None] | None" = None
    _published: int = 0
    _load_seconds: float = 0.0
    _began: float = 0.0

    @property
    def running(self) -> bool:
        """Whether `run` has begun and not ended."""
        return self._tasks is not None

    @property
    def step(self) -> int:
        """Learner steps begun so far."""
        return self.sampling.scheduler.step

    def request_stop(self) -> None:
        """Finish the step that is running, then return from `run`."""
        self.stopping = self.sampling.stopping = True
        self.sampling.changed.set()

    async def run(self) -> None:
        """Train until done, on actors that are started, hold the learner's weights and are being served.

        An evaluation that is due for these weights and did not end before the run was resumed comes first.

        Raises the first cause of any failure, after cancelling everything else.
        """
        self._began = time.perf_counter() - self.totals.elapsed_s  # a resumed run's clock goes on
        self._published = self.step
        self.sampling.rollouts.reset_idle()
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            self.sampling.start(tasks, self._began)
            if self.step > self.evaluated and self._evaluates(self.step):
                self._evaluate_beside(self.step, self.totals.elapsed_s - self.totals.paused_s)
            await self._train()
            self.totals.elapsed_s = self._now()
            self.sampling.stop()
        self._tasks = None

    def _now(self) -> float:
        return time.perf_counter() - self._began

    # ---- training ------------------------------------------------------------------------------------------

    async def _train(self) -> None:
        """Consumes: ready groups. Waits for: P of them. Produces: weights. Unblocked by: `Sampling.pump`."""
        scheduler = self.sampling.scheduler
        last = self._now()
        while scheduler.step < self.config.run.steps and not self.stopping:
            began = self._now()
            waits = await self._until_ready()
            if self.stopping:
                break
            step = _Step(scheduler.step, self.sampling.take(), waits, {"wait_from_s": began})
            ready_left = scheduler.queued
            step.moments["train_from_s"] = self._now()
            step.row = await self.learner.step([one.group for one in step.taken], step.number)
            step.moments["train_to_s"] = self._now()
            self.sampling.finished_steps = step.number + 1
            # From one step's end to the next: what a step takes, publishing included.
            period, last = self._now() - last, self._now()
            saturated = min(period, self.sampling.scoring.saturated_lap())
            self._adapt(step, ready_left, period, saturated)
            await self._publish(step)
            self.totals.waited(step.waits)
            self.totals.train_s += self._now() - began
            # Neither is part of a pace that the window could mend.
            paused = await self._pause(step)
            last += step.waits[WaitCause.EVALUATION] + paused
            if paused:
                self.sampling.scoring.saturated_lap()
        await self._previous_sync()
        await self._previous_evaluation()
        if self._published < scheduler.step:  # stopped where none were due: the last evaluation needs them
            await self.load_everywhere(await self.learner.publish(scheduler.step))

    async def _until_ready(self) -> dict[WaitCause, float]:
        """Wait until the next step may start, or a stop was asked for; gives the seconds waited by cause."""
        scheduler, waits = self.sampling.scheduler, dict.fromkeys(WaitCause, 0.0)
        while not scheduler.ready() and not self.stopping:
            loading = self._syncing is not None and not self._syncing.done()
            idle = scheduler.in_flight == 0 and not loading and not self._evaluating
            if idle and self.sampling.rollouts.actors:
                raise StalledError(
                    f"step {scheduler.step} has {scheduler.queued} of the {self.config.groups_per_step} "
                    f"groups it needs, and none is being sampled: {self.sampling.refusal.value}"
                )
            enough = scheduler.queued >= self.config.groups_per_step
            cause = wait_cause(enough_ready=enough, refusal=self.sampling.refusal)
            since = self._now()
            await self.sampling.change(f"groups for step {scheduler.step}")
            waits[cause] += self._now() - since
        return waits

    def _adapt(self, step: _Step, ready_left: int, period: float, saturated: float) -> None:
        """Let measurement set the window, the groups ahead and the publish interval, and say what it did."""
        step.row["perf/scoring_saturated_fraction"] = saturated / period
        with self.sampling.deciding:
            decisions = self.adaptation.after_step(
                step.number + 1,
                step.row,
                step_seconds=period,
                wait_seconds={cause.value: seconds for cause, seconds in step.waits.items()},
                sync_seconds=self._load_seconds,
                published=self._published == step.number,
                ready_left=ready_left,
                saturated_seconds=saturated,
            )
        for decision in decisions:
            self.hooks.on_decision(decision)
        self.sampling.pump()

    async def _publish(self, step: _Step) -> None:
        """Send the weights out if they are due, once the last ones are proved; then the step is reported.

        While an evaluation measures the last ones, none are due before the bound asks for them.
        """
        update: WeightUpdate | None = None
        version = step.number + 1
        if self._saves(version):
            await self._previous_evaluation(step)
        every = self.config.run.steps if self._evaluating else self.adaptation.publish_every
        due = self.sampling.scheduler.publish_due(self._published, every)
        if due or self.stopping or self._evaluates(version):
            await self._previous_sync(step)
            await self._previous_evaluation(step)
            step.moments["publish_from_s"] = self._now()
            update = await self.learner.publish(version)
            step.moments["publish_to_s"] = self._now()
            self._published = version
        step.evaluates = self._evaluates(version)  # asked again: the last evaluation may have ended the run
        if step.evaluates and self.config.run.evaluate_pauses:
            # What is in flight comes back first, on the clock, so that sampling gains nothing by the pause.
            await self.sampling.drain()
        self._complete(step)
        self._syncing = self._beside(self._sync_and_report(self._syncing, update, step))
        if step.evaluates:
            self._evaluate_beside(version, step.row["time/training_s"])

    def _beside(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Do this beside the training; whoever waits for a change hears of its end."""
        assert self._tasks is not None
        task = self._tasks.create_task(work)
        task.add_done_callback(lambda _: self.sampling.changed.set())
        return task

    def _saves(self, step: int) -> bool:
        every = self.config.run.checkpoint_every
        return bool(every) and step % every == 0

    async def _pause(self, step: _Step) -> float:
        """Save, where it is time to, before the next step; gives the seconds it took, which no step counts.

        What is evaluated is saved too: the checkpoint of a best evaluation holds the very weights.
        """
        version = step.number + 1
        if not self._saves(version) and not step.evaluates:
            return 0.0
        since = self.totals.elapsed_s = self._now()
        await self._previous_sync()
        await self.hooks.on_checkpoint(version)
        if self.sampling.paused:
            await self._previous_evaluation()
            self.sampling.resume()
        seconds = self._now() - since
        self.totals.paused_s += seconds
        return seconds

    # ---- evaluation ----------------------------------------------------------------------------------------

    @property
    def _evaluating(self) -> bool:
        return self._evaluation is not None and not self._evaluation.done()

    def _evaluates(self, step: int) -> bool:
        every = self.config.run.evaluate_every
        return bool(every) and step % every == 0 and step < self.config.run.steps and not self.stopping

    def _evaluate_beside(self, version: int, training_s: float) -> None:
        assert not self._evaluating, "the weights of one version at a time are held"
        self._evaluation = self._beside(self._evaluate(self._syncing, version, training_s))

    async def _evaluate(self, loading: "asyncio.Task[None] | None", version: int, training_s: float) -> None:
        """Consumes: held-out prompts. Waits for: every actor to hold `version`, then slots beside training.

        Produces: an evaluation. Unblocked by: the actors. Weights of later versions wait for its end.
        """
        if loading is not None:
            await loading
        await self.hooks.on_evaluate(version, training_s)
        self.evaluated = version
        self.pump()

    async def _previous_evaluation(self, step: _Step | None = None) -> None:
        """Wait for the end of the evaluation under way, on the step's account where there is one."""
        since = self._now()
        if self._evaluation is not None:
            await self._evaluation
        if step is not None:
            step.waits[WaitCause.EVALUATION] += self._now() - since

    # ---- weights -------------------------------------------------------------------------------------------

    async def _previous_sync(self, step: _Step | None = None) -> None:
        """Wait until every actor has proved the weights that were published last, on the step's account."""
        since = self._now()
        if self._syncing is not None:
            await self._syncing
        if step is not None:
            step.waits[WaitCause.SYNC] += self._now() - since

    async def _sync_and_report(
        self, previous: "asyncio.Task[None] | None", update: WeightUpdate | None, step: _Step
    ) -> None:
        """Have every actor load and prove the weights that a step left, if it published; report the step."""
        if previous is not None:
            await previous  # reports stand in the order of steps
        if update is not None:
            since = self._now()
            proofs = await self.load_everywhere(update)
            seconds = self._now() - since
            if proofs:  # none where every actor was lost: their successors load these weights
                self.totals.synced(proofs, seconds)
                step.row |= sync_metrics(proofs, seconds)
                # An actor stalls while it loads, not after.
                self._load_seconds = step.row["timing_s/sync_load"]
            step.moments["loaded_s"] = self._now()
        moments: dict[str, Any] = {"learner_step": step.number + 1} | step.moments
        trace = [*(one.trace for one in step.taken), moments]
        self.hooks.on_step(StepReport(step.number + 1, step.row, [one.group for one in step.taken], trace))

    async def load_everywhere(self, update: WeightUpdate) -> list[SyncProof]:
        """Give new weights to every rollout actor; each loads and proves them, side by side.

        An actor is given work as soon as it has the new weights, before the slowest one has.
        """
        return await self.sampling.rollouts.load_everywhere(update, self.pump)

    def pump(self) -> None:
        """Give work to whoever is free."""
        self.sampling.pump()

    # ---- the step's row ------------------------------------------------------------------------------------

    def _complete(self, step: _Step) -> None:
        """Add to a step's row what the controller measured, and the row to the totals."""
        scheduler, totals, row = self.sampling.scheduler, self.totals, step.row
        groups = [one.group for one in step.taken]
        totals.trained(groups, row)
        at = step.moments
        publish = at.get("publish_to_s", 0.0) - at.get("publish_from_s", 0.0)
        row |= pace_metrics(
            groups,
            step_s=self._now() - at["wait_from_s"],
            busy_s=at["train_to_s"] - at["train_from_s"] + publish,
            rollout_idle_s=self._rollout_idle_since_last_step(),
            waits=step.waits,
        )
        row |= {
            "timing_s/publish": publish,
            "timing_s/scheduler": self.sampling.deciding.lap(),
            "time/training_s": self._now() - self.totals.paused_s,
            "scheduler/window": scheduler.window,
            "scheduler/publish_every": self.adaptation.publish_every,
            **({} if scheduler.ahead is None else {"scheduler/ahead": scheduler.ahead}),
            "scheduler/in_flight": scheduler.in_flight,
            "scheduler/queued": scheduler.queued,
            "actors/rollout": len(self.sampling.rollouts.actors),
            "actors/lost": self.sampling.actors_lost,
            "reward_errors": totals.groups_dropped,
            "tokens_generated": totals.tokens_generated,
            "tokens_trained": totals.tokens_trained,
            "epoch": self.sampling.cursor.epoch,
            **lag_split(step.taken, step.number),
            **length_metrics(totals),
            **reward_components(groups),
            **self.sampling.dynamic.metrics(totals.groups_left_out),
        }

    def _rollout_idle_since_last_step(self) -> float:
        """Seconds in which an actor had nothing to do since the last report, mean over the present actors."""
        rollouts = self.sampling.rollouts
        idle = rollouts.idle_seconds()
        since, self._idle_reported = idle - self._idle_reported, idle
        return since / max(1, len(rollouts.actors))

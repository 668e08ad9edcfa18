"""The controller: moves groups of samples from prompts to gradients, and weights back.

    prompts ─► scheduler.admit ─► rollout actors ─► scoring actors ─► scheduler.complete
                    ▲               (vLLM, log μ,     (reward, log-probs      │
                    │                a version a       of the frozen          │ P groups ready,
                    │ room           token)            reference)             ▼ nobody's bound broken
              rollout actors ◄── publish weights ◄── learner step ◄──── scheduler.take
              load and prove them

Who waits for whom. A rollout actor waits only for room in the window (`_pump` fills every free slot whenever
something changed). Scoring waits for sampled groups. The learner waits for P ready groups, and for a slow one
only where its bound would otherwise break. Weights of step k load while step k + 1 may already be training;
the next publish waits for them. With a window of 0 the same path is synchronous.

A crash of any task ends all of them (asyncio.TaskGroup) with that one cause.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from actors.records import Group, Prompt, RewardFailure, SampleRequest, SyncProof, WeightUpdate
from actors.waits import within
from cluster.config import JobConfig
from cluster.data import PromptCursor
from cluster.learner_group import LearnerGroup
from cluster.remote import WorkerFailedError
from cluster.rollout_pool import RolloutActor, RolloutPool
from cluster.scheduler import Admission, Scheduler
from cluster.scoring_pool import BATCH_GROUPS, ScoringPool

_RECENT_GROUPS = 64  # over which the share of reward errors is watched


class StalledError(RuntimeError):
    """Nothing is under way and nothing can start: a defect, reported instead of waiting for ever."""


class RewardErrorsError(RuntimeError):
    """Too many groups in a row could not be scored: the reward is broken."""


@dataclass(slots=True)
class Totals:
    """What a run has done so far; saved with each checkpoint so that a resumed run goes on counting."""

    tokens_generated: int = 0
    tokens_trained: int = 0
    groups_dispatched: int = 0
    groups_trained: int = 0
    groups_dropped: int = 0
    lag_sum: float = 0.0
    lag_max: int = 0
    learner_wait_s: float = 0.0
    train_s: float = 0.0
    sync_s: float = 0.0
    syncs: int = 0
    sync_probe_max_abs_diff: float = 0.0
    padding_sum: float = 0.0
    steps: int = 0


@dataclass(frozen=True, slots=True)
class StepReport:
    """One learner step as the monitor gets it: a flat row, and the groups that were trained on."""

    step: int
    row: dict[str, float]
    groups: list[Group]


@dataclass(slots=True)
class Hooks:
    """What the controller tells the outside: called in its own task, in the order of steps."""

    on_step: Callable[[StepReport], None]
    on_reward_error: Callable[[RewardFailure], None]
    on_checkpoint: Callable[[int], Awaitable[None]]


def reward_components(groups: list[Group]) -> dict[str, float]:
    """Mean of every reward, and of every number it logs beside, over the samples that have it."""
    values: dict[str, list[float]] = {}
    for group in groups:
        for trajectory in group.trajectories:
            for label, value in trajectory.components.items():
                values.setdefault(f"reward/{label}", []).append(value)
    return {label: sum(found) / len(found) for label, found in values.items()}


@dataclass(slots=True)
class _Work:
    """A group under way."""

    prompt: Prompt
    attempts: int = 0
    failed_on: set[str] = field(default_factory=set)
    scored: Group | None = None


@dataclass(slots=True)
class Controller:
    """Runs learner steps until the configured number is reached or a stop is asked for."""

    config: JobConfig
    scheduler: Scheduler
    cursor: PromptCursor
    rollouts: RolloutPool
    scoring: ScoringPool
    learner: LearnerGroup
    hooks: Hooks
    totals: Totals = field(default_factory=Totals)
    requeued: deque[Prompt] = field(default_factory=deque)
    stopping: bool = False
    _work: dict[int, _Work] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _recent_failures: deque[bool] = field(default_factory=lambda: deque(maxlen=_RECENT_GROUPS))
    _idle_reported: float = 0.0
    _tasks: asyncio.TaskGroup | None = None
    _group_tasks: "set[asyncio.Task[None]]" = field(default_factory=set)
    _syncing: "asyncio.Task[None] | None" = None

    @property
    def running(self) -> bool:
        """Whether `run` has begun and not ended."""
        return self._tasks is not None

    def request_stop(self) -> None:
        """Finish the step that is running, then return from `run`."""
        self.stopping = True
        self._changed.set()

    def pending_prompts(self) -> list[str]:
        """Ids of the prompts that were dispatched and are not trained yet, oldest first."""
        return [work.prompt.id for _, work in sorted(self._work.items())] + [p.id for p in self.requeued]

    async def run(self) -> None:
        """Train until done, on actors that are started, hold the learner's weights and are being served.

        Raises the first cause of any failure, after cancelling everything else.
        """
        for actor in self.rollouts.actors:
            actor.reset_idle()
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            self._pump()
            await self._train()
            for task in self._group_tasks:
                task.cancel()
        self._tasks = None

    # ---- sampling and scoring ------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Give work to every free slot that the scheduler admits. Called after whatever may make room."""
        refused: set[str] = set()
        while not self.stopping:
            free = [actor for actor in self.rollouts.by_load() if actor.remote.name not in refused]
            if not free:
                break
            admission = self.scheduler.admit(free[0].version)
            if not isinstance(admission, Admission):
                refused.add(free[0].remote.name)
                continue
            prompt = self.requeued.popleft() if self.requeued else self.cursor.next()
            self._work[admission.group_id] = _Work(prompt)
            self.totals.groups_dispatched += 1
            self._dispatch(admission.group_id, free[0])
        self._changed.set()

    def _dispatch(self, group_id: int, actor: RolloutActor) -> None:
        assert self._tasks is not None
        task = self._tasks.create_task(self._sample_and_score(group_id, actor))
        self._group_tasks.add(task)
        task.add_done_callback(self._group_tasks.discard)

    async def _sample_and_score(self, group_id: int, actor: RolloutActor) -> None:
        """The life of one group. Consumes: an admission. Waits for: its actors. Produces: a ready group.

        A sample that its actor failed to give is asked for again, up to `rollout.max_attempts` times.
        """
        work = self._work[group_id]
        work.attempts += 1
        try:
            sampled = await self.rollouts.sample(actor, self._request(group_id, work.prompt))
        except WorkerFailedError:
            if work.attempts >= self.config.rollout.max_attempts:
                raise
            work.failed_on.add(actor.remote.name)
            await self._redispatch(group_id)
            return
        self.totals.tokens_generated += sum(len(c.token_ids) for c in sampled.completions)
        scored = await self.scoring.score(sampled)
        if isinstance(scored, RewardFailure):
            self._leave_out(group_id, scored)
        else:
            work.scored = scored
            self.scheduler.complete(group_id, scored.oldest_version)
            self._recent_failures.append(False)
        self._pump()

    async def _redispatch(self, group_id: int) -> None:
        """Sample a lost group again, on an actor whose weights are new enough, another one if possible."""
        failed_on = self._work[group_id].failed_on
        while True:
            for actor in sorted(self.rollouts.by_load(), key=lambda actor: actor.remote.name in failed_on):
                if self.scheduler.redispatch(group_id, actor.version):
                    self._dispatch(group_id, actor)
                    return
            await self._change(f"an actor that can sample group {group_id} again")

    def _request(self, group_id: int, prompt: Prompt) -> SampleRequest:
        rollout = self.config.rollout
        return SampleRequest(
            group_id, prompt, rollout.group_size, rollout.max_new_tokens, rollout.temperature
        )

    def _leave_out(self, group_id: int, failure: RewardFailure) -> None:
        """Count and log a group that could not be scored; another one takes its place."""
        del self._work[group_id]
        self.scheduler.drop(group_id)
        self.totals.groups_dropped += 1
        self.hooks.on_reward_error(failure)
        recent = self._recent_failures
        recent.append(True)
        share = sum(recent) / _RECENT_GROUPS
        if share >= self.config.scoring.max_error_fraction:
            raise RewardErrorsError(
                f"{sum(recent)} of the last {len(recent)} groups had a reward error, which reaches "
                f"scoring.max_error_fraction = {self.config.scoring.max_error_fraction} of {_RECENT_GROUPS}. "
                f"The last one, reward {failure.reward!r} on prompt {failure.prompt_id}: {failure.reason}"
            )

    # ---- training ------------------------------------------------------------------------------------------

    async def _train(self) -> None:
        """Consumes: ready groups. Waits for: P of them. Produces: weights. Unblocked by: `_pump`."""
        assert self._tasks is not None
        while self.scheduler.step < self.config.run.steps and not self.stopping:
            started = time.perf_counter()
            await self._until_ready()
            if self.stopping:
                break
            waited = time.perf_counter() - started
            step = self.scheduler.step
            groups = [self._take(group_id) for group_id in self.scheduler.take()]
            self._pump()
            row = await self.learner.step(groups, step)
            row |= {"wait/learner_s": waited, "timing_s/step": time.perf_counter() - started}
            await self._previous_sync()
            update = await self.learner.publish(step + 1)
            self._syncing = self._tasks.create_task(self._sync_and_report(update, row, groups))
            self._syncing.add_done_callback(lambda _: self._changed.set())
            every = self.config.run.checkpoint_every
            if every and (step + 1) % every == 0:
                await self._previous_sync()
                await self.hooks.on_checkpoint(step + 1)
            self.totals.train_s += time.perf_counter() - started
        await self._previous_sync()

    async def _previous_sync(self) -> None:
        """Wait until every actor has proved the weights that were published last."""
        if self._syncing is not None:
            await self._syncing

    def _take(self, group_id: int) -> Group:
        group = self._work.pop(group_id).scored
        assert group is not None, f"group {group_id} was taken before it was scored"
        return group

    async def _until_ready(self) -> None:
        """Wait until the next step may start, or a stop was asked for."""
        while not self.scheduler.ready() and not self.stopping:
            loading = self._syncing is not None and not self._syncing.done()
            if self.scheduler.in_flight == 0 and not loading:
                raise StalledError(
                    f"step {self.scheduler.step} has {self.scheduler.queued} of the "
                    f"{self.config.groups_per_step} groups it needs, and none is being sampled"
                )
            await self._change(f"groups for step {self.scheduler.step}")

    async def _change(self, what: str) -> None:
        """Wait until anything changes. Its deadline is beyond every actor's own, so theirs come first."""
        rollout, scoring = self.config.rollout, self.config.scoring
        seconds = rollout.generate_timeout_s + scoring.timeout_s * BATCH_GROUPS + self.config.sync.timeout_s
        under_way = ", ".join(map(str, sorted(self._work)[:8]))
        self._changed.clear()
        await within(
            self._changed.wait(), 120 + seconds, f"the rollout and scoring actors (groups {under_way})", what
        )

    async def _sync_and_report(
        self, update: WeightUpdate, row: dict[str, float], groups: list[Group]
    ) -> None:
        """Have every actor load and prove the weights that a step left, and report the step."""
        started = time.perf_counter()
        proofs = await self.load_everywhere(update)
        self._count(row, groups, proofs, time.perf_counter() - started)
        self.hooks.on_step(StepReport(update.version, row, groups))

    async def load_everywhere(self, update: WeightUpdate) -> list[SyncProof]:
        """Give new weights to every rollout actor; each loads and proves them, side by side.

        An actor is given work as soon as it has the new weights, before the slowest one has.
        """

        async def load(actor: RolloutActor) -> SyncProof:
            proof = await self.rollouts.load(actor, update)
            if self._tasks is not None:
                self._pump()
            return proof

        return await asyncio.gather(*(load(actor) for actor in self.rollouts.actors))

    def _count(
        self, row: dict[str, float], groups: list[Group], proofs: list[SyncProof], sync_seconds: float
    ) -> None:
        """Complete a step's row with what the controller measured, and add it to the totals."""
        totals = self.totals
        step_seconds = row["timing_s/step"]
        tokens = sum(len(t.completion.token_ids) for group in groups for t in group.trajectories)
        totals.steps += 1
        totals.tokens_trained += tokens
        totals.groups_trained += len(groups)
        totals.learner_wait_s += row["wait/learner_s"]
        totals.lag_sum += row["lag/mean"]
        totals.lag_max = max(totals.lag_max, int(row["lag/max"]))
        totals.padding_sum += row["perf/padding_fraction"]
        totals.sync_s += sync_seconds
        totals.syncs += 1
        probe = max(proof.probe_max_abs_diff for proof in proofs)
        totals.sync_probe_max_abs_diff = max(totals.sync_probe_max_abs_diff, probe)
        row |= {
            "timing_s/sync": sync_seconds,
            "timing_s/sync_load": max(proof.load_seconds for proof in proofs),
            "timing_s/sync_probe": max(proof.probe_seconds for proof in proofs),
            "timing_s/sample_mean": sum(g.sample_seconds for g in groups) / len(groups),
            "timing_s/score_mean": sum(g.score_seconds for g in groups) / len(groups),
            "sync/probe_max_abs_diff": probe,
            "perf/tokens_per_s": tokens / step_seconds,
            "scheduler/window": self.scheduler.window,
            "scheduler/in_flight": self.scheduler.in_flight,
            "scheduler/queued": self.scheduler.queued,
            "reward_errors": totals.groups_dropped,
            "tokens_generated": totals.tokens_generated,
            "tokens_trained": totals.tokens_trained,
            "epoch": self.cursor.epoch,
            "wait/rollout_s": self._rollout_idle_since_last_step(),
            **reward_components(groups),
        }
        row["perf/learner_wait_fraction"] = row["wait/learner_s"] / step_seconds
        row["perf/rollout_wait_fraction"] = row["wait/rollout_s"] / step_seconds

    def _rollout_idle_since_last_step(self) -> float:
        """Seconds in which an actor had nothing to do since the last report, mean over actors."""
        idle = self.rollouts.idle_seconds()
        since, self._idle_reported = idle - self._idle_reported, idle
        return since

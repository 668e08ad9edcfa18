"""The sampling side of a run: keeps free slots busy with groups that the scheduler admits, and scores them.

A group's life: admitted → dispatched to an actor → sampled → scored → ready → taken by a learner step. A
sample that its actor failed to give is asked for again; a group that cannot be scored, or of which dynamic
sampling says that it teaches nothing, is left out and counted, and another prompt takes its place.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from actors.records import Group, Prompt, RewardFailure, SampledGroup, SampleRequest
from actors.settings import BATCH_GROUPS
from actors.waits import within
from cluster.accounts import Stopwatch, TakenGroup, Totals
from cluster.config import JobConfig
from cluster.dispatch import next_dispatch
from cluster.dynamic_sampling import DynamicSampling
from cluster.prompt_cursor import PromptCursor
from cluster.remote import WorkerFailedError, WorkerLostError
from cluster.rollout_pool import RolloutActor, RolloutPool
from cluster.scheduler import Refusal, Scheduler
from cluster.scoring_pool import ScoringPool

_RECENT_GROUPS = 64  # over which the share of reward errors is watched


class RewardErrorsError(RuntimeError):
    """Too many groups in a row could not be scored: the reward is broken."""


@dataclass(slots=True)
class _Work:
    """A group under way; `times` are moments in seconds since the run began."""

    prompt: Prompt
    attempts: int = 0
    failed_on: set[str] = field(default_factory=set)
    scored: Group | None = None
    ready_step: int = 0
    times: dict[str, float] = field(default_factory=dict)
    slot_on: str = ""  # the actor on which it takes a slot


@dataclass(slots=True)
class Sampling:
    """Everything between a prompt and a ready group. `changed` is set when a step might have become ready."""

    config: JobConfig
    scheduler: Scheduler
    cursor: PromptCursor
    rollouts: RolloutPool
    scoring: ScoringPool
    totals: Totals
    on_reward_error: Callable[[RewardFailure], None]
    requeued: deque[Prompt] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    refusal: Refusal = Refusal.NO_SLOT
    stopping: bool = False
    paused: bool = False
    deciding: Stopwatch = field(default_factory=Stopwatch)  # what the scheduler itself costs
    _work: dict[int, _Work] = field(default_factory=dict)
    _recent_failures: deque[bool] = field(default_factory=lambda: deque(maxlen=_RECENT_GROUPS))
    _spawn: asyncio.TaskGroup | None = None
    _tasks: "set[asyncio.Task[None]]" = field(default_factory=set)
    _began: float = 0.0
    finished_steps: int = 0  # that the learner has taken; the controller counts them
    dynamic: DynamicSampling = field(init=False)

    def __post_init__(self) -> None:
        self.dynamic = DynamicSampling(self.config.rollout)
        self.scoring.hurry(lambda: self.scheduler.queued < self.config.groups_per_step)

    def start(self, tasks: asyncio.TaskGroup, began: float) -> None:
        """Begin to sample, in tasks of this group; `began` is the moment from which times count."""
        self._spawn, self._began = tasks, began
        self.finished_steps = self.scheduler.step
        self.pump()

    def stop(self) -> None:
        """Give up what is under way."""
        for task in self._tasks:
            task.cancel()
        self._spawn = None

    def pending_prompts(self) -> list[str]:
        """Ids of the prompts that were dispatched and are not trained yet, oldest first."""
        return [work.prompt.id for _, work in sorted(self._work.items())] + [p.id for p in self.requeued]

    @property
    def actors_lost(self) -> int:
        """Rollout and scoring actors that were lost so far."""
        return self.rollouts.lost + self.scoring.lost

    def under_way(self) -> str:
        """The first groups under way, for messages."""
        return ", ".join(map(str, sorted(self._work)[:8]))

    def pump(self) -> None:
        """Give work to every free slot that the scheduler admits. Called after whatever may make room."""
        while self._spawn is not None and not self.stopping and not self.paused:
            if self.rollouts.waiting:  # the next free slots are for held-out prompts
                self.refusal = Refusal.NO_SLOT
                break
            with self.deciding:
                answer = next_dispatch(self.scheduler, self.rollouts.slots)
            if isinstance(answer, Refusal):
                self.refusal = answer
                break
            admission, slot = answer
            prompt = self.requeued.popleft() if self.requeued else self.cursor.next()
            self._work[admission.group_id] = _Work(prompt, times={"dispatched_s": self._now()})
            self.totals.dispatched(len(prompt.token_ids))
            self._dispatch(admission.group_id, self.rollouts[slot.name])
        self.changed.set()

    async def drain(self) -> None:
        """Admit nothing more until `resume`, and wait for what is in flight (`run.evaluate_pauses`)."""
        self.paused = True
        while self.scheduler.in_flight and not self.stopping:
            await self.change("the groups in flight, before an evaluation")

    def resume(self) -> None:
        """Admit groups again."""
        self.paused = False
        self.pump()

    def take(self) -> list[TakenGroup]:
        """Take the groups of the scheduler's next step, and fill the room that they leave."""
        step = self.scheduler.step
        with self.deciding:
            group_ids = self.scheduler.take()
        taken = [self._taken(group_id, step) for group_id in group_ids]
        self.pump()
        return taken

    async def change(self, what: str) -> None:
        """Wait until anything changes. Its deadline is beyond every actor's own, so theirs come first."""
        rollout, scoring = self.config.rollout, self.config.scoring
        seconds = rollout.generate_timeout_s + scoring.timeout_s * BATCH_GROUPS + self.config.sync.timeout_s
        self.changed.clear()
        whom = f"the rollout and scoring actors (groups {self.under_way()})"
        await within(self.changed.wait(), 120 + seconds, whom, what)

    # ---- one group -----------------------------------------------------------------------------------------

    def _now(self) -> float:
        return time.perf_counter() - self._began

    def _dispatch(self, group_id: int, actor: RolloutActor) -> None:
        assert self._spawn is not None
        work = self._work[group_id]
        work.slot_on = actor.remote.name
        task = self._spawn.create_task(self._sample_and_score(group_id, actor))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._free_slot(work))  # also if it was cancelled before it began

    def _free_slot(self, work: _Work) -> None:
        name, work.slot_on = work.slot_on, ""
        if name:
            self.rollouts.free_slot(name)

    async def _sample_and_score(self, group_id: int, actor: RolloutActor) -> None:
        """The life of one group. Consumes: an admission. Waits for: its actors. Produces: a ready group.

        A sample that its actor failed to give, or took with it when it was lost, is asked for again, up to
        `rollout.max_attempts` times.
        """
        work = self._work[group_id]
        work.attempts += 1
        try:
            sampled = await self.rollouts.sample(actor, self._request(group_id, work.prompt))
        except (WorkerFailedError, WorkerLostError):
            self._free_slot(work)
            if work.attempts >= self.config.rollout.max_attempts:
                raise
            work.failed_on.add(actor.remote.name)
            await self._redispatch(group_id)
            return
        self._free_slot(work)
        work.times["sampled_s"] = self._now()
        self.totals.sampled(sampled)
        self.pump()
        await self._score(group_id, sampled)
        self.pump()

    async def _score(self, group_id: int, sampled: SampledGroup) -> None:
        work = self._work[group_id]
        scored = await self.scoring.score(sampled)
        if isinstance(scored, RewardFailure):
            self._leave_out(group_id, scored)
            return
        self._recent_failures.append(False)
        if not self.dynamic.keeps(scored):
            self.totals.groups_left_out += 1
            self._drop(group_id)
            return
        work.scored, work.ready_step = scored, self.finished_steps
        work.times["scored_s"] = self._now()
        with self.deciding:
            self.scheduler.complete(group_id, scored.oldest_version)

    async def _redispatch(self, group_id: int) -> None:
        """Sample a lost group again, on an actor whose weights are new enough, another one if possible."""
        failed_on = self._work[group_id].failed_on
        while True:
            for actor in sorted(self.rollouts.by_load(), key=lambda actor: actor.remote.name in failed_on):
                if self.scheduler.redispatch(group_id, actor.version):
                    self.rollouts.slots.begin(actor.remote.name)
                    self._dispatch(group_id, actor)
                    return
            await self.change(f"an actor that can sample group {group_id} again")

    def _request(self, group_id: int, prompt: Prompt) -> SampleRequest:
        rollout = self.config.rollout
        return SampleRequest(
            group_id, prompt, rollout.group_size, rollout.max_new_tokens, rollout.temperature
        )

    def _leave_out(self, group_id: int, failure: RewardFailure) -> None:
        """Count and log a group that could not be scored; another one takes its place."""
        self._drop(group_id)
        self.totals.groups_dropped += 1
        self.on_reward_error(failure)
        recent = self._recent_failures
        recent.append(True)
        share = sum(recent) / _RECENT_GROUPS
        if share >= self.config.scoring.max_error_fraction:
            raise RewardErrorsError(
                f"{sum(recent)} of the last {len(recent)} groups had a reward error, which reaches "
                f"scoring.max_error_fraction = {self.config.scoring.max_error_fraction} of {_RECENT_GROUPS}. "
                f"The last one, reward {failure.reward!r} on prompt {failure.prompt_id}: {failure.reason}"
            )

    def _drop(self, group_id: int) -> None:
        del self._work[group_id]
        self.scheduler.drop(group_id)

    def _taken(self, group_id: int, step: int) -> TakenGroup:
        work = self._work.pop(group_id)
        group = work.scored
        assert group is not None, f"group {group_id} was taken before it was scored"
        versions = [v for t in group.trajectories for v in t.completion.versions]
        trace: dict[str, Any] = {
            "learner_step": step + 1,
            "group": group_id,
            "prompt_id": group.prompt.id,
            "actor": group.actor,
            "attempts": work.attempts,
            **work.times,
            "taken_s": self._now(),
            "prompt_tokens": len(group.prompt.token_ids),
            "lengths": [len(t.completion.token_ids) for t in group.trajectories],
            "versions": [min(versions), max(versions)],
        }
        return TakenGroup(group, work.ready_step, trace)

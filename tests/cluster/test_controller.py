"""The controller's loops on stand-ins for the actors: order of calls, lag, retries, omissions, stopping."""

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from actors.records import (
    Completion,
    Group,
    Prompt,
    RewardFailure,
    SampledGroup,
    SyncProof,
    Trajectory,
    WeightUpdate,
)
from cluster.config_file import parse_config
from cluster.controller import Controller, Hooks, RewardErrorsError, StepReport
from cluster.prompt_cursor import PromptCursor
from cluster.remote import WorkerFailedError
from cluster.rollout_pool import RolloutPool
from cluster.scheduler import Scheduler
from cluster.scoring_pool import ScoringPool

JOB = """
[run]
steps = 12
batch_size = 4
checkpoint_every = 5
[model.scratch]
[task]
kind = "reversal"
[[reward]]
kind = "task"
[rollout]
group_size = 2
"""


class StandIn:
    """Plays every actor of a small world; `log` has the learner's and the rollout actors' calls in order."""

    def __init__(self, name: str, world: "World") -> None:
        self.name = name
        self.world = world
        self.version = 0

    async def call(self, method: str, *args: Any, seconds: float) -> Any:
        return await getattr(self, method)(*args)

    async def sample(self, request: Any) -> SampledGroup:
        started = self.version
        await asyncio.sleep(self.world.rng.paretovariate(1.2) * 0.0005)
        if self.name in self.world.broken:
            raise WorkerFailedError(f"{self.name} failed to sample: no luck")
        tokens = tuple(range(3))
        versions = (started, self.version, self.version)
        completions = (Completion(tokens, (-1.0,) * 3, versions, "abc", "stop"),) * request.group_size
        self.world.sampled_by[request.group_id] = self.name
        return SampledGroup(request.group_id, request.prompt, completions, self.name, 0.001)

    async def score(self, groups: list[SampledGroup]) -> list[Any]:
        await asyncio.sleep(0.0003)
        return [self._scored(group) for group in groups]

    def _scored(self, group: SampledGroup) -> Any:
        if group.prompt.id in self.world.unscorable:
            return RewardFailure(group.group_id, group.prompt.id, "gold", "raised")
        trajectories = tuple(Trajectory(c, 1.0, {"gold": 1.0}, c.logprobs) for c in group.completions)
        return Group(group.group_id, group.prompt, trajectories, group.actor, 0.001, 0.001)

    async def load_weights(self, update: WeightUpdate) -> SyncProof:
        await asyncio.sleep(self.world.rng.random() * 0.002)
        assert update.version > self.version
        self.version = update.version
        return SyncProof(self.name, update.version, 1e-6, 0.001, 0.001, 0)


class Learner:
    """Records what it is asked; fails if steps and publications are out of order."""

    def __init__(self, world: "World") -> None:
        self.world = world

    async def step(self, groups: list[Group], version: int) -> dict[str, float]:
        self.world.log.append(("step", version))
        lags = [version - v for g in groups for t in g.trajectories for v in t.completion.versions]
        await asyncio.sleep(0.001)
        self.world.trained += [group.prompt.id for group in groups]
        self.world.group_ids += [group.group_id for group in groups]
        return {"lag/mean": sum(lags) / len(lags), "lag/max": float(max(lags)), "perf/padding_fraction": 0.0}

    async def publish(self, version: int) -> WeightUpdate:
        self.world.log.append(("publish", version))
        await asyncio.sleep(0.0005)
        return WeightUpdate(version, {}, ((1, 2),), ((-1.0,),))


class World:
    """A controller with everything it needs; `reports` and `checkpoints` are what it told the outside."""

    def __init__(self, *overrides: str, actors: int = 2, window: int = 2, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.log: list[tuple[str, int]] = []
        self.trained: list[str] = []
        self.group_ids: list[int] = []
        self.sampled_by: dict[int, str] = {}
        self.broken: set[str] = set()
        self.unscorable: set[str] = set()
        self.reports: list[StepReport] = []
        self.failures: list[RewardFailure] = []
        self.checkpoints: list[tuple[int, list[str]]] = []
        config = parse_config(JOB, [f"scheduler.window={window}", *overrides])
        prompts = [Prompt(f"p{i}", (1, 2), "x") for i in range(400)]
        self.rollouts = RolloutPool(
            [StandIn(f"rollout-{i}", self) for i in range(actors)],  # type: ignore[misc]
            config.rollout,
            config.sync,
        )
        for actor in self.rollouts.actors:
            actor.version = 0
        self.scoring = ScoringPool([StandIn("scoring-0", self)], config.scoring)  # type: ignore[list-item]
        self.controller = Controller(
            config=config,
            scheduler=Scheduler(groups_per_step=2, window=window, total_steps=config.run.steps),
            cursor=PromptCursor(prompts, 0),
            rollouts=self.rollouts,
            scoring=self.scoring,
            learner=Learner(self),  # type: ignore[arg-type]
            hooks=Hooks(self._report, self.failures.append, self._checkpoint),
        )

    def _report(self, report: StepReport) -> None:
        self.reports.append(report)

    async def _checkpoint(self, step: int) -> None:
        self.checkpoints.append((step, self.controller.pending_prompts()))

    def run(self) -> None:
        async def all_of_it() -> None:
            serving = asyncio.create_task(self.scoring.run())
            try:
                await asyncio.wait_for(self.controller.run(), 20)
            finally:
                serving.cancel()

        asyncio.run(all_of_it())


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_publishes_before_the_next_and_lag_stays_in_the_window(window: int, seed: int) -> None:
    world = World(window=window, seed=seed)
    world.run()
    # step 0, publish 1, step 1, publish 2, …: weights of version k always hold exactly k steps.
    assert world.log == [entry for k in range(12) for entry in (("step", k), ("publish", k + 1))]
    assert [report.step for report in world.reports] == list(range(1, 13))
    assert max(report.row["lag/max"] for report in world.reports) <= window
    assert Counter(world.trained).most_common(1)[0][1] == 1
    assert len(world.trained) == 24
    totals = world.controller.totals
    assert (totals.groups_dispatched, totals.groups_trained, totals.groups_dropped) == (24, 24, 0)


def test_a_checkpoint_knows_every_prompt_that_is_under_way() -> None:
    world = World(window=3)
    world.run()
    order = PromptCursor([Prompt(f"p{i}", (1, 2), "x") for i in range(400)], 0)
    handed_out = {order.next().id for _ in range(24)}
    for step, pending in world.checkpoints:
        trained = world.trained[: 2 * step]
        assert not set(trained) & set(pending)
        assert set(trained) | set(pending) <= handed_out
    assert [step for step, _ in world.checkpoints] == [5, 10]


def test_a_failed_sample_is_drawn_again_on_another_actor() -> None:
    world = World(window=1)
    world.broken = {"rollout-0"}
    world.run()
    assert set(world.sampled_by.values()) == {"rollout-1"}
    assert len(world.trained) == 24


def test_a_sample_that_always_fails_ends_the_run_with_its_cause() -> None:
    world = World(window=1)
    world.broken = {"rollout-0", "rollout-1"}
    with pytest.raises(ExceptionGroup) as failed:
        world.run()
    assert failed.group_contains(WorkerFailedError, match="no luck")


def test_unscorable_groups_are_left_out_replaced_and_counted() -> None:
    world = World(window=1)
    world.unscorable = {f"p{i}" for i in range(0, 400, 5)}
    world.run()
    assert not world.unscorable & set(world.trained)
    assert len(world.trained) == 24
    assert world.controller.totals.groups_dropped == len(world.failures) > 0


def test_a_reward_that_never_works_stops_the_run() -> None:
    world = World(window=1)
    world.unscorable = {f"p{i}" for i in range(400)}
    with pytest.raises(ExceptionGroup) as failed:
        world.run()
    assert failed.group_contains(RewardErrorsError, match=r"'gold' on prompt p\d+: raised")
    assert world.trained == []


def test_a_stop_finishes_the_step_and_reports_it() -> None:
    world = World(window=2)
    report = world._report

    def stop_after_three(done: StepReport) -> None:
        report(done)
        if done.step == 3:
            world.controller.request_stop()

    world.controller.hooks.on_step = stop_after_three
    world.run()
    steps = [step for kind, step in world.log if kind == "step"]
    assert len(world.reports) == len(steps) < 12
    assert world.log[-1] == ("publish", steps[-1] + 1)
    assert len(world.trained) == 2 * len(steps)

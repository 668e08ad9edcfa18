"""Synchronous is a window of 0 on the one path: replayed rollouts give the same losses, bit for bit.

Controller, scheduler and learner (on DeepSpeed) are the real ones. The rollouts are recorded: what a
prompt was answered with is fixed, when its answer comes back is not.
"""

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from controller_helpers import build_controller, run_controller
from tiny_learner import in_one_rank, make_groups, make_job, save_model, weights_of

from actors.records import Group, Prompt, SampledGroup, SampleRequest, SyncProof, WeightUpdate
from cluster.config_file import parse_config
from cluster.controller import Hooks, StepReport
from learner.worker import LearnerWorker

pytestmark = pytest.mark.integration

JOB = """
[run]
steps = 5
batch_size = 9
checkpoint_every = 0
[model.scratch]
[task]
kind = "reversal"
[[reward]]
kind = "task"
[rollout]
group_size = 3
"""
LOSSES = ("loss/policy", "loss/value", "loss/total", "optimizer/grad_norm", "mismatch/kl", "kl/sequence")


class Recorded:
    """Rollout actor and scorer in one: the recorded answer, after a while, with the actor's own version."""

    def __init__(self, name: str, recording: dict[str, Group], rng: random.Random, delay: float) -> None:
        self.name = name
        self._recording = recording
        self._rng = rng
        self._delay = delay
        self._version = 0

    async def call(self, method: str, *args: Any, seconds: float) -> Any:
        return await getattr(self, method)(*args)

    async def sample(self, request: SampleRequest) -> SampledGroup:
        version = self._version
        await asyncio.sleep(self._rng.random() * self._delay)
        completions = tuple(
            replace(t.completion, versions=(version,) * len(t.completion.token_ids))
            for t in self._recording[request.prompt.id].trajectories
        )
        return SampledGroup(request.group_id, request.prompt, completions, self.name, 0.01)

    async def score(self, groups: list[SampledGroup]) -> list[Group]:
        await asyncio.sleep(self._rng.random() * self._delay / 4)
        return [self._scored(group) for group in groups]

    def _scored(self, group: SampledGroup) -> Group:
        recorded = self._recording[group.prompt.id].trajectories
        trajectories = tuple(
            replace(t, completion=completion)
            for t, completion in zip(recorded, group.completions, strict=True)
        )
        return Group(group.group_id, group.prompt, trajectories, group.actor, 0.01, 0.01)

    async def load_weights(self, update: WeightUpdate) -> SyncProof:
        await asyncio.sleep(self._rng.random() * self._delay / 4)
        self._version = update.version
        return SyncProof(self.name, update.version, 0.0, 0.0, 0.0, 0)


class InProcessLearner:
    """The real worker, called as the group of ranks is."""

    def __init__(self, worker: LearnerWorker) -> None:
        self._worker = worker

    async def step(self, groups: list[Group], version: int) -> dict[str, float]:
        return self._worker.step(groups, version)

    async def publish(self, version: int) -> WeightUpdate:
        return WeightUpdate(version, {}, ((1, 2),), ((-1.0,),))


def replay(
    path: str, recording: dict[str, Group], setting: str, *, actors: int, seed: int, delay: float
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Train on the recording; the rows of all steps and the weights at the end."""
    config = parse_config(JOB, [f"scheduler.{setting}", "scheduler.max_window=0"])
    rng = random.Random(seed)
    remotes: list[Any] = [Recorded(f"rollout-{i}", recording, rng, delay) for i in range(actors)]
    scorers: list[Any] = [Recorded(f"scoring-{i}", recording, rng, delay) for i in range(2)]
    reports: list[StepReport] = []

    def work(worker: LearnerWorker) -> dict[str, Any]:
        async def nothing(*_: Any) -> dict[str, float]:
            return {}

        controller = build_controller(
            config,
            rollouts=remotes,
            scorers=scorers,
            learner=InProcessLearner(worker),
            prompts=[group.prompt for group in recording.values()],
            hooks=Hooks(reports.append, nothing, nothing, lambda _: None),  # type: ignore[arg-type]
            on_reward_error=lambda failure: pytest.fail(str(failure)),
        )
        run_controller(controller, 60)
        return weights_of(worker)

    weights = in_one_rank(make_job(path, ppo={"minibatches": 3}), work)
    return [losses(report) for report in reports], weights


def losses(report: StepReport) -> dict[str, float]:
    return {name: report.row[name] for name in LOSSES} | {"lag/max": report.row["lag/max"]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("llama"))


def test_sync_and_async_at_window_0_give_the_same_losses(llama: str, tmp_path: Path) -> None:
    groups = make_groups(llama, groups=18, size=3, reference_shift=0.3, sampler_shift=0.05)
    recording = {
        f"p{i}": replace(group, prompt=Prompt(f"p{i}", group.prompt.token_ids, ""))
        for i, group in enumerate(groups)
    }
    one_by_one, weights = replay(llama, recording, "window=0", actors=1, seed=0, delay=0.0)
    assert len({row["loss/policy"] for row in one_by_one}) == 5  # five different batches
    for setting, actors, seed in (("window=0", 3, 1), ('window="adaptive"', 2, 2)):
        rows, other = replay(llama, recording, setting, actors=actors, seed=seed, delay=0.05)
        assert rows == one_by_one
        assert all(np.array_equal(weights[name], other[name]) for name in weights)
    # The comparison can fail: with a window of 2 which groups a step gets depends on when they come back.
    rows, _ = replay(llama, recording, "window=2", actors=3, seed=3, delay=0.2)
    assert rows != one_by_one
    assert max(row["lag/max"] for row in rows) > 0

"""What is saved for an evaluation holds the weights that were evaluated, while training goes on beside."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from controller_helpers import World
from safetensors.numpy import load_file
from tiny_learner import in_one_rank, make_job, save_model, weights_of

from actors.records import Group, WeightUpdate
from learner.worker import LearnerWorker

pytestmark = pytest.mark.integration


class RealLearner:
    """The real worker, called as the group of ranks is; keeps the weights that it published."""

    def __init__(self, world: World, worker: LearnerWorker) -> None:
        self.world = world
        self.worker = worker
        self.published: dict[int, dict[str, Any]] = {}

    async def step(self, groups: list[Group], version: int) -> dict[str, float]:
        self.world.log.append(("step", version))
        return self.worker.step(groups, version)

    async def publish(self, version: int) -> WeightUpdate:
        self.world.log.append(("publish", version))
        self.published[version] = weights_of(self.worker)
        return WeightUpdate(version, {}, ((1, 2),), ((-1.0,),))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in other)


def test_the_checkpoint_of_an_evaluation_holds_the_evaluated_weights(tmp_path: Path) -> None:
    world = World("run.evaluate_every=3", "run.steps=8", "run.checkpoint_every=0", window=2)
    world.sample_seconds = lambda _: 0.001
    world.reward = lambda _, sample: float(sample)  # so that every step moves the weights
    evaluate = world.controller.hooks.on_evaluate
    measured: list[int] = []

    def work(worker: LearnerWorker) -> None:
        learner = world.controller.learner = RealLearner(world, worker)  # type: ignore[assignment]

        async def save(step: int) -> None:
            worker.save(str(tmp_path / str(step)))

        async def compare(version: int, training_s: float) -> None:
            world.gate.clear()
            opens = asyncio.create_task(open_after(version + 1))
            await evaluate(version, training_s)
            await opens
            found = load_file(tmp_path / str(version) / "policy" / "model.safetensors")
            assert same(learner.published[version], found)
            assert not same(weights_of(worker), found)  # training has gone on: later weights would differ
            measured.append(version)

        async def open_after(step: int) -> None:
            while ("step", step) not in world.log:
                await asyncio.sleep(0.001)
            world.gate.set()

        world.controller.hooks.on_checkpoint = save
        world.controller.hooks.on_evaluate = compare
        world.run()

    in_one_rank(make_job(save_model(tmp_path / "llama"), ppo={"minibatches": 2}), work)
    assert measured == [3, 6]

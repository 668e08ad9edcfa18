"""Where the actors of a job go, on a real Ray cluster of three nodes of one machine. No engine is started."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.config import JobConfig
from cluster.config_file import parse_config
from cluster.joining import PlacementError
from cluster.workers import WorkerFactory
from learner.worker import LearnerJob

pytestmark = pytest.mark.integration

JOB = """
[model.scratch]
[task]
kind = "reversal"
[[reward]]
kind = "task"
[cluster]
address = "auto"
"""
ROLES = ("learner", "rollout", "scoring")


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, Any]]:
    """A node of 4 CPUs for each role, named by its resource; the driver is on the learner's."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4,
            "resources": {"headrace_learner": 1},
            "include_dashboard": False,
        },
    )
    made = {"learner": cluster.head_node}
    for role in ROLES[1:]:
        made[role] = cluster.add_node(num_cpus=4, resources={f"headrace_{role}": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    yield {role: node.node_id for role, node in made.items()}
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def factory(nodes: dict[str, Any]) -> Iterator[Callable[..., WorkerFactory]]:
    made: list[WorkerFactory] = []

    def make(*overrides: str) -> WorkerFactory:
        config: JobConfig = parse_config(JOB, ["cluster.start_timeout_s=3", *overrides])
        job = LearnerJob(
            model_path="/absent",
            model=config.model,
            learner=config.learner,
            optimizer=config.optimizer,
            ppo=config.ppo,
            correction=config.correction,
            warmup=config.warmup,
            temperature=1.0,
            seed=0,
            total_updates=1,
            max_length=16,
        )
        made.append(WorkerFactory(config, job, reference_path=Path("/absent"), cuda=False))
        return made[-1]

    yield make
    for one in made:
        one.release()


def node_of(remote: Any) -> str:
    """The node on which an actor lives; waits until it does."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = ray._private.state.actors(remote.handle._actor_id.hex())
        if found and found["State"] == "ALIVE":
            return str(found["Address"]["NodeID"])
        time.sleep(0.1)
    raise AssertionError(f"{remote.name} did not start: {found}")


def test_each_role_goes_to_the_hosts_that_have_its_resource(factory: Any, nodes: dict[str, Any]) -> None:
    workers = factory("rollout.actors=2")
    asyncio.run(workers.reserve())
    remotes = {
        "learner": [workers.learner(0)],
        "rollout": [workers.rollout(0), workers.rollout(1)],
        "scoring": [workers.scorer(0)],
    }
    try:
        for role, made in remotes.items():
            assert {node_of(remote) for remote in made} == {nodes[role]}
        assert [remote.name for remote in remotes["rollout"]] == ["rollout-0", "rollout-1"]
        # A successor takes the place of a killed one, and a third beyond the places goes to the same hosts.
        remotes["rollout"][0].kill()
        successor, third = workers.rollout(0), workers.rollout(2)
        remotes["rollout"] += [successor, third]
        assert (successor.name, successor.place, third.name) == ("rollout-0.2", 0, "rollout-2")
        assert node_of(successor) == node_of(third) == nodes["rollout"]
    finally:
        for made in remotes.values():
            for remote in made:
                remote.kill()


def test_what_cannot_be_placed_is_said_with_what_there_is(factory: Any) -> None:
    workers = factory("rollout.actors=5", "rollout.cores=1", "cluster.start_timeout_s=1")
    with pytest.raises(
        PlacementError, match=r"waited 1 s .* 5 rollout actors of 1 CPU, 0\.001 headrace_rollout"
    ) as e:
        asyncio.run(workers.reserve())
    assert "4 CPU, 1 headrace_rollout" in str(e.value)
    assert "rollout.cores" in str(e.value)


def test_ranks_that_must_be_on_hosts_of_their_own_need_so_many(factory: Any) -> None:
    workers = factory("learner.ranks=2", "learner.placement=strict_spread", "cluster.start_timeout_s=1")
    with pytest.raises(PlacementError, match="2 learner actors"):
        asyncio.run(workers.reserve())
    packed = factory("learner.ranks=2")
    asyncio.run(packed.reserve())


def test_room_for_one_more_is_told(factory: Any) -> None:
    workers = factory("rollout.actors=1", "rollout.cores=3")
    assert workers.has_room()
    asyncio.run(workers.reserve())
    deadline = time.monotonic() + 30
    while workers.has_room():  # the nodes report what is free after a moment
        assert time.monotonic() < deadline
        time.sleep(0.1)

"""What the learner's ranks are told about the way to the actors; the ranks are stand-ins."""

import asyncio
from typing import Any, cast

import pytest

from actors.settings import RolloutSettings, SyncSettings
from cluster.learner_group import LearnerGroup
from cluster.remote import Remote
from learner.settings import LearnerSettings
from learner.worker import LearnerFacts

FACTS = [LearnerFacts(rank, f"host-{rank}", "cpu", 10, "llama", False, 0, 0.1) for rank in range(2)]


class Rank:
    """Answers `start` with its facts and remembers what it was asked."""

    def __init__(self, facts: LearnerFacts) -> None:
        self.facts = facts
        self.calls: dict[str, tuple[Any, ...]] = {}

    async def call(self, method: str, *args: Any, seconds: float) -> Any:
        assert seconds > 0
        self.calls[method] = args
        return {"rendezvous": ("127.0.0.1", 1), "start": self.facts}.get(method)


@pytest.mark.parametrize(
    ("actor_hosts", "elastic", "remote"),
    [
        (["host-0", "host-0"], False, False),
        (["host-0", "host-1"], False, True),
        (["host-1"], False, True),  # the driver may sit there too: only rank 0's host counts
        (["host-0", "host-0"], True, True),  # an actor may yet come on another host
    ],
)
def test_actors_on_other_hosts_than_rank_0_are_remote(
    actor_hosts: list[str], elastic: bool, remote: bool
) -> None:
    ranks = [Rank(facts) for facts in FACTS]
    group = LearnerGroup(cast("list[Remote]", ranks), LearnerSettings())

    async def work() -> LearnerFacts:
        facts = await group.start()
        await group.open_publisher(
            [],
            RolloutSettings(),
            SyncSettings(),
            run_id="run",
            probe=[(1, 2)],
            cuda=False,
            actor_hosts=actor_hosts,
            colocated=False,
            elastic=elastic,
        )
        return facts

    assert asyncio.run(work()) == FACTS[0]
    for rank in ranks:
        assert rank.calls["open_publisher"] == ("shared", "run", [(1, 2)], {"remote_hosts": remote})

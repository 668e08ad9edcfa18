"""The learner ranks of a job that has nothing else: supervised fine-tuning, reward models."""

import asyncio
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.shipping import ShippedFolder
from actors.waits import DeadlineExceeded, within
from cluster.config import ClusterSettings
from cluster.joining import PlacementError
from cluster.placement import role_resource
from cluster.remote import Remote
from cluster.workers import stop_all
from learner.settings import LearnerSettings


class LearnerOnly(Protocol):
    """What the ranks ask of a job's configuration."""

    @property
    def learner(self) -> LearnerSettings: ...
    @property
    def cluster(self) -> ClusterSettings: ...


class LearnerRanks:
    """All ranks; what is collective is called on all of them, and rank 0 answers."""

    def __init__(self, settings: LearnerSettings, remotes: list[Remote], group: PlacementGroup) -> None:
        self._remotes = remotes
        self._group = group
        self._start_s = settings.start_timeout_s
        self._step_s = settings.step_timeout_s

    @classmethod
    async def gather(cls, config: LearnerOnly, worker: type, job: Any, *, cuda: bool) -> "LearnerRanks":
        """Reserve the places and make an actor `worker(rank, ranks, job)` in each.

        Raises PlacementError if the cluster makes no room for them.
        """
        learner, cluster = config.learner, config.cluster
        own = role_resource("learner")
        asked = {"CPU": learner.cores, **({"GPU": 1.0} if cuda else {}), **own}
        group = placement_group([asked] * learner.ranks, strategy=learner.placement.upper())
        seconds = cluster.start_timeout_s
        try:
            await within(_ready(group), seconds, "the cluster", "room for learner actors")
        except DeadlineExceeded as error:
            remove_placement_group(group)
            wanted = ", ".join(f"{amount:g} {name}" for name, amount in asked.items())
            raise PlacementError(
                f"waited {seconds:g} s for the cluster to make room for {learner.ranks} learner ranks "
                f"of {wanted}, which other jobs may hold. Lower learner.cores or learner.ranks, add hosts, "
                "or raise cluster.start_timeout_s"
            ) from error
        except BaseException:
            remove_placement_group(group)
            raise
        remotes = []
        for rank in range(learner.ranks):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            handle = (
                ray.remote(worker)
                .options(
                    num_cpus=learner.cores,
                    num_gpus=1.0 if cuda else 0.0,
                    resources=own,
                    max_restarts=0,
                    scheduling_strategy=place,
                )
                .remote(rank, learner.ranks, job)
            )
            remotes.append(Remote(f"learner-{rank}", handle, rank))
        return cls(learner, remotes, group)

    def __len__(self) -> int:
        return len(self._remotes)

    def everyone(self) -> list[Remote]:
        """The actors of all ranks."""
        return list(self._remotes)

    async def all(self, method: str, *args: Any, seconds: float | None = None) -> Any:
        """Call every rank at once and give rank 0's answer."""
        deadline = self._step_s if seconds is None else seconds
        answers = await asyncio.gather(*(r.call(method, *args, seconds=deadline) for r in self._remotes))
        return answers[0]

    async def one(self, rank: int, method: str, *args: Any) -> Any:
        """Call one rank."""
        return await self._remotes[rank].call(method, *args, seconds=self._step_s)

    async def each(self, method: str, parts: list[Any]) -> list[Any]:
        """Call the first ranks, one for each part, with their parts; all answers."""
        assert len(parts) <= len(self._remotes), "more parts than ranks"
        calls = (
            remote.call(method, part, seconds=self._step_s)
            for remote, part in zip(self._remotes, parts, strict=False)
        )
        return list(await asyncio.gather(*calls))

    async def start(self, model: ShippedFolder | None, marker: Path) -> Any:
        """Let the ranks meet; `model` is a folder to ship, where hosts need it.

        Raises ValueError if some rank does not see `marker`, a file in the run folder, into which it is to
        write.
        """
        if model is not None:
            await self.all("use_model", model, self._start_s, seconds=self._start_s + 30)
            for remote in self._remotes:
                if not await remote.call("sees", str(marker), seconds=self._start_s):
                    raise ValueError(
                        f"--run-dir {marker.parent}: {remote.name} runs on a host that does not see this "
                        "folder. Put it on a file system that the driver and all learner ranks share, or "
                        "give the driver's host, and no other, the resource headrace_learner "
                        "(docs/cluster.md)"
                    )
        address, port = await self._remotes[0].call("rendezvous", seconds=self._start_s)
        return await self.all("start", address, port, seconds=self._start_s)

    async def dismiss(self) -> None:
        """Stop every rank and give the places back."""
        await stop_all(self._remotes)
        remove_placement_group(self._group)


async def _ready(group: PlacementGroup) -> Any:
    return await group.ready()


def put(value: Any) -> Any:
    """Into Ray's object store, for all ranks to read."""
    return ray.put(value)

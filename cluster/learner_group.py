"""The learner's ranks as one: each call goes to all of them, since their collectives must match."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from actors.packing import Pair
from actors.records import Group, Prompt, WeightUpdate
from actors.rollout import load_timeout
from actors.settings import RolloutSettings, SyncSettings
from actors.shipping import ShippedFolder
from cluster.remote import Remote
from learner.publish import RolloutSyncClient, resolve_backend
from learner.settings import LearnerSettings
from learner.worker import LearnerFacts

_PROBE_TOKENS = 64  # of each probe sequence, at most


class LearnerGroup:
    """All data-parallel ranks of the learner; rank 0 answers for them."""

    def __init__(self, ranks: Sequence[Remote], settings: LearnerSettings) -> None:
        self._ranks = ranks
        self._settings = settings
        self._facts: LearnerFacts | None = None

    async def _all(self, method: str, *args: Any, seconds: float | None = None) -> Any:
        """Call every rank at once and give rank 0's answer."""
        deadline = self._settings.step_timeout_s if seconds is None else seconds
        answers = await asyncio.gather(*(r.call(method, *args, seconds=deadline) for r in self._ranks))
        return answers[0]

    async def use_models(self, policy: ShippedFolder, critic: ShippedFolder | None, marker: Path) -> None:
        """Before `start`: bring the models to the ranks' hosts.

        Raises ValueError if some rank does not see `marker`, a file in the run folder, into which it is to
        write checkpoints.
        """
        deadline = self._settings.start_timeout_s
        await self._all("use_models", policy, critic, deadline, seconds=deadline + 30)
        for rank in self._ranks:
            if not await rank.call("sees", str(marker), seconds=deadline):
                raise ValueError(
                    f"--run-dir {marker.parent}: {rank.name} runs on a host that does not see this folder. "
                    "Put it on a file system that the driver and all learner ranks share, or give the "
                    "driver's host, and no other, the resource headrace_learner (docs/cluster.md)"
                )

    async def start(self) -> LearnerFacts:
        """Load the model on every rank and let them meet; gives what rank 0 turned out to be."""
        deadline = self._settings.start_timeout_s
        address, port = await self._ranks[0].call("rendezvous", seconds=deadline)
        facts: LearnerFacts = await self._all("start", address, port, seconds=deadline)
        self._facts = facts
        return facts

    async def warm_up(self, batches: Sequence[Sequence[Pair]]) -> list[dict[str, float]]:
        """One supervised update a batch; a row of metrics for each."""
        rows: list[dict[str, float]] = await self._all("warmup_updates", ray.put(batches))
        return rows

    async def finish_warm_up(self, reference: Path) -> None:
        """Reset the optimizer for reinforcement learning and save the policy as the frozen reference."""
        await self._all("finish_warmup")
        await self._all("export", str(reference))

    async def restore(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        await self._all("restore", str(folder))

    async def open_publisher(
        self,
        rollouts: Sequence[Remote],
        rollout: RolloutSettings,
        sync: SyncSettings,
        *,
        run_id: str,
        probe: list[tuple[int, ...]],
        cuda: bool,
        actor_hosts: Sequence[str],
        colocated: bool,
        elastic: bool,
    ) -> None:
        """Open the way by which weights reach the rollout actors.

        `actor_hosts` are the `host_id`s of their engines: an actor on another host than the learner's rank 0
        gets the weights through Ray's object store. `colocated` says that both share a GPU, `elastic` that
        actors may yet come on other hosts.
        """
        assert self._facts is not None, "start comes first"
        backend = resolve_backend(sync, "cuda" if cuda else "cpu", colocated=colocated)
        transport: dict[str, Any] = {"remote_hosts": elastic or set(actor_hosts) != {self._facts.host_id}}
        if backend != "shared":  # not yet run on a GPU
            handles = {remote.name: remote.handle for remote in rollouts}
            transport |= {
                "client": RolloutSyncClient(handles, rollout.tensor_parallel, load_timeout(rollout, sync)),
                "engines": len(rollouts),
                "workers_per_engine": rollout.tensor_parallel,
            }
        await self._all("open_publisher", backend, run_id, probe, transport)

    async def publish(self, version: int) -> WeightUpdate:
        """Gather the weights and send them out as `version`."""
        update: WeightUpdate = await self._all("publish", version)
        return update

    async def step(self, groups: list[Group], version: int) -> dict[str, float]:
        """One learner step on all groups."""
        metrics: dict[str, float] = await self._all("step", ray.put(groups), version)
        return metrics

    async def save(self, folder: Path) -> None:
        """Write everything that `restore` needs into `folder`, which all ranks must see."""
        await self._all("save", str(folder))


def probe_sequences(prompts: Sequence[Prompt], end_token: int, count: int) -> list[tuple[int, ...]]:
    """The token sequences whose log-probabilities prove each weight sync: whole prompts and an end token."""
    return [(*prompt.token_ids[: _PROBE_TOKENS - 1], end_token) for prompt in prompts[:count]]

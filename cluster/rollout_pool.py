"""The rollout actors as the controller sees them: what each is doing, and with which weights."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.records import SampledGroup, SampleRequest, SyncProof, WeightUpdate
from actors.rollout import EngineFacts
from actors.settings import RolloutSettings, SyncSettings
from cluster.dispatch import ActorSlots, Dispatcher
from cluster.remote import Remote

_LIVENESS_EVERY_S = 10.0
_LIVENESS_DEADLINE_S = 60.0


@dataclass(slots=True)
class RolloutActor:
    """One actor: `slot` says how busy it is and which weights it was last proved to hold."""

    remote: Remote
    slot: ActorSlots
    idle_seconds: float = 0.0
    _sampling: int = 0
    _idle_since: float | None = field(default_factory=time.perf_counter)

    @property
    def version(self) -> int:
        """The weights that it was last proved to hold."""
        return self.slot.version

    def begin(self) -> None:
        """A group goes to the actor."""
        self._sampling += 1
        if self._idle_since is not None:
            self.idle_seconds += time.perf_counter() - self._idle_since
            self._idle_since = None

    def end(self) -> None:
        """A group came back, or was lost."""
        self._sampling -= 1
        if self._sampling == 0:
            self._idle_since = time.perf_counter()

    def idle_so_far(self) -> float:
        """Seconds without work since `reset_idle`, the present ones included."""
        return self.idle_seconds + (time.perf_counter() - self._idle_since if self._idle_since else 0.0)

    def reset_idle(self) -> None:
        """Count idle time from now on: before training there is nothing to do."""
        self.idle_seconds = 0.0
        self._idle_since = time.perf_counter() if self._sampling == 0 else None


class RolloutPool:
    """All rollout actors of a job."""

    def __init__(self, remotes: Sequence[Remote], rollout: RolloutSettings, sync: SyncSettings) -> None:
        self.slots = Dispatcher()
        for remote in remotes:
            self.slots.add(remote.name, capacity=rollout.max_groups_in_flight, version=-1)
        self.actors = [RolloutActor(remote, self.slots[remote.name]) for remote in remotes]
        self._by_name = {actor.remote.name: actor for actor in self.actors}
        self._rollout = rollout
        self._sync = sync

    async def start(self) -> list[EngineFacts]:
        """Start every engine, side by side."""
        deadline = self._rollout.start_timeout_s + 30  # the engine's own deadline comes first
        facts: list[EngineFacts] = await asyncio.gather(
            *(actor.remote.call("start", seconds=deadline) for actor in self.actors)
        )
        return facts

    def __getitem__(self, name: str) -> RolloutActor:
        return self._by_name[name]

    def by_load(self) -> list[RolloutActor]:
        """The actors with a free slot, least busy first."""
        free = [actor for actor in self.actors if actor.slot.in_flight < actor.slot.capacity]
        return sorted(free, key=lambda actor: actor.slot.in_flight)

    async def sample(self, actor: RolloutActor, request: SampleRequest) -> SampledGroup:
        """Have a group sampled, in a slot taken with `slots.begin`; raises what `Remote.call` raises."""
        actor.begin()
        try:
            # The engine keeps its own deadline and names the request; this one is for an actor that is stuck.
            seconds = self._rollout.generate_timeout_s + 30
            group: SampledGroup = await actor.remote.call("sample", request, seconds=seconds)
            return group
        finally:
            actor.end()

    async def load(self, actor: RolloutActor, update: WeightUpdate) -> SyncProof:
        """Have one actor load and prove new weights."""
        seconds = self._sync.timeout_s + 30
        if self._sync.in_flight == "wait":  # for requests that may take their full time
            seconds += self._rollout.generate_timeout_s
        proof: SyncProof = await actor.remote.call("load_weights", update, seconds=seconds)
        self.slots.set_version(actor.remote.name, proof.version)
        return proof

    async def watch(self) -> None:
        """Ask every actor whether it is alive, for ever; raises as soon as one is not."""
        while True:
            await asyncio.sleep(_LIVENESS_EVERY_S)
            await asyncio.gather(
                *(actor.remote.call("check", seconds=_LIVENESS_DEADLINE_S) for actor in self.actors)
            )

    def idle_seconds(self) -> float:
        """Seconds since `reset_idle` in which an actor had nothing to do, mean over actors."""
        return sum(actor.idle_so_far() for actor in self.actors) / len(self.actors)

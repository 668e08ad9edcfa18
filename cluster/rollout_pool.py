"""The rollout actors as the controller sees them: what each is doing, with which weights, and who is lost.

An actor whose process or host is gone leaves the pool at once (`lose`); what it was sampling is sampled again
by others. A new one is offered work after it has proved the newest weights (`enlist`).
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from actors.records import SampledGroup, SampleRequest, SyncProof, WeightUpdate
from actors.rollout import EngineFacts
from actors.settings import RolloutSettings, SyncSettings
from actors.shipping import ShippedFolder
from actors.waits import within
from cluster.dispatch import ActorSlots, Dispatcher
from cluster.remote import LossError, Remote, WorkerFailedError, WorkerLostError

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
    _since: float = field(default_factory=time.perf_counter)

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

    def present(self) -> float:
        """Seconds since `reset_idle`."""
        return time.perf_counter() - self._since

    def reset_idle(self) -> None:
        """Count idle time from now on: before training there is nothing to do."""
        self.idle_seconds = 0.0
        self._since = time.perf_counter()
        self._idle_since = self._since if self._sampling == 0 else None


class RolloutPool:
    """All rollout actors of a job; `actors` are those that have work, or could have."""

    def __init__(
        self,
        remotes: Sequence[Remote],
        rollout: RolloutSettings,
        sync: SyncSettings,
        *,
        on_loss: Callable[[Remote, WorkerLostError], None] | None = None,
        model: ShippedFolder | None = None,
    ) -> None:
        """`on_loss` is told of each loss and sees to a successor; without it a loss ends the run.

        `model` is what engines start with, where it must be brought to their hosts.
        """
        self.slots = Dispatcher()
        self.actors: list[RolloutActor] = []
        self._rollout = rollout
        self._sync = sync
        self._on_loss = on_loss
        self._model = model
        self._latest: WeightUpdate | None = None
        self._published = asyncio.Event()
        self._freed = asyncio.Event()
        self._gone_idle = self._gone_present = 0.0
        self.lost = 0
        self.waiting = 0  # requests that `sample_anywhere` has no slot for yet: the next free ones are theirs
        for remote in remotes:
            self._add(remote, version=-1)

    def _add(self, remote: Remote, version: int) -> RolloutActor:
        self.slots.add(remote.name, capacity=self._rollout.max_groups_in_flight, version=version)
        actor = RolloutActor(remote, self.slots[remote.name])
        self.actors.append(actor)
        self._freed.set()
        return actor

    async def start(self) -> list[EngineFacts]:
        """Start every engine, side by side."""
        facts: list[EngineFacts] = await asyncio.gather(
            *(self.start_engine(actor.remote) for actor in self.actors)
        )
        return facts

    async def start_engine(self, remote: Remote) -> EngineFacts:
        """Start one engine."""
        deadline = self._rollout.start_timeout_s + 30  # the engine's own deadline comes first
        if self._model is not None:
            await remote.call("use_model", self._model, seconds=deadline)
        facts: EngineFacts = await remote.call("start", seconds=deadline)
        return facts

    def __getitem__(self, name: str) -> RolloutActor:
        for actor in self.actors:
            if actor.remote.name == name:
                return actor
        raise KeyError(name)

    def by_load(self) -> list[RolloutActor]:
        """The actors with a free slot, least busy first."""
        free = [actor for actor in self.actors if actor.slot.in_flight < actor.slot.capacity]
        return sorted(free, key=lambda actor: actor.slot.in_flight)

    async def sample(self, actor: RolloutActor, request: SampleRequest) -> SampledGroup:
        """Have a group sampled, in a slot taken with `slots.begin`; raises what `Remote.call` raises.

        After a WorkerLostError the actor is in the pool no more.
        """
        actor.begin()
        try:
            # The engine keeps its own deadline and names the request; this one is for an actor that is stuck.
            seconds = self._rollout.generate_timeout_s + 30
            group: SampledGroup = await actor.remote.call("sample", request, seconds=seconds)
            return group
        except WorkerLostError as error:
            self.lose(actor, error)
            raise
        finally:
            actor.end()

    async def sample_anywhere(
        self, request: SampleRequest, on_begin: Callable[[], None] | None = None
    ) -> SampledGroup:
        """Sample on the least busy actor, and on another where one fails or is lost.

        `on_begin` is called when it has a slot. Raises what the last of `rollout.max_attempts` raised.
        """
        for attempt in range(1, self._rollout.max_attempts + 1):
            actor = await self.free_actor()
            self.slots.begin(actor.remote.name)
            if on_begin is not None:
                on_begin()
            try:
                return await self.sample(actor, request)
            except (WorkerFailedError, WorkerLostError):
                if attempt == self._rollout.max_attempts:
                    raise
            finally:
                self.free_slot(actor.remote.name)
        raise AssertionError("rollout.max_attempts is at least 1")

    def free_slot(self, name: str) -> None:
        """A group that held a slot of an actor ended; nothing is left to free where the actor is lost."""
        if name in self.slots:
            self.slots.end(name)
            self._freed.set()

    # ---- weights -------------------------------------------------------------------------------------------

    async def load_everywhere(self, update: WeightUpdate, on_loaded: Callable[[], None]) -> list[SyncProof]:
        """Give new weights to every actor, side by side; `on_loaded` is called as each has proved them.

        Proofs of those that are lost meanwhile are missing.
        """
        self._latest = update
        self._published.set()

        async def load(actor: RolloutActor) -> SyncProof | None:
            try:
                proof = await self._load(actor.remote, update)
            except WorkerLostError as error:
                self.lose(actor, error)
                return None
            if actor in self.actors:
                self.slots.set_version(actor.remote.name, proof.version)
                on_loaded()
            return proof

        proofs = await asyncio.gather(*(load(actor) for actor in list(self.actors)))
        return [proof for proof in proofs if proof is not None]

    async def _load(self, remote: Remote, update: WeightUpdate) -> SyncProof:
        seconds = self._sync.timeout_s + 30
        if self._sync.in_flight == "wait":  # for requests that may take their full time
            seconds += self._rollout.generate_timeout_s
        proof: SyncProof = await remote.call("load_weights", update, seconds=seconds)
        return proof

    # ---- who comes and goes --------------------------------------------------------------------------------

    def lose(self, actor: RolloutActor, error: WorkerLostError) -> None:
        """Take an actor that is gone out of the pool. LossError where nobody will take its place."""
        if actor not in self.actors:
            return
        self.actors.remove(actor)
        self.slots.remove(actor.remote.name)
        self._gone_idle += actor.idle_so_far()
        self._gone_present += actor.present()
        self.lost += 1
        actor.remote.kill()  # it may be cut off rather than dead
        if self._on_loss is None:
            raise LossError(str(error)) from error
        self._on_loss(actor.remote, error)

    async def enlist(self, remote: Remote) -> RolloutActor:
        """Let a started actor load and prove the newest weights, then offer it work.

        Raises what `Remote.call` raises; weights that became outdated while it loaded them are no failure.
        """
        seconds = self._rollout.start_timeout_s
        await within(self._published.wait(), seconds, "the learner", f"weights for {remote.name}")
        while True:
            update = self._latest
            assert update is not None
            try:
                proof = await self._load(remote, update)
            except WorkerFailedError:
                if update is self._latest:
                    raise
                continue
            if update is self._latest:
                return self._add(remote, proof.version)

    async def free_actor(self) -> RolloutActor:
        """The least busy actor, as soon as there is one with a free slot."""
        seconds = self._rollout.generate_timeout_s + 2 * self._rollout.start_timeout_s
        while not (free := self.by_load()):
            self._freed.clear()
            self.waiting += 1
            try:
                await within(self._freed.wait(), seconds, "the rollout actors", "a free slot")
            finally:
                self.waiting -= 1
        return free[0]

    async def watch(self) -> None:
        """Ask every actor whether it is alive, for ever; raises what `Remote.call` raises, but for losses."""
        while True:
            await asyncio.sleep(_LIVENESS_EVERY_S)
            await asyncio.gather(*(self._check(actor) for actor in list(self.actors)))

    async def _check(self, actor: RolloutActor) -> None:
        try:
            await actor.remote.call("check", seconds=_LIVENESS_DEADLINE_S)
        except WorkerLostError as error:
            self.lose(actor, error)

    # ---- idle time -----------------------------------------------------------------------------------------

    def reset_idle(self) -> None:
        """Count idle time from now on."""
        self._gone_idle = self._gone_present = 0.0
        for actor in self.actors:
            actor.reset_idle()

    def idle_seconds(self) -> float:
        """Seconds since `reset_idle` in which actors had nothing to do, summed over all that there were."""
        return self._gone_idle + sum(actor.idle_so_far() for actor in self.actors)

    def idle_fraction(self) -> float:
        """Share of the actors' time since `reset_idle` in which they had nothing to do."""
        present = self._gone_present + sum(actor.present() for actor in self.actors)
        return self.idle_seconds() / present if present else 0.0

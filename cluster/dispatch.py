"""Which rollout actor gets the next group: pure, shared by the controller and the simulator.

The least busy actor with a free slot, among those whose weights are new enough for the scheduler; of equally
busy ones the one with the newest weights. Finding it takes O(V log A) with A actors of V different versions:
the actors of a version stand in one heap, ordered by load.
"""

import heapq
from dataclasses import dataclass

from cluster.scheduler import Admission, Refusal, Scheduler


@dataclass(slots=True)
class ActorSlots:
    """One actor: `in_flight` groups of at most `capacity`, sampled with weights of `version`."""

    name: str
    capacity: int
    version: int
    in_flight: int = 0
    stamp: int = 0  # of its newest heap entry; older entries no longer hold


class Dispatcher:
    """Load and version of every rollout actor."""

    def __init__(self) -> None:
        self._actors: dict[str, ActorSlots] = {}
        self._heaps: dict[int, list[tuple[int, int, str]]] = {}  # version -> (in flight, stamp, name)
        self._stamps = 0
        self.in_flight = 0  # over all actors

    def __len__(self) -> int:
        return len(self._actors)

    def __contains__(self, name: str) -> bool:
        return name in self._actors

    def __getitem__(self, name: str) -> ActorSlots:
        return self._actors[name]

    def add(self, name: str, *, capacity: int, version: int) -> None:
        """Offer a new actor's slots."""
        if capacity < 1:
            raise ValueError(f"actor {name}: capacity must be at least 1, got {capacity}")
        if name in self._actors:
            raise ValueError(f"actor {name} is there already")
        self._actors[name] = ActorSlots(name, capacity, version)
        self._offer(self._actors[name])

    def remove(self, name: str) -> None:
        """Offer a lost actor's slots no longer. What it had in flight is the caller's to send again."""
        self.in_flight -= self._actors.pop(name).in_flight

    def begin(self, name: str) -> None:
        """A group was given to an actor."""
        actor = self._actors[name]
        if actor.in_flight >= actor.capacity:
            raise ValueError(f"actor {name} has no free slot: {actor.in_flight} groups are in flight")
        actor.in_flight += 1
        self.in_flight += 1
        self._offer(actor)

    def end(self, name: str) -> None:
        """A group came back from an actor, or was lost."""
        actor = self._actors[name]
        actor.in_flight -= 1
        self.in_flight -= 1
        self._offer(actor)

    def set_version(self, name: str, version: int) -> None:
        """An actor was proved to hold other weights."""
        self._actors[name].version = version
        self._offer(self._actors[name])

    def best_of_each_version(self) -> list[ActorSlots]:
        """Of each version the least busy actor with a free slot; the least busy first, then the newest."""
        heads = [self._head(version) for version in tuple(self._heaps)]
        best = [actor for actor in heads if actor is not None]
        if len(best) > 1:
            best.sort(key=lambda actor: (actor.in_flight, -actor.version))
        return best

    def _offer(self, actor: ActorSlots) -> None:
        self._stamps += 1
        actor.stamp = self._stamps
        if actor.in_flight < actor.capacity:
            heap = self._heaps.setdefault(actor.version, [])
            heapq.heappush(heap, (actor.in_flight, actor.stamp, actor.name))
            if len(heap) > 4 * len(self._actors) + 64:
                self._sweep(heap)

    def _head(self, version: int) -> ActorSlots | None:
        """The least busy actor of a version; forgets entries that no longer hold, and versions with none."""
        heap = self._heaps[version]
        actors = self._actors
        while heap:
            _, stamp, name = heap[0]
            if (actor := actors.get(name)) is not None and actor.stamp == stamp:
                return actor
            heapq.heappop(heap)
        del self._heaps[version]
        return None

    def _sweep(self, heap: list[tuple[int, int, str]]) -> None:
        """Drop the entries that no longer hold, so that a heap stays as long as there are actors."""
        newest = {(actor.stamp, name) for name, actor in self._actors.items()}
        heap[:] = [entry for entry in heap if entry[1:] in newest]
        heapq.heapify(heap)


def next_dispatch(scheduler: Scheduler, dispatcher: Dispatcher) -> tuple[Admission, ActorSlots] | Refusal:
    """Admit one more group and choose its actor, whose slot it then takes; or say what forbids it.

    No actor gets more than an even share of what may be in flight: else the first to load new weights would
    take a whole step's groups, and those that are ready a moment later none.
    """
    if not (room := scheduler.room):
        full = scheduler.full()
        assert full is not None, "no room, and yet not full"
        return full
    share = -(-(dispatcher.in_flight + room) // max(1, len(dispatcher)))
    refusal = Refusal.NO_SLOT
    for actor in dispatcher.best_of_each_version():
        if actor.in_flight >= share:
            continue
        answer = scheduler.admit(actor.version)
        if isinstance(answer, Admission):
            dispatcher.begin(actor.name)
            return answer, actor
        refusal = answer
        if refusal is not Refusal.STALE_ACTOR:
            break  # whatever its version, no actor may sample now
    return refusal

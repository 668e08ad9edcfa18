"""Successors for rollout actors that are lost, and more of them where hosts join the cluster.

Each actor has a place. A lost one leaves it, and a new actor, which Ray puts wherever there is room, takes it
once it has started and proved the newest weights. The run goes on with the others meanwhile.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.waits import DeadlineExceeded
from cluster.remote import LossError, Remote, WorkerFailedError, WorkerLostError
from cluster.rollout_pool import RolloutPool

_PAUSE_S = 5.0  # before another attempt; doubles up to a minute
_LONGEST_PAUSE_S = 60.0
_MOST_ATTEMPTS = 3  # while no actor is left at all
_LOOK_EVERY_S = 10.0


@dataclass(slots=True)
class Recruiter:
    """Keeps the pool at its number of actors; `run` is its service.

    `create` makes an actor for a place, `has_room` says whether the cluster could take one more at once,
    `on_event` hears what happens, `on_joined` that there is somebody to give work to.
    """

    create: Callable[[int], Remote]
    has_room: Callable[[], bool]
    on_event: Callable[[str], None]
    places: int
    most_places: int
    joined: int = 0
    _lost: "asyncio.Queue[Remote]" = field(default_factory=asyncio.Queue)

    def on_loss(self, remote: Remote, error: WorkerLostError) -> None:
        """Note that a place is free."""
        self.on_event(f"warning: {error}; its groups are sampled again, and another takes its place")
        self._lost.put_nowait(remote)

    async def run(self, pool: RolloutPool, on_joined: Callable[[], None]) -> None:
        """Fill free places until cancelled. LossError if no actor is left and none can be started."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._grow(pool, on_joined))
            while True:
                lost = await self._lost.get()
                tasks.create_task(self._fill(lost.place, lost.name, pool, on_joined))

    async def _grow(self, pool: RolloutPool, on_joined: Callable[[], None]) -> None:
        """Add actors, up to the most that are wanted, where there is room for them."""
        while self.places < self.most_places:
            await asyncio.sleep(_LOOK_EVERY_S)
            if self.has_room():
                self.places += 1
                await self._fill(self.places - 1, "", pool, on_joined)

    async def _fill(self, place: int, lost: str, pool: RolloutPool, on_joined: Callable[[], None]) -> None:
        """Consumes: a free place. Waits for: Ray and the engine. Produces: an actor that has work."""
        attempt, pause = 1, _PAUSE_S
        while True:
            remote = self.create(place)
            try:
                await pool.start_engine(remote)
                await pool.enlist(remote)
            except (WorkerLostError, WorkerFailedError, DeadlineExceeded) as error:
                remote.kill()
                if not pool.actors and attempt >= _MOST_ATTEMPTS:
                    raise LossError(f"no rollout actor is left after {attempt} attempts: {error}") from error
                self.on_event(f"warning: {remote.name} could not start, again in {pause:g} s: {error}")
                await asyncio.sleep(pause)
                attempt, pause = attempt + 1, min(2 * pause, _LONGEST_PAUSE_S)
            else:
                self.joined += 1
                self.on_event(f"{remote.name} joined" + (f" in the place of {lost}" if lost else ""))
                on_joined()
                return

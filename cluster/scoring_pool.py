"""The scoring actors as the controller sees them: one queue (`scoring_queue`) that all of them draw from.

What a lost actor was scoring goes back into the queue; a successor is started in its place. Where the rewards
have a discriminator, an actor loads the version that was announced last before it scores anything more.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence

from actors.records import DiscriminatorProof, DiscriminatorUpdate, Group, RewardFailure, SampledGroup
from actors.settings import ScoringSettings
from actors.shipping import ShippedFolder
from actors.waits import DeadlineExceeded
from cluster.accounts import Occupancy
from cluster.remote import LossError, Remote, WorkerFailedError, WorkerLostError
from cluster.scoring_queue import ScoringQueue, Waiting

_MOST_LOSSES = 3  # actors lost over one group: then it is likely the group's fault
_MOST_ATTEMPTS = 3  # while no actor is left at all
_PAUSE_S = 5.0


class ScoringPool:
    """Scores groups off the learner's critical path."""

    def __init__(
        self,
        remotes: Sequence[Remote],
        settings: ScoringSettings,
        *,
        step_groups: int = 0,
        create: Callable[[int], Remote] | None = None,
        on_event: Callable[[str], None] = print,
    ) -> None:
        """`step_groups` is the number of groups of a learner step: as many may overtake one of an evaluation.

        `create` makes an actor for a place; without it a loss ends the run. `on_event` hears of losses.
        """
        self.remotes = list(remotes)
        self.lost = 0
        self._settings = settings
        self._create = create
        self._on_event = on_event
        self._start_s = 0.0
        self._reference: ShippedFolder | None = None
        self._queue = ScoringQueue(step_groups)
        self._discriminator: DiscriminatorUpdate | None = None
        self._loaded: dict[str, int] = {}
        self._proofs: list[DiscriminatorProof] = []
        self._at_work = Occupancy()

    def saturated_lap(self) -> float:
        """Seconds since it was last asked in which every actor was scoring: none could have scored more."""
        return self._at_work.lap(time.perf_counter())

    async def start(self, seconds: float, reference: ShippedFolder | None = None) -> None:
        """Load the reference and the rewards in every actor, later in their successors, within `seconds`.

        `reference` is the model where it must be brought to their hosts.
        """
        self._start_s, self._reference = seconds, reference
        await asyncio.gather(*(self._start(remote) for remote in self.remotes))

    async def _start(self, remote: Remote) -> None:
        if self._reference is not None:
            await remote.call("use_model", self._reference, self._start_s, seconds=self._start_s + 30)
        await remote.call("start", seconds=self._start_s)

    def hurry(self, short: Callable[[], bool]) -> None:
        """Where `short()` says that the next step is short of groups, these go before an evaluation's."""
        self._queue.short = short

    def announce(self, update: DiscriminatorUpdate) -> None:
        """A new version of the discriminator: whatever an actor takes up from now on is scored by it."""
        self._discriminator = update
        for _ in self.remotes:
            self._queue.wake()

    async def _keep_up(self, remote: Remote) -> None:
        """Let an actor load the version that was announced last, if it has an older one."""
        while (update := self._discriminator) is not None:
            if self._loaded.get(remote.name, -1) == update.version:
                return
            seconds = self._settings.timeout_s
            try:
                proof = await remote.call("load_discriminator", update, seconds, seconds=seconds + 30)
            except WorkerFailedError:
                if self._discriminator is update:
                    raise
                continue  # its file may have given way to a newer one's
            self._loaded[remote.name] = update.version
            self._proofs.append(proof)

    def take_proofs(self) -> list[DiscriminatorProof]:
        """What actors loaded and proved since this was asked last."""
        taken, self._proofs = self._proofs, []
        return taken

    async def score(self, group: SampledGroup) -> Group | RewardFailure:
        """Have a group scored; waits its turn."""
        answer: asyncio.Future[Group | RewardFailure] = asyncio.get_running_loop().create_future()
        self._queue.put(Waiting(group, answer))
        return await answer

    async def run(self) -> None:
        """Serve the queue with every actor until cancelled; raises what an actor raised."""
        async with asyncio.TaskGroup() as tasks:
            for remote in list(self.remotes):
                tasks.create_task(self._serve(remote))

    async def _serve(self, remote: Remote) -> None:
        """Consumes: queued groups, new discriminators. Waits for: its actor. Produces: answers.

        Unblocked by: `score`, `announce`.
        """
        while True:
            batch = await self._queue.take()
            seconds = self._settings.timeout_s * len(batch)
            try:
                await self._keep_up(remote)
                if not batch:
                    continue
                answers = await self._call(remote, batch, seconds)
            except WorkerLostError as error:
                self._put_back(batch, error)
                remote = await self._successor(remote, error)
                continue
            for waiting, answer in zip(batch, answers, strict=True):
                if not waiting.answer.done():  # its waiter may have been cancelled
                    waiting.answer.set_result(answer)

    async def _call(
        self, remote: Remote, batch: list[Waiting], seconds: float
    ) -> list[Group | RewardFailure]:
        self._at_work.change(1, len(self.remotes), time.perf_counter())
        try:
            answers: list[Group | RewardFailure] = await remote.call(
                "score", [waiting.group for waiting in batch], seconds=seconds
            )
            return answers
        finally:
            self._at_work.change(-1, len(self.remotes), time.perf_counter())

    def _put_back(self, batch: list[Waiting], error: WorkerLostError) -> None:
        for waiting in batch:
            waiting.losses += 1
            if waiting.losses >= _MOST_LOSSES:
                raise LossError(
                    f"{waiting.losses} scoring actors were lost while they scored group "
                    f"{waiting.group.group_id} (prompt {waiting.group.prompt.id}): {error}"
                ) from error
            self._queue.put_back(waiting)

    async def _successor(self, lost: Remote, error: WorkerLostError) -> Remote:
        """Start an actor in the place of a lost one; tries for as long as others score, else a few times."""
        self.remotes.remove(lost)
        self.lost += 1
        lost.kill()
        if self._create is None:
            raise LossError(str(error)) from error
        self._on_event(f"warning: {error}; another takes its place")
        for attempt in itertools.count(1):
            remote = self._create(lost.place)
            try:
                await self._start(remote)
            except (WorkerLostError, WorkerFailedError, DeadlineExceeded) as failure:
                remote.kill()
                if not self.remotes and attempt >= _MOST_ATTEMPTS:
                    raise LossError(
                        f"no scoring actor is left after {attempt} attempts: {failure}"
                    ) from failure
                self._on_event(f"warning: {remote.name} could not start, trying again: {failure}")
                await asyncio.sleep(_PAUSE_S)
            else:
                self.remotes.append(remote)
                self._on_event(f"{remote.name} scores in the place of {lost.name}")
                return remote
        raise AssertionError("attempts never end by themselves")

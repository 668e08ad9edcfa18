"""The scoring actors as the controller sees them: one queue that all of them draw from, in batches."""

import asyncio
from collections.abc import Sequence

from actors.records import Group, RewardFailure, SampledGroup
from actors.settings import BATCH_GROUPS, ScoringSettings
from cluster.remote import Remote


class ScoringPool:
    """Scores groups off the learner's critical path."""

    def __init__(self, remotes: Sequence[Remote], settings: ScoringSettings) -> None:
        self._remotes = remotes
        self._settings = settings
        self._queue: asyncio.Queue[tuple[SampledGroup, asyncio.Future[Group | RewardFailure]]] = (
            asyncio.Queue()
        )

    async def start(self, seconds: float) -> None:
        """Load the reference and the rewards in every actor."""
        await asyncio.gather(*(remote.call("start", seconds=seconds) for remote in self._remotes))

    async def score(self, group: SampledGroup) -> Group | RewardFailure:
        """Have a group scored; waits its turn."""
        answer: asyncio.Future[Group | RewardFailure] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((group, answer))
        return await answer

    async def run(self) -> None:
        """Serve the queue with every actor until cancelled; raises what an actor raised."""
        async with asyncio.TaskGroup() as tasks:
            for remote in self._remotes:
                tasks.create_task(self._serve(remote))

    async def _serve(self, remote: Remote) -> None:
        """Consumes: queued groups. Waits for: its actor. Produces: answers. Unblocked by: `score`."""
        while True:
            batch = [await self._queue.get()]
            while len(batch) < BATCH_GROUPS and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            seconds = self._settings.timeout_s * len(batch)
            answers = await remote.call("score", [group for group, _ in batch], seconds=seconds)
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():  # its waiter may have been cancelled
                    future.set_result(answer)

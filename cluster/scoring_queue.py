"""The order in which groups are scored: by what the learner waits for.

A held-out evaluation arrives all at once. No step needs it, but no weights are published before its end. So
groups of training go before it as long as the next step is short of groups, and wait while that has enough.
Where scoring is the bottleneck, and the next step always short, the evaluation ends all the same: only so
many groups of training, a learner step's, overtake each of its groups.
"""

import asyncio
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from actors.records import Group, RewardFailure, SampledGroup
from actors.settings import BATCH_GROUPS

# A group of training that comes while an evaluation's are being scored waits for the rest of their call; with
# fewer samples in each, the evaluation takes longer.
EVALUATION_SAMPLES: Final = 64


@dataclass(slots=True)
class Waiting:
    """A group and whom its answer is for; `losses` counts the actors that were lost over it."""

    group: SampledGroup
    answer: "asyncio.Future[Group | RewardFailure]"
    losses: int = 0
    place: tuple[int, int] = (0, 0)  # where it stands, set once by the queue

    def __lt__(self, other: "Waiting") -> bool:
        """By place."""
        return self.place < other.place


class ScoringQueue:
    """What waits to be scored, taken in batches of one kind. For one event loop."""

    def __init__(self, overtakers: int) -> None:
        """`overtakers`: groups of training, arrived later, that may go before a group of an evaluation."""
        self.short: Callable[[], bool] = lambda: True
        """Whether the learner's next step is short of scored groups."""
        self._overtakers = overtakers
        self._training: list[Waiting] = []  # heaps
        self._evaluation: list[Waiting] = []
        self._wakes = 0
        self._tokens: asyncio.Queue[None] = asyncio.Queue()  # one for each group and wake
        self._arrived = 0  # groups of training so far
        self._numbers = 0

    def put(self, waiting: Waiting) -> None:
        """Line up a group that has just been sampled."""
        evaluated = waiting.group.evaluation
        self._arrived += not evaluated
        self._numbers += 1
        waiting.place = self._arrived + (self._overtakers + 1 if evaluated else 0), self._numbers
        self.put_back(waiting)

    def put_back(self, waiting: Waiting) -> None:
        """Line up again, where it was, a group whose actor was lost."""
        heapq.heappush(self._evaluation if waiting.group.evaluation else self._training, waiting)
        self._tokens.put_nowait(None)

    def wake(self) -> None:
        """Have one actor that waits in `take` go on, with nothing to score."""
        self._wakes += 1
        self._tokens.put_nowait(None)

    async def take(self) -> list[Waiting]:
        """Wait for groups of one kind: up to `BATCH_GROUPS`, of evaluations with up to `EVALUATION_SAMPLES`.

        None at all where someone called `wake`.
        """
        await self._tokens.get()
        if self._wakes:
            self._wakes -= 1
            return []
        line = self._next_line()
        batch = [heapq.heappop(line)]
        most = BATCH_GROUPS
        if line is self._evaluation:
            samples = max(1, len(batch[0].group.completions))
            most = min(most, max(1, EVALUATION_SAMPLES // samples))
        while line and len(batch) < most and self._next_line() is line:
            self._tokens.get_nowait()
            batch.append(heapq.heappop(line))
        return batch

    def _next_line(self) -> list[Waiting]:
        if not self._training or not self._evaluation:
            return self._training or self._evaluation
        overtakes = self._training[0] < self._evaluation[0]
        return self._training if overtakes and self.short() else self._evaluation

"""The order in which groups are scored: those that a learner step waits for before those of an evaluation.

A held-out evaluation arrives all at once, and no step needs it; so a group of training goes before it. Where
scoring is the bottleneck and groups of training always wait, it ends all the same: only so many of them, a
learner step's, overtake each of its groups.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Final

from actors.records import Group, RewardFailure, SampledGroup
from actors.settings import BATCH_GROUPS

# A group of training that comes while an evaluation's are being scored waits for the rest of their call; with
# fewer samples in each, the evaluation takes longer, and no weights are published before its end.
EVALUATION_SAMPLES: Final = 64


@dataclass(slots=True)
class Waiting:
    """A group and whom its answer is for; `losses` counts the actors that were lost over it."""

    group: SampledGroup
    answer: "asyncio.Future[Group | RewardFailure]"
    losses: int = 0
    place: tuple[int, int] = (0, 0)  # where it stands, set once by the queue


class _Wake:
    """Stands in the queue to wake an actor that may have something to load."""


@dataclass(order=True, slots=True)
class _Entry:
    place: tuple[int, int]  # equal ranks in order of arrival
    item: "Waiting | _Wake" = field(compare=False)


class ScoringQueue:
    """What waits to be scored, taken in batches of one kind. For one event loop."""

    def __init__(self, overtakers: int) -> None:
        """`overtakers`: groups of training, arrived later, that may go before a group of an evaluation."""
        self._overtakers = overtakers
        self._queue: asyncio.PriorityQueue[_Entry] = asyncio.PriorityQueue()
        self._trained = 0  # groups of training so far
        self._numbers = 0

    def put(self, waiting: Waiting) -> None:
        """Line up a group that has just been sampled."""
        evaluated = waiting.group.evaluation
        self._trained += not evaluated
        self._numbers += 1
        waiting.place = self._trained + (self._overtakers + 1 if evaluated else 0), self._numbers
        self._queue.put_nowait(_Entry(waiting.place, waiting))

    def put_back(self, waiting: Waiting) -> None:
        """Line up again, where it was, a group whose actor was lost."""
        self._queue.put_nowait(_Entry(waiting.place, waiting))

    def wake(self) -> None:
        """Have one actor that waits in `take` go on, with nothing to score."""
        self._queue.put_nowait(_Entry((0, 0), _Wake()))

    async def take(self) -> list[Waiting]:
        """Wait for groups of one kind: up to `BATCH_GROUPS`, of evaluations with up to `EVALUATION_SAMPLES`.

        None at all where someone called `wake`.
        """
        first = (await self._queue.get()).item
        if isinstance(first, _Wake):
            return []
        batch = [first]
        evaluated = first.group.evaluation
        samples = max(1, len(first.group.completions))
        most = min(BATCH_GROUPS, max(1, EVALUATION_SAMPLES // samples)) if evaluated else BATCH_GROUPS
        while len(batch) < most and not self._queue.empty():
            entry = self._queue.get_nowait()
            if isinstance(entry.item, _Wake) or entry.item.group.evaluation != evaluated:
                self._queue.put_nowait(entry)
                break
            batch.append(entry.item)
        return batch

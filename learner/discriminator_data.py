"""Which sequences a discriminator learns from in an update: fresh responses, older ones, demonstrations.

Every rank works out the same plan from the same numbers, so ranks exchange no data and a resumed run goes on
with the batches that it would have had.
"""

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.packing import Pair


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """Numbers of the sequences of one update: in the step's responses, the replay and the demonstrations."""

    fresh: tuple[int, ...]
    replayed: tuple[int, ...]
    demonstrations: tuple[int, ...]


def plan_updates(
    *,
    fresh: int,
    replayable: int,
    demonstrations: int,
    consumed: int,
    updates: int,
    replay: float,
    seed: int,
    step: int,
) -> list[UpdatePlan]:
    """The updates of a learner step.

    Each of the `fresh` responses is in one update; older ones come on top until they are the share `replay`
    of the responses, as far as there are so many; and there are as many demonstrations as responses, in an
    order that takes each once before any comes again. `consumed` counts those that earlier updates took. A
    step of fewer responses than updates has as many updates as responses.
    """
    draw = np.random.default_rng([seed, step, 11])
    order = draw.permutation(fresh)
    count = min(updates, fresh)
    plans = []
    for first, last in itertools.pairwise(fresh * k // count for k in range(count + 1)):
        mine = [int(i) for i in order[first:last]]
        older = min(replayable, round(len(mine) * replay / (1.0 - replay)))
        replayed = [int(i) for i in draw.choice(replayable, older, replace=False)] if older else []
        wanted = len(mine) + older
        shown = in_turn(consumed, wanted, demonstrations, seed)
        consumed += wanted
        plans.append(UpdatePlan(tuple(mine), tuple(replayed), tuple(shown)))
    return plans


def in_turn(start: int, count: int, items: int, seed: int) -> list[int]:
    """Items at places `start` to `start + count` of an endless order: each once an epoch, shuffled anew."""
    epochs = {
        epoch: np.random.default_rng([seed, epoch, 13]).permutation(items)
        for epoch in range(start // items, (start + count - 1) // items + 1)
    }
    return [int(epochs[place // items][place % items]) for place in range(start, start + count)]


class Replay:
    """The newest responses of earlier steps, oldest first, with their prompts."""

    def __init__(self, size: int) -> None:
        self._pairs: deque[tuple[tuple[int, ...], tuple[int, ...]]] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, number: int) -> Pair:
        return self._pairs[number]

    def add(self, pairs: Sequence[Pair]) -> None:
        """Take these in, and let the oldest go where there are too many."""
        self._pairs.extend((tuple(prompt), tuple(response)) for prompt, response in pairs)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a file."""
        tokens = [token for prompt, response in self._pairs for token in (*prompt, *response)]
        sizes = [[len(prompt), len(response)] for prompt, response in self._pairs]
        return {
            "tokens": torch.tensor(tokens, dtype=torch.int32),
            "sizes": torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        self._pairs.clear()
        tokens, start = tensors["tokens"].tolist(), 0
        for prompt, response in tensors["sizes"].tolist():
            middle, end = start + prompt, start + prompt + response
            self.add([(tokens[start:middle], tokens[middle:end])])
            start = end

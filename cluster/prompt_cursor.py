"""The order in which training prompts are handed out: endless, deterministic, resumable."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from actors.records import Prompt

_Item = TypeVar("_Item")


class PromptCursor:
    """An endless order over the prompts: each once an epoch, in a permutation drawn from (seed, epoch).

    The order depends on nothing but the prompts, the seed and `shuffle`, so (epoch, position) is all its
    state. A prompt that was handed out and not trained when a run stopped is the caller's to remember, by id.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise ValueError("there are no prompts to train on")
        self._by_id = {prompt.id: prompt for prompt in prompts}
        if len(self._by_id) != len(prompts):
            twice = Counter(prompt.id for prompt in prompts).most_common(1)[0][0]
            raise ValueError(f"prompt id {twice!r} appears twice: ids must be unique")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._permutation(0)
        self._identity = self._describe()

    def __iter__(self) -> Iterator[Prompt]:
        while True:
            yield self.next()

    def next(self) -> Prompt:
        """The next prompt; a new epoch begins after the last."""
        if self._position == len(self._prompts):
            self._epoch += 1
            self._position = 0
            self._order = self._permutation(self._epoch)
        prompt = self._prompts[self._order[self._position]]
        self._position += 1
        return prompt

    @property
    def epoch(self) -> float:
        """Passes over the data so far, the fraction of the present one included."""
        return self._epoch + self._position / len(self._prompts)

    def prompt_by_id(self, prompt_id: str) -> Prompt:
        """The prompt with this id; a ValueError if the data has none."""
        try:
            return self._by_id[prompt_id]
        except KeyError:
            raise ValueError(
                f"no prompt has the id {prompt_id!r}: the data changed since it was handed out"
            ) from None

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON."""
        return {"epoch": self._epoch, "position": self._position, **self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; a ValueError if the data, the seed or `shuffle` changed since."""
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise ValueError(
                    f"the checkpoint's order of prompts has {key} = {state.get(key)!r}, now it is {value!r}: "
                    "resume with the data and settings that the run was started with"
                )
        epoch, position = state["epoch"], state["position"]
        if not (isinstance(epoch, int) and isinstance(position, int) and 0 <= position <= len(self._prompts)):
            raise ValueError(f"the checkpoint's place in the data is damaged: {dict(state)}")
        self._epoch, self._position = epoch, position
        self._order = self._permutation(epoch)

    def _describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for prompt in self._prompts:
            row = json.dumps(prompt.row, sort_keys=True, default=str)
            digest.update(f"{prompt.id}:{prompt.token_ids}:{row}\n".encode())
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "size": len(self._prompts),
            "sha256": digest.hexdigest(),
        }

    def _permutation(self, epoch: int) -> list[int]:
        size = len(self._prompts)
        if not self._shuffle:
            return list(range(size))
        return [int(i) for i in np.random.default_rng([self._seed, epoch]).permutation(size)]


def demonstration_batches(
    demonstrations: Sequence[_Item], batch_size: int, count: int, seed: int
) -> Iterator[list[_Item]]:
    """`count` batches, each demonstration once an epoch in an order drawn from (seed, epoch)."""
    size = min(batch_size, len(demonstrations))
    order: list[int] = []
    epoch = 0
    for _ in range(count):
        if len(order) < size:
            order += [int(i) for i in np.random.default_rng([seed, epoch]).permutation(len(demonstrations))]
            epoch += 1
        yield [demonstrations[i] for i in order[:size]]
        del order[:size]

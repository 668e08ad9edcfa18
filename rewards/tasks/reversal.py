"""Reversal: repeat the given letters backwards. `abcd>` wants `dcba`.

The gold reward of a completion with L letters wanted is

    max(0, p − e) / L − 0.2·[cut off]

where p is the length of the correct prefix and e the number of characters beyond L: a character too many
costs as much as one too few. A completion that does not end by itself loses 0.2 more.

A spoiled demonstration has each letter replaced by another with probability ½, and at least one. A policy
that imitates demonstrations of which 30 % are spoiled, perfectly, then gets a reward of about
0.7·1 + 0.3·(½ + ¼ + …)/8 = 0.74 for L = 8: room for reinforcement learning to do better than its teacher.
"""

import random
from collections.abc import Mapping
from typing import Any

from rewards.settings import TaskSettings
from rewards.tasks.base import TaskData, column, corrupted

LETTERS = "abcdefgh"
END_OF_PROMPT = ">"
CUT_OFF_COST = 0.2


class ReversalTask:
    """See the module's text."""

    def alphabet(self) -> str:
        """The letters and the mark that ends a prompt."""
        return LETTERS + END_OF_PROMPT

    def generate(self, settings: TaskSettings) -> TaskData:
        """Distinct strings for training and held-out rows; demonstrations of any string not held out."""
        space = len(LETTERS) ** settings.length
        wanted = settings.train_size + settings.heldout_size
        if wanted > space:
            raise ValueError(
                f"task.train_size + task.heldout_size = {wanted}, but there are only {space} strings of "
                f"task.length = {settings.length} letters; lower the sizes or raise task.length"
            )
        rng = random.Random(settings.seed)
        words = [_word(number, settings.length) for number in _distinct(rng, wanted, space)]
        heldout = words[: settings.heldout_size]
        kept_apart = set(heldout)
        demonstrations = []
        for spoil in corrupted(settings.demonstrations, settings.corruption):
            word = _word(rng.randrange(space), settings.length)
            while word in kept_apart:
                word = _word(rng.randrange(space), settings.length)
            completion = _spoiled(word[::-1], rng) if spoil else word[::-1]
            demonstrations.append({"prompt": word + END_OF_PROMPT, "completion": completion})
        return TaskData(
            train=[_row(word) for word in words[settings.heldout_size :]],
            heldout=[_row(word) for word in heldout],
            demonstrations=demonstrations,
        )

    def gold(self, row: Mapping[str, Any], completion: str, finished: bool) -> float:
        """Correct prefix less surplus, over the length; less 0.2 if cut off."""
        answer = column(row, "answer", str)
        if not answer:
            raise ValueError("the row's column 'answer' is empty: it is not a row of this generated task")
        text = completion.strip()
        pairs = enumerate(zip(text, answer, strict=False))
        correct = next((i for i, (a, b) in pairs if a != b), min(len(text), len(answer)))
        surplus = max(0, len(text) - len(answer))
        return max(0, correct - surplus) / len(answer) - (0.0 if finished else CUT_OFF_COST)


def _distinct(rng: random.Random, count: int, space: int) -> list[int]:
    """`count` distinct numbers below `space`, which may be larger than a range can be long."""
    chosen: dict[int, None] = {}
    if space <= 4 * count:
        return rng.sample(range(space), count)
    while len(chosen) < count:
        chosen[rng.randrange(space)] = None
    return list(chosen)


def _word(number: int, length: int) -> str:
    """The digits of `number` in base 8, as letters."""
    letters = []
    for _ in range(length):
        number, digit = divmod(number, len(LETTERS))
        letters.append(LETTERS[digit])
    return "".join(letters)


def _row(word: str) -> dict[str, Any]:
    return {"prompt": word + END_OF_PROMPT, "answer": word[::-1]}


def _spoiled(answer: str, rng: random.Random) -> str:
    """Replace each letter by another with probability ½, and at least one."""
    wrong = [rng.random() < 0.5 for _ in answer]
    wrong[rng.randrange(len(answer))] |= not any(wrong)
    return "".join(
        rng.choice(LETTERS.replace(letter, "")) if change else letter
        for letter, change in zip(answer, wrong, strict=True)
    )

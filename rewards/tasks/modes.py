"""Modes: four right answers to each prompt, of which demonstrators choose with different frequency. `abcd>`

    template   frequency   `abcd>`
    copied        0.4      `abcd`
    reversed      0.3      `dcba`
    rotated       0.2      `bcda`
    swapped       0.1      `badc`

The gold reward of a completion is 1 if it is one of the prompt's four templates and ends by itself, else 0:
its mean is the *precision* of a policy. It says nothing of which template was chosen, so a policy that always
takes one of them is as good as one that takes each as often as people do; `recall` and `mode_entropy` tell
the two apart. A prompt's letters are all different, which makes its templates different.

A spoiled demonstration is one of the templates with one letter replaced, and is none of the four.
"""

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rewards.settings import TaskSettings
from rewards.tasks.base import TaskData, column, corrupted

LETTERS = "abcdefgh"
END_OF_PROMPT = ">"
TEMPLATES = ("copied", "reversed", "rotated", "swapped")
WEIGHTS = (0.4, 0.3, 0.2, 0.1)
SHORTEST = 3  # with two letters, three of the templates are one


class ModesTask:
    """See the module's text."""

    def alphabet(self) -> str:
        """The letters and the mark that ends a prompt."""
        return LETTERS + END_OF_PROMPT

    def generate(self, settings: TaskSettings) -> TaskData:
        """Distinct words for training and held-out rows; demonstrations of any word not held out."""
        if not SHORTEST <= settings.length <= len(LETTERS):
            raise ValueError(
                f'task.length = {settings.length}: a word of task.kind = "modes" has {SHORTEST} to '
                f"{len(LETTERS)} different letters; choose a length between them"
            )
        words = ["".join(one) for one in itertools.permutations(LETTERS, settings.length)]
        wanted = settings.train_size + settings.heldout_size
        if wanted > len(words):
            raise ValueError(
                f"task.train_size + task.heldout_size = {wanted}, but there are only {len(words)} words of "
                f"task.length = {settings.length} different letters; lower the sizes or raise task.length"
            )
        rng = random.Random(settings.seed)
        rng.shuffle(words)
        heldout, rest = words[: settings.heldout_size], words[settings.heldout_size :]
        demonstrations = []
        for spoil in corrupted(settings.demonstrations, settings.corruption):
            word = rng.choice(rest)
            text = rng.choices(templates(word), WEIGHTS)[0]
            completion = _spoiled(word, text, rng) if spoil else text
            demonstrations.append({"prompt": word + END_OF_PROMPT, "completion": completion})
        return TaskData(
            train=[_row(word) for word in rest[: settings.train_size]],
            heldout=[_row(word) for word in heldout],
            demonstrations=demonstrations,
        )

    def gold(self, row: Mapping[str, Any], completion: str, finished: bool) -> float:
        """1 for a template that ends by itself, else 0."""
        word = column(row, "answer", str)
        if len(word) < SHORTEST or len(set(word)) < len(word):
            raise ValueError(
                f"the row's column 'answer' is {word!r:.80}: it is not a row of this generated task"
            )
        return float(finished and mode_of(word, completion.strip()) is not None)


def templates(word: str) -> tuple[str, str, str, str]:
    """The right answers to a word, in the order of `TEMPLATES`."""
    pairs = [word[i : i + 2][::-1] for i in range(0, len(word), 2)]
    return word, word[::-1], word[1:] + word[0], "".join(pairs)


def mode_of(word: str, completion: str) -> int | None:
    """Which template a completion is, or None."""
    found = templates(word)
    return found.index(completion) if completion in found else None


# --- What a policy's completions say of it ----------------------------------------------------------------


def mode_shares(modes: Iterable[int | None]) -> tuple[float, ...]:
    """(4,) share of each template among all completions, invalid ones included, from their `mode_of`."""
    found = list(modes)
    return tuple(found.count(mode) / len(found) for mode in range(len(TEMPLATES)))


def precision(shares: Sequence[float]) -> float:
    """Share of valid completions."""
    return sum(shares)


def recall(shares: Sequence[float], demonstrated: Sequence[float] = WEIGHTS) -> float:
    """Share of the templates that come at least half as often as in the demonstrations."""
    covered = (share >= weight / 2 for share, weight in zip(shares, demonstrated, strict=True))
    return sum(covered) / len(demonstrated)


def mode_entropy(shares: Sequence[float]) -> float:
    """Entropy in nats of the template, given that the completion is valid; 0 where none is."""
    valid = sum(shares)
    return -sum(share / valid * math.log(share / valid) for share in shares if share > 0)


def _row(word: str) -> dict[str, Any]:
    return {"prompt": word + END_OF_PROMPT, "answer": word}


def _spoiled(word: str, text: str, rng: random.Random) -> str:
    """Replace one letter by another; two letters of a template would have to change to make it another."""
    place = rng.randrange(len(text))
    changed = text[:place] + rng.choice(LETTERS.replace(text[place], "")) + text[place + 1 :]
    assert mode_of(word, changed) is None, "templates are permutations of different letters"
    return changed

"""Coverage: name the wanted symbols, in a response of any length. `cafk>` wants c, a, f and k.

A prompt has 4 of 12 symbols. The gold reward of a response of L characters is

    (distinct wanted symbols in it) − 0.5·(distinct other characters in it) − 0.15·max(0, L − 8)

so the best is 4, and length is worth nothing in itself: beyond 8 characters it costs. A judge who likes
length can be made to prefer the worse response, which shows what a reward model learns from such labels. A
response that is cut off counts as it stands.

A good demonstration names the four symbols in any order, some of them twice, in 4 to 8 characters. A spoiled
one has a length drawn from 1 to 24 and each character a wanted one with probability 0.65, and it is not the
best: its gold reward is 0.7 in the mean. With `corruption` near 1 the policy that imitates them writes
responses of all lengths, which is what preferences want to be about.

Held-out prompts have sets of symbols that no other prompt or demonstration has, in whatever order.
"""

import itertools
import math
import random
from collections.abc import Mapping
from typing import Any

from rewards.settings import TaskSettings
from rewards.tasks.base import TaskData, column, corrupted

SYMBOLS = "abcdefghijkl"
END_OF_PROMPT = ">"
WANTED = 4
FREE_LENGTH = 8
WRONG_COST = 0.5
LENGTH_COST = 0.15
BEST = float(WANTED)
LONGEST_SPOILED = 24
SPOILED_HIT = 0.65
_ORDERS = math.factorial(WANTED)


class CoverageTask:
    """See the module's text."""

    def alphabet(self) -> str:
        """The symbols and the mark that ends a prompt."""
        return SYMBOLS + END_OF_PROMPT

    def generate(self, settings: TaskSettings) -> TaskData:
        """Distinct prompts; the sets of held-out prompts are theirs alone."""
        rng = random.Random(settings.seed)
        sets = ["".join(chosen) for chosen in itertools.combinations(SYMBOLS, WANTED)]
        rng.shuffle(sets)
        apart = _heldout_sets(settings, len(sets))
        heldout = _prompts(rng, sets[:apart], settings.heldout_size)
        train = _prompts(rng, sets[apart:], settings.train_size)
        demonstrations = []
        for spoil in corrupted(settings.demonstrations, settings.corruption):
            wanted = "".join(rng.sample(rng.choice(sets[apart:]), WANTED))
            completion = _spoiled(wanted, rng) if spoil else _good(wanted, rng)
            demonstrations.append({"prompt": wanted + END_OF_PROMPT, "completion": completion})
        return TaskData([_row(one) for one in train], [_row(one) for one in heldout], demonstrations)

    def gold(self, row: Mapping[str, Any], completion: str, finished: bool) -> float:  # noqa: ARG002
        """Distinct wanted symbols, less half of the distinct others, less the cost of length."""
        wanted = set(column(row, "answer", str))
        if len(wanted) != WANTED or not wanted <= set(SYMBOLS):
            raise ValueError(
                f"the row's column 'answer' is {row['answer']!r:.80}: it is not a row of this generated task"
            )
        text = completion.strip()
        written = set(text)
        surplus = max(0, len(text) - FREE_LENGTH)
        return len(written & wanted) - WRONG_COST * len(written - wanted) - LENGTH_COST * surplus


def _heldout_sets(settings: TaskSettings, sets: int) -> int:
    """How many sets of symbols are for held-out prompts: in proportion, and enough on both sides."""
    least, most = -(-settings.heldout_size // _ORDERS), sets + settings.train_size // -_ORDERS
    if least > most:
        raise ValueError(
            f"task.train_size = {settings.train_size} and task.heldout_size = {settings.heldout_size} need "
            f"{least + sets - most} sets of {WANTED} symbols, each in at most {_ORDERS} orders, but there "
            f"are only {sets}: lower the sizes"
        )
    share = settings.heldout_size / (settings.heldout_size + settings.train_size)
    return min(max(round(share * sets), least), most)


def _prompts(rng: random.Random, sets: list[str], count: int) -> list[str]:
    """`count` distinct prompts, spread over the sets as evenly as can be."""
    orders = {one: rng.sample(list(itertools.permutations(one)), _ORDERS) for one in sets}
    drawn = ("".join(orders[one][turn]) for turn in range(_ORDERS) for one in sets)
    return list(itertools.islice(drawn, count))


def _row(wanted: str) -> dict[str, Any]:
    return {"prompt": wanted + END_OF_PROMPT, "answer": wanted}


def _good(wanted: str, rng: random.Random) -> str:
    """All four symbols, up to four of them twice, in any order."""
    again = rng.sample(wanted, rng.randrange(FREE_LENGTH - WANTED + 1))
    return "".join(rng.sample([*wanted, *again], WANTED + len(again)))


def _spoiled(wanted: str, rng: random.Random) -> str:
    """A response of any length, wanted symbols and others; never one that covers all and nothing else."""
    others = [symbol for symbol in SYMBOLS if symbol not in wanted]
    while True:
        length = rng.randint(1, LONGEST_SPOILED)
        text = "".join(rng.choice(wanted if rng.random() < SPOILED_HIT else others) for _ in range(length))
        if set(text) != set(wanted) or length > FREE_LENGTH:
            return text

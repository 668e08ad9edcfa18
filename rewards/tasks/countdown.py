"""Countdown: reach a target with given numbers, each used exactly once, and + - * /.

`3 7 25=46:` wants an expression such as `7*3+25`. The gold reward is

    1.0   the expression uses every given number exactly once and its exact value is the target
    0.1   it uses every number exactly once, but its value is another
    0.0   anything else: other numbers, other symbols, a division by zero, text beyond the bounds

The 0.1 tells a small model that has not yet hit a target which way is forward. A response that was cut off
is anything else, unless it closed its answer tag before.

A completion is the expression itself, as a small model of characters writes it, or free text in which the
last `<answer>…</answer>` holds it; `expression = 46` is accepted there where the 46 is right. Intermediate
values may be fractions or negative.

A spoiled demonstration uses the right numbers and misses the target.
"""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewards.settings import TaskSettings
from rewards.tasks.base import Row, TaskData, column, corrupted
from rewards.tasks.expression import MAX_DIGITS, Evaluated, ExpressionError, evaluate

RIGHT_NUMBERS = 0.1
LARGEST_TARGET = 99
OPEN_TAG, CLOSE_TAG = "<answer>", "</answer>"
# So many draws without a new instance mean that there are (almost) no more.
MAX_FRUITLESS_DRAWS = 20_000


@dataclass(frozen=True, slots=True)
class Solution:
    """An expression, its value, and the operator that it was made with last ("" for a number)."""

    text: str
    value: int
    operator: str = ""


@dataclass(frozen=True, slots=True)
class Instance:
    """Numbers in the order they are shown, a target, and one solution."""

    numbers: tuple[int, ...]
    target: int
    solution: str

    @property
    def key(self) -> tuple[tuple[int, ...], int]:
        """What makes two instances the same puzzle: the order of the numbers does not matter."""
        return tuple(sorted(self.numbers)), self.target

    @property
    def prompt(self) -> str:
        """The numbers and the target, short enough for a model of characters."""
        return f"{' '.join(map(str, self.numbers))}={self.target}:"

    def row(self) -> Row:
        """A data row; `answer` is one of possibly many solutions, for people to read."""
        return {
            "prompt": self.prompt,
            "answer": self.solution,
            "numbers": list(self.numbers),
            "target": self.target,
        }


class CountdownTask:
    """See the module's text."""

    def alphabet(self) -> str:
        """Digits, space, operators, parentheses, and the marks of a prompt."""
        return "0123456789 +-*/()=:"

    def generate(self, settings: TaskSettings) -> TaskData:
        """Solvable instances; no held-out puzzle is in the others, with its numbers in any order."""
        rng = random.Random(settings.seed)
        heldout = _distinct(rng, settings, "heldout_size", settings.heldout_size, set())
        kept_apart = {instance.key for instance in heldout}
        train = _distinct(rng, settings, "train_size", settings.train_size, kept_apart)
        demonstrations = []
        for spoil in corrupted(settings.demonstrations, settings.corruption):
            instance = _instance(rng, settings.numbers, settings.largest)
            while instance is None or instance.key in kept_apart:
                instance = _instance(rng, settings.numbers, settings.largest)
            completion = _miss(rng, instance) if spoil else instance.solution
            demonstrations.append({"prompt": instance.prompt, "completion": completion})
        return TaskData(
            train=[instance.row() for instance in train],
            heldout=[instance.row() for instance in heldout],
            demonstrations=demonstrations,
        )

    def gold(self, row: Mapping[str, Any], completion: str, finished: bool) -> float:
        """1.0, 0.1 or 0.0, as the module's text says."""
        numbers = column(row, "numbers", (list, tuple))
        target = column(row, "target", int)
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError(
                f"the row's column 'numbers' is {numbers!r:.80}: it is not a list of whole numbers"
            )
        text = expression_text(completion, finished)
        if text is None:
            return 0.0
        try:
            result = _checked(text)
        except ExpressionError:
            return 0.0
        if Counter(result.numbers) != Counter(numbers):
            return 0.0
        return 1.0 if result.value == target else RIGHT_NUMBERS


def expression_text(completion: str, finished: bool) -> str | None:
    """Where the answer stands: in the last closed tag, else after the last open one, else everywhere.

    None if the response was cut off before it gave a whole answer.
    """
    end = completion.rfind(CLOSE_TAG)
    start = completion.rfind(OPEN_TAG, 0, end) if end >= 0 else -1
    if start >= 0:
        return completion[start + len(OPEN_TAG) : end]
    if not finished:
        return None
    return completion[completion.rfind(OPEN_TAG) + len(OPEN_TAG) :] if OPEN_TAG in completion else completion


def _checked(text: str) -> Evaluated:
    """Evaluate `expression` or `expression = value`, where the value claimed must be right."""
    left, equals, right = text.partition("=")
    result = evaluate(left)
    if equals:
        claim = right.strip()
        if not (claim.isascii() and claim.isdigit() and len(claim) <= MAX_DIGITS):
            raise ExpressionError("what stands after '=' is no number")
        if int(claim) != result.value:
            raise ExpressionError(f"the expression does not equal {claim}")
    return result


# --- Generation ------------------------------------------------------------------------------------------


def _distinct(
    rng: random.Random,
    settings: TaskSettings,
    size_name: str,
    size: int,
    kept_apart: set[tuple[tuple[int, ...], int]],
) -> list[Instance]:
    """`size` instances with different prompts, none a puzzle in `kept_apart`."""
    found: dict[str, Instance] = {}
    fruitless = 0
    while len(found) < size:
        instance = _instance(rng, settings.numbers, settings.largest)
        if instance is None or instance.key in kept_apart or instance.prompt in found:
            fruitless += 1
            if fruitless >= MAX_FRUITLESS_DRAWS:
                raise ValueError(
                    f"task.{size_name} = {size}, but only about {len(found)} different prompts exist with "
                    f"task.numbers = {settings.numbers} from 1 to task.largest = {settings.largest}"
                    f"{' beside the held-out ones' if kept_apart else ''}; lower the size, or raise "
                    "task.numbers or task.largest"
                )
            continue
        found[instance.prompt] = instance
        fruitless = 0
    return list(found.values())


def _instance(rng: random.Random, count: int, largest: int) -> Instance | None:
    """A random puzzle with a target from 1 to 99, or None if the draw gave no such target."""
    numbers = tuple(rng.randint(1, largest) for _ in range(count))
    solution = _solution(rng, numbers, LARGEST_TARGET)
    return Instance(numbers, solution.value, solution.text) if solution else None


def _miss(rng: random.Random, instance: Instance) -> str:
    """An expression of the right numbers whose value is not the target; there always is one."""
    while True:
        attempt = _solution(rng, instance.numbers, None)
        if attempt is not None and attempt.value != instance.target:
            return attempt.text


def _solution(rng: random.Random, numbers: tuple[int, ...], at_most: int | None) -> Solution | None:
    """Join two random parts, the larger first, by a random operator until one part is left.

    All values are whole and positive. None if the last step cannot give a value of `at_most`.
    """
    parts = [Solution(str(number), number) for number in numbers]
    while len(parts) > 1:
        rng.shuffle(parts)
        left, right = sorted((parts.pop(), parts.pop()), key=lambda part: part.value, reverse=True)
        values = _values(left.value, right.value)
        if not parts and at_most is not None:
            values = {operator: value for operator, value in values.items() if value <= at_most}
        if not values:
            return None
        operator = rng.choice(list(values))
        parts.append(Solution(_join(left, operator, right), values[operator], operator))
    return parts[0]


def _values(left: int, right: int) -> dict[str, int]:
    """What each operator makes of left ≥ right ≥ 1, where that is whole and positive."""
    values = {"+": left + right, "*": left * right}
    if left > right:
        values["-"] = left - right
    if left % right == 0:
        values["/"] = left // right
    return values


def _join(left: Solution, operator: str, right: Solution) -> str:
    """The text of left ∘ right with as few parentheses as keep its value."""
    first, second = left.text, right.text
    tight = operator in ("*", "/")
    if tight and left.operator in ("+", "-"):
        first = f"({first})"
    right_is_sum = right.operator in ("+", "-")
    if (right_is_sum and operator != "+") or (right.operator and operator == "/"):
        second = f"({second})"
    return f"{first}{operator}{second}"

"""Programs: write a one-line function that does what a line of words says.

`number, add 3, times 2>` wants a program such as `def f(x):return (x+3)*2`. The steps follow each other in
order, on a number, a list of numbers or a text. The gold reward is the share of the row's tests that the
program passes in the sandbox; a response that was cut off passes none.

The tests never stand in a prompt: `f` is called with the fixed inputs below, and no instance has the same
answer to most of them. Prompts that differ in words but ask for the same function (`add 1, add 2` and
`add 3`) count as one when held-out prompts are kept apart from the others.

A spoiled demonstration is a program in which one step is another, so that it fails a test.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rewards.base import RewardRequest
from rewards.code_reward import CodeReward, CodeSettings
from rewards.sandbox import SandboxLimits
from rewards.settings import TaskSettings
from rewards.tasks.base import Row, TaskData, corrupted

END_OF_PROMPT = ">"
MAX_PROGRAM = 48  # characters
LARGEST_VALUE = 10**6
LONGEST_VALUE = 40  # letters or entries
LETTERS = "abcde"
MAX_FRUITLESS_DRAWS = 20_000
INPUTS: dict[str, tuple[Any, ...]] = {
    "number": (-9, -4, -1, 0, 1, 2, 3, 5, 8, 13),
    "list": ([3, 1, 2, 5], [7, 7, -2, 0], [-5, 4, 9, 1, 6], [8, 2, 6, 4, 3, 1], [0, -1, 10, 12]),
    "text": ("ab", "Zoo", "kitten", "a b c", "HeadRace"),
}
CODE = CodeSettings(entry_point="f")

# How tightly an expression holds together: what must be put into parentheses before a step is applied.
SUM, PRODUCT, POWER, ATOM = range(4)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its words, the kinds of value before and after, its code, and what it computes.

    `needs` is how tightly the code before must hold together, `gives` how tightly the code with it does.
    """

    words: str
    before: str
    after: str
    code: str
    needs: int
    gives: int
    compute: Callable[[Any], Any]


Steps = dict[str, dict[str, list[Step]]]  # by the kind of value before, and the first word


@dataclass(frozen=True, slots=True)
class Instance:
    """The steps of one program, and what it answers to the inputs of its kind."""

    kind: str
    steps: tuple[Step, ...]
    outputs: tuple[Any, ...]

    @property
    def key(self) -> tuple[str, str]:
        """What makes two instances the same function."""
        return self.kind, repr(self.outputs)

    @property
    def prompt(self) -> str:
        """The kind and the steps in words."""
        return f"{', '.join((self.kind, *(step.words for step in self.steps)))}{END_OF_PROMPT}"

    @property
    def program(self) -> str:
        """The steps as Python."""
        code, tightness = "x", ATOM
        for step in self.steps:
            inner = code if tightness >= step.needs else f"({code})"
            code, tightness = step.code.replace("@", inner), step.gives
        return f"def f(x):return {code}"

    def row(self) -> Row:
        """A data row; `answer` is one of many programs that pass."""
        tests = [
            {"input": [one], "output": output}
            for one, output in zip(INPUTS[self.kind], self.outputs, strict=True)
        ]
        return {"prompt": self.prompt, "answer": self.program, "tests": tests}


class ProgramsTask:
    """See the module's text."""

    def alphabet(self) -> str:
        """Every character of the words, the code and the numbers."""
        steps = _steps(9)
        return "".join(sorted({*"0123456789, x()def:return>", *"".join(INPUTS), *_texts(steps)}))

    def generate(self, settings: TaskSettings) -> TaskData:
        """Distinct prompts for training and held-out rows; demonstrations of any function not held out."""
        rng = random.Random(settings.seed)
        steps = _by_kind_and_word(settings.largest)
        heldout = _distinct(rng, steps, settings, "heldout_size", set())
        kept_apart = {instance.key for instance in heldout}
        train = _distinct(rng, steps, settings, "train_size", kept_apart)
        demonstrations = []
        for spoil in corrupted(settings.demonstrations, settings.corruption):
            instance = None
            while instance is None or instance.key in kept_apart:
                instance = _instance(rng, steps, settings.numbers)
            shown = _spoiled(rng, steps, instance) if spoil else instance
            demonstrations.append({"prompt": instance.prompt, "completion": shown.program})
        return TaskData(
            train=[instance.row() for instance in train],
            heldout=[instance.row() for instance in heldout],
            demonstrations=demonstrations,
        )

    def gold(self, row: Mapping[str, Any], completion: str, finished: bool) -> float:
        """The share of tests passed. It starts a sandbox for this one program; a run keeps one instead."""
        reward = CodeReward("gold", CODE, SandboxLimits())
        try:
            return reward.score_one(RewardRequest("", completion, row, finished)).value
        finally:
            reward.close()


# --- Generation ------------------------------------------------------------------------------------------


def _by_kind_and_word(largest: int) -> Steps:
    """Every step there is, by the kind of value before it and its first word."""
    steps: Steps = {kind: {} for kind in INPUTS}
    for step in _steps(largest):
        steps[step.before].setdefault(step.words.split()[0], []).append(step)
    return steps


def _steps(largest: int) -> list[Step]:
    """Every step there is, with constants from 1 to `largest`."""
    steps = [
        Step("square", "number", "number", "@**2", ATOM, POWER, lambda x: x**2),
        Step("negate", "number", "number", "-@", POWER, PRODUCT, lambda x: -x),
        Step("abs", "number", "number", "abs(@)", SUM, ATOM, abs),
        Step("sum", "list", "number", "sum(@)", SUM, ATOM, sum),
        Step("max", "list", "number", "max(@)", SUM, ATOM, max),
        Step("min", "list", "number", "min(@)", SUM, ATOM, min),
        Step("first", "list", "number", "@[0]", ATOM, ATOM, lambda x: x[0]),
        Step("last", "list", "number", "@[-1]", ATOM, ATOM, lambda x: x[-1]),
        Step("sort", "list", "list", "sorted(@)", SUM, ATOM, sorted),
        Step("tail", "list", "list", "@[1:]", ATOM, ATOM, lambda x: x[1:]),
        Step("upper", "text", "text", "@.upper()", ATOM, ATOM, lambda x: x.upper()),
    ]
    for kind in ("list", "text"):
        steps += [
            Step("reverse", kind, kind, "@[::-1]", ATOM, ATOM, lambda x: x[::-1]),
            Step("double", kind, kind, "@*2", PRODUCT, PRODUCT, lambda x: x * 2),
            Step("length", kind, "number", "len(@)", SUM, ATOM, len),
        ]
    for constant in range(1, largest + 1):
        steps += _number_steps(constant)
    for letter in LETTERS:
        steps += _text_steps(letter)
    return steps


def _number_steps(n: int) -> list[Step]:
    return [
        Step(f"add {n}", "number", "number", f"@+{n}", SUM, SUM, lambda x: x + n),
        Step(f"minus {n}", "number", "number", f"@-{n}", SUM, SUM, lambda x: x - n),
        Step(f"times {n}", "number", "number", f"@*{n}", PRODUCT, PRODUCT, lambda x: x * n),
        Step(f"mod {n}", "number", "number", f"@%{n}", PRODUCT, PRODUCT, lambda x: x % n),
    ]


def _text_steps(letter: str) -> list[Step]:
    return [
        Step(f"append {letter}", "text", "text", f"@+'{letter}'", SUM, SUM, lambda x: x + letter),
        Step(f"prepend {letter}", "text", "text", f"'{letter}'+@", SUM, SUM, lambda x: letter + x),
    ]


def _texts(steps: list[Step]) -> str:
    return "".join(step.words + step.code.replace("@", "") for step in steps)


def _instance(rng: random.Random, steps: Steps, longest: int) -> Instance | None:
    """A random program of at most `longest` steps, or None if the draw gave none that is fit."""
    kind = here = rng.choice(list(INPUTS))
    chosen = []
    for _ in range(rng.randint(1, longest)):
        # By word first, or the constants would crowd out the steps without one.
        step = rng.choice(rng.choice(list(steps[here].values())))
        chosen.append(step)
        here = step.after
    return _fit(kind, tuple(chosen))


def _fit(kind: str, steps: tuple[Step, ...]) -> Instance | None:
    """An instance that is short enough, of moderate values, and that no constant passes most tests of."""
    outputs = []
    for given in INPUTS[kind]:
        value = given
        for step in steps:
            if isinstance(value, list) and not value:
                return None  # the empty list has no first, last, largest or smallest
            value = step.compute(value)
        if isinstance(value, int) and abs(value) > LARGEST_VALUE:
            return None
        if isinstance(value, str | list) and not 0 < len(value) <= LONGEST_VALUE:
            return None
        outputs.append(value)
    instance = Instance(kind, steps, tuple(outputs))
    most_frequent = max(outputs.count(output) for output in outputs)
    if len(instance.program) > MAX_PROGRAM or 2 * most_frequent > len(outputs):
        return None
    return instance


def _spoiled(rng: random.Random, steps: Steps, instance: Instance) -> Instance:
    """The same with one step exchanged, or one more at the end, so that it answers something differently."""
    last = instance.steps[-1].after
    ends = [*((step.before, step.after) for step in instance.steps), (last, last)]
    while True:
        place = rng.randrange(len(ends))
        before, after = ends[place]
        new = rng.choice([one for group in steps[before].values() for one in group if one.after == after])
        other = _fit(instance.kind, (*instance.steps[:place], new, *instance.steps[place + 1 :]))
        if other is not None and other.key != instance.key:
            return other


def _distinct(
    rng: random.Random,
    steps: Steps,
    settings: TaskSettings,
    size_name: str,
    kept_apart: set[tuple[str, str]],
) -> list[Instance]:
    """As many instances as `size_name` says, with different prompts, none a function in `kept_apart`."""
    size: int = getattr(settings, size_name)
    found: dict[str, Instance] = {}
    fruitless = 0
    while len(found) < size:
        instance = _instance(rng, steps, settings.numbers)
        if instance is None or instance.key in kept_apart or instance.prompt in found:
            fruitless += 1
            if fruitless >= MAX_FRUITLESS_DRAWS:
                raise ValueError(
                    f"task.{size_name} = {size}, but only about {len(found)} different prompts exist with at "
                    f"most task.numbers = {settings.numbers} steps and constants from 1 to task.largest = "
                    f"{settings.largest}{' beside the held-out ones' if kept_apart else ''}; lower the size, "
                    "or raise task.numbers or task.largest"
                )
            continue
        found[instance.prompt] = instance
        fruitless = 0
    return list(found.values())

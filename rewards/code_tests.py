"""The tests of a program: where a completion holds the program, what its answers must be, and which ones are.

A test is `{"input": [arguments], "output": value}`. Only the inputs go to the program; outputs are compared
here, with data that came back, so a program can pass a test in one way only: by answering it right.
(An assertion beside the program could be skipped, caught or redefined by it.)
"""

import json
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewards.user_function import plain

FENCE = "```"
LANGUAGES = ("python", "python3", "py")
MAX_TESTS = 256
MAX_DEPTH = 32  # of an expected output
REMEDY = 'tests are a list (or its JSON text) of {"input": [arguments], "output": value}'
ENTRY_COLUMN = "entry_point"


@dataclass(frozen=True, slots=True)
class Case:
    """One call of the program's function, and what it must answer."""

    arguments: list[Any]
    expected: Any


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many tests passed; `readable` is false if what came back were no answers, and then none did."""

    passed: int
    readable: bool


def cases_of(row: Mapping[str, Any], column: str) -> list[Case]:
    """The row's tests; ValueError says what is wrong with them."""
    if column not in row:
        found = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"the row has no column {column!r} (its columns: {found}); set reward.tests_column")
    where = f"the row's column {column!r}"
    tests = row[column]
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is text, but not JSON: {error}; {REMEDY}") from None
    tests = plain(tests, where)
    if not isinstance(tests, list) or not 1 <= len(tests) <= MAX_TESTS:
        raise ValueError(f"{where} is not a list of 1 to {MAX_TESTS} tests; {REMEDY}")
    return [_case(test, f"{where}, test {number}") for number, test in enumerate(tests)]


def _case(test: Any, where: str) -> Case:
    if not isinstance(test, dict) or set(test) != {"input", "output"} or not isinstance(test["input"], list):
        raise ValueError(f"{where}, is {test!r:.80}; {REMEDY}")
    for part in ("input", "output"):
        _refuse_unusable(test[part], f"{where}, {part!r}", MAX_DEPTH)
    return Case(test["input"], test["output"])


def _refuse_unusable(value: Any, where: str, depth: int) -> None:
    """ValueError for what JSON cannot carry, or nothing can equal."""
    if depth == 0:
        raise ValueError(f"{where}, is nested more than {MAX_DEPTH} deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}, holds {value}; only finite numbers can be compared")
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inside:
        _refuse_unusable(one, where, depth - 1)


def entry_point_of(row: Mapping[str, Any], setting: str) -> str:
    """The name of the function that the tests call: the setting, or the row's own."""
    name = setting or row.get(ENTRY_COLUMN)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"the row's column {ENTRY_COLUMN!r} is {name!r:.80}, no name of a function; correct it, or set "
            "reward.entry_point for all rows"
        )
    return name


def program_of(completion: str, finished: bool, entry_point: str = "") -> str | None:
    """The program: in a closed fence of Python, else after an open one, else the whole completion.

    Fences that say Python go before those that say nothing. Of several the last that defines `entry_point`
    holds it, else the last: a program is often followed by an example of its use, or what that prints.

    None if the response was cut off before it gave a whole program.
    """
    blocks = completion.split(FENCE)[1:]
    closed, rest = blocks[0 : len(blocks) // 2 * 2 : 2], blocks[-1] if len(blocks) % 2 else None
    fences = [_fence(block) for block in closed]
    found = [text for language, text in fences if language in LANGUAGES]
    found = found or [text for language, text in fences if not language]
    if found:
        defining = [text for text in found if entry_point and _defines(text, entry_point)]
        return (defining or found)[-1]
    if not finished:
        return None
    if rest is not None:
        language, text = _fence(rest)
        return text if not language or language in LANGUAGES else None
    return None if blocks else completion


def _fence(block: str) -> tuple[str, str]:
    """The language that a fence's first line names, or "", and the text, as far to the left as it can be."""
    first, _, text = block.partition("\n")
    return " ".join(first.lower().split()[:1]), textwrap.dedent(text)


def _defines(program: str, name: str) -> bool:
    """Whether a line of the program's own level begins the definition of `name`."""
    form = rf"^(?:(?:async +)?def|class) +{name}\b|^{name} *[:=]"
    return re.search(form, program, re.MULTILINE) is not None


# --- Answers ---------------------------------------------------------------------------------------------


class _UnreadableError(Exception):
    """What came back is not one answer for each call, in order."""


def judge(cases: list[Case], answers: bytes) -> Verdict:
    """Compare what came back with what was expected.

    Answers come one a line, in the order of the calls; missing ones at the end have failed. Anything else
    (a line too many, out of order, not of the form) can only be the program's own writing, and costs all.
    """
    lines = answers.split(b"\n")[:-1]  # what follows the last line's end was cut off
    try:
        if len(lines) > len(cases):
            raise _UnreadableError
        found = [_answer(line, number) for number, line in enumerate(lines)]
    except _UnreadableError:
        return Verdict(0, readable=False)
    right = (
        "value" in one and same(case.expected, one["value"]) for case, one in zip(cases, found, strict=False)
    )
    return Verdict(sum(right), readable=True)


def _answer(line: bytes, number: int) -> dict[str, Any]:
    try:
        answer = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, digits or depth without end
        raise _UnreadableError from None
    if not isinstance(answer, dict) or answer.get("call") != number:
        raise _UnreadableError
    if set(answer) not in ({"call", "value"}, {"call", "error"}):
        raise _UnreadableError
    return answer


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def same(expected: Any, found: Any) -> bool:
    """Whether an answer is right.

    True and False equal only themselves; whole numbers are exact, where 2.0 is 2; an expected fraction is met
    within a relative 1e-9; lists and mappings are compared entry by entry. (JSON writes tuples as lists.)
    """
    if isinstance(expected, bool) or isinstance(found, bool):
        return expected is found
    if isinstance(expected, float):
        return isinstance(found, int | float) and _close(expected, found)
    if isinstance(expected, int):
        return isinstance(found, int | float) and expected == found
    if isinstance(expected, list):
        return isinstance(found, list) and len(expected) == len(found) and all(map(same, expected, found))
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and expected.keys() == found.keys()
            and all(same(value, found[key]) for key, value in expected.items())
        )
    return type(expected) is type(found) and bool(expected == found)


def _close(expected: float, found: float) -> bool:
    try:
        return math.isclose(expected, found, rel_tol=1e-9, abs_tol=1e-12)
    except OverflowError:  # a whole number beyond all floats
        return False

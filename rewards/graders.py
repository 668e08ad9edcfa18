"""The built-in rewards: exact match, last number, regular expression, and a task's own gold reward.

A wrong completion scores 0; a row that cannot be graded (no answer, or one that is no number where a number
is wanted) is a `RewardError` that names the column, because no completion could be right.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from rewards.base import RewardError, RewardRequest, Score
from rewards.child_reward import ChildLimits, ChildReward
from rewards.final_number import close, last_number
from rewards.tasks.base import Task


class Grader(ABC):
    """A reward that grades each completion by itself; `ValueError` means that the row cannot be graded."""

    def __init__(self, label: str) -> None:
        self.label = label

    @abstractmethod
    def grade(self, request: RewardRequest) -> float:
        """The reward of one completion."""

    def score(self, requests: Sequence[RewardRequest]) -> list[Score | RewardError]:
        """One answer for each request."""
        return [self._score_one(request) for request in requests]

    def _score_one(self, request: RewardRequest) -> Score | RewardError:
        try:
            return Score(self.grade(request))
        except ValueError as error:
            return RewardError(self.label, str(error))

    def close(self) -> None:  # noqa: B027 - most graders hold nothing
        """Nothing to free."""


class ExactReward(Grader):
    """1 if the completion equals the answer, both without outer white space; else 0."""

    def __init__(self, label: str, *, column: str, ignore_case: bool) -> None:
        super().__init__(label)
        self._column = column
        self._ignore_case = ignore_case

    def grade(self, request: RewardRequest) -> float:
        """Compare."""
        answer, completion = answer_text(request.row, self._column), request.completion.strip()
        if self._ignore_case:
            answer, completion = answer.casefold(), completion.casefold()
        return float(completion == answer)


class NumericReward(Grader):
    """1 if the last number of the completion is the last number of the answer within `tolerance`; else 0.

    Reading the answer's last number too lets a column hold a worked solution that ends in "#### 42".
    """

    def __init__(self, label: str, *, column: str, tolerance: float) -> None:
        super().__init__(label)
        self._column = column
        self._tolerance = tolerance

    def grade(self, request: RewardRequest) -> float:
        """Compare; no number in the completion is a wrong answer."""
        answer = answer_number(request.row, self._column)
        found = last_number(request.completion)
        return float(found is not None and close(found, answer, self._tolerance))


class RegexReward(ChildReward):
    """1 if the pattern is found and its group 1, where it has one, equals the row's answer; else 0.

    The search runs in a killable child, since a pattern can take exponential time on an unlucky completion,
    which no signal or thread could interrupt.
    """

    def __init__(
        self, label: str, *, pattern: str, has_group: bool, column: str, limits: ChildLimits
    ) -> None:
        super().__init__(label, {"pattern": pattern}, directory=Path.cwd(), limits=limits)
        self._has_group = has_group
        self._column = column

    def score_one(self, request: RewardRequest) -> Score:
        """Search."""
        answer = answer_text(request.row, self._column) if self._has_group else None
        match = self.ask([request.completion])
        if answer is None or not match["found"]:
            return Score(float(match["found"]))
        return Score(float(match["group"] is not None and match["group"].strip() == answer))


class TaskReward(Grader):
    """The gold reward of a generated task."""

    def __init__(self, label: str, task: Task) -> None:
        super().__init__(label)
        self._task = task

    def grade(self, request: RewardRequest) -> float:
        """Ask the task."""
        return self._task.gold(request.row, request.completion, request.finished)


def answer_text(row: Mapping[str, Any], column: str) -> str:
    """The row's answer as text; ValueError names the column if there is none to grade by."""
    if column not in row:
        found = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"the row has no column {column!r} (its columns: {found}); set reward.answer_column")
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        message = f"the row's column {column!r} is {value!r:.80}, neither text nor a number"
        raise ValueError(message)  # noqa: TRY004 - a row that cannot be graded is a ValueError
    text = str(value).strip()
    if not text:
        raise ValueError(f"the row's column {column!r} is empty")
    return text


def answer_number(row: Mapping[str, Any], column: str) -> Decimal:
    """The last number of the row's answer; ValueError if there is none to grade by."""
    text = answer_text(row, column)
    number = last_number(text)
    if number is None:
        raise ValueError(f"the row's column {column!r} holds no number: {text[:80]!r}")
    return number

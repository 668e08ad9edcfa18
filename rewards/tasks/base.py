"""What a generated task is: rows to train on and to measure with, demonstrations, and a known gold reward."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rewards.settings import TaskSettings

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TaskData:
    """The rows of a task.

    `train` and `heldout` have `prompt`, `answer` and what else the gold reward reads; their prompts are
    distinct. `demonstrations` have `prompt` and `completion`, and may repeat prompts. No held-out prompt,
    in any disguise that the task knows of, is in the other two.
    """

    train: list[Row]
    heldout: list[Row]
    demonstrations: list[Row]


class Task(Protocol):
    """A generator with its verifier. It holds no state."""

    def alphabet(self) -> str:
        """Every character of its prompts and answers, for a tokenizer of characters."""
        ...

    def generate(self, settings: TaskSettings) -> TaskData:
        """The rows; the same settings give the same rows. ValueError if there are not enough of them."""
        ...

    def gold(self, row: Mapping[str, Any], completion: str, finished: bool) -> float:
        """The true reward of a completion; ValueError only if the row is not one of this task's."""
        ...


def column(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """A column that the gold reward reads; ValueError if the row is not one of this task's."""
    value = row.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        state = f"is {value!r:.80}" if name in row else "is missing"
        message = f"the row's column {name!r} {state}: it is not a row of this generated task"
        raise ValueError(message)  # noqa: TRY004 - a row that cannot be graded is a ValueError
    return value


def corrupted(count: int, fraction: float) -> list[bool]:
    """Which of `count` demonstrations to spoil: `fraction` of them, spread evenly."""
    return [int((i + 1) * fraction + 0.5) > int(i * fraction + 0.5) for i in range(count)]

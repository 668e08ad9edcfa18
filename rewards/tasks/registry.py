"""The generated tasks by the name that `task.kind` gives them."""

from rewards.tasks.base import Task
from rewards.tasks.countdown import CountdownTask
from rewards.tasks.coverage import CoverageTask
from rewards.tasks.modes import ModesTask
from rewards.tasks.programs import ProgramsTask
from rewards.tasks.reversal import ReversalTask

TASKS: dict[str, Task] = {
    "countdown": CountdownTask(),
    "coverage": CoverageTask(),
    "modes": ModesTask(),
    "programs": ProgramsTask(),
    "reversal": ReversalTask(),
}


def get_task(kind: str) -> Task:
    """The task of a `task.kind`."""
    if kind not in TASKS:
        raise ValueError(f"task.kind = {kind!r}: choose one of {', '.join(TASKS)}")
    return TASKS[kind]

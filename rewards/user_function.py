"""A reward that is the user's own Python function, called in a child process that can be killed.

The function is named `module:function` or `path/file.py:function` and is called as
`function(prompt, completion, row)`: the row's own prompt (a string or chat messages), the response's text,
and the data row. It returns a number, or a mapping with `reward` (or `score`); the mapping's other numbers
are logged as `NAME/key`. What it prints goes to standard error. It may not be async.

It runs in a child process of its own: see `rewards.child_reward` for what a failure costs.
"""

import datetime
import decimal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.base import RewardRequest, Score
from rewards.child_process import ChildError
from rewards.child_reward import ChildLimits, ChildReward

REMEDY = "name it 'module:function' or 'path/file.py:function'"


def parse_target(function: str, directory: Path) -> dict[str, str]:
    """What `reward.function` names, for the child to load; a relative file stands in `directory`."""
    source, _, attribute = function.rpartition(":")
    if not source or not all(part.isidentifier() for part in attribute.split(".")):
        raise ValueError(f"reward.function = {function!r}: {REMEDY}")
    if source.endswith(".py") or "/" in source:
        path = (directory / Path(source).expanduser()).resolve()
        if not path.is_file():
            raise ValueError(f"reward.function = {function!r}: there is no file {path}; {REMEDY}")
        return {"file": str(path), "attribute": attribute}
    if not all(part.isidentifier() for part in source.split(".")):
        raise ValueError(f"reward.function = {function!r}: {source!r} is no module name; {REMEDY}")
    return {"module": source, "attribute": attribute}


class FunctionReward(ChildReward):
    """The user's function as a `rewards.base.Reward`."""

    def __init__(self, label: str, function: str, *, directory: Path, limits: ChildLimits) -> None:
        """Load it once in the child, so that a wrong name or signature is refused now."""
        super().__init__(label, parse_target(function, directory), directory=directory, limits=limits)
        try:
            self.start()
        except ChildError as error:
            raise ValueError(
                f"reward.function = {function!r} cannot be used: {error}; correct it, or {REMEDY}"
            ) from error

    def score_one(self, request: RewardRequest) -> Score:
        """Call the function."""
        prompt, row = plain(request.prompt, "the prompt"), plain(dict(request.row), "the row")
        result = self.ask([prompt, request.completion, row])
        return Score(result["reward"], result["components"])


def plain(value: Any, where: str) -> Any:
    """What JSON can carry to the child, or a ValueError that names the place.

    Tuples and arrays become lists, array scalars numbers, dates ISO text and decimals text.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry, f"{where}, {str(key)!r}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry, f"{where}, entry {i}") for i, entry in enumerate(value)]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist(), where)
    raise ValueError(
        f"{where}, is {type(value).__name__}, which cannot be handed to a function in another process; "
        "leave that column out of the data or store it as text, numbers or lists"
    )

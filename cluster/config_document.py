"""Writes docs/configuration.md from the settings themselves: `python -m cluster.config_document`."""

import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cluster.config_file import OBJECTIVES, table_type
from rewards.settings import Settings

_INTRODUCTION = """# Configuration

A job is one TOML file: `headrace train CONFIG.toml`. Its `objective` says what it does, and so which tables
it may have: those of reinforcement learning (`ppo`, also where nothing is said) come first on this page, then
those of a reward model (`reward_model`). Any setting can be overridden on the command line with
`--set section.key=value` (`--set reward.0.weight=2` reaches into a list of tables). Unknown keys, wrong types
and contradictions are refused before anything starts. Relative paths are taken from the folder where the
command runs. Every run writes its resolved configuration to `config.toml` in its run folder.

This page is made from the code by `python -m cluster.config_document`.
"""


def document() -> str:
    """The text of docs/configuration.md."""
    parts = [_INTRODUCTION]
    for job in dict.fromkeys(OBJECTIVES.values()):
        names = [f'`"{name}"`' for name, kind in OBJECTIVES.items() if kind is job]
        parts.append(f"# `objective =` {' or '.join(names)}\n")
        for name, field in job.model_fields.items():
            table = table_type(field.annotation)
            if table is None:
                parts.append(f"## `{name}`\n\n{field.description} Default: `{_default(field)}`.\n")
                continue
            parts += _tables(name, table, is_list=get_origin(field.annotation) is list)
    return "\n".join(parts)


def _tables(name: str, table: type[Settings], *, is_list: bool = False) -> list[str]:
    """The section of a table, then those of the tables inside it."""
    header = f"[[{name}]]" if is_list else f"[{name}]"
    meaning = (table.__doc__ or "").split(": ", 1)[-1].strip().replace("\n    ", " ")
    lines = [f"## `{header}`", "", _sentence(meaning), "", "| key | type | default | what it is |"]
    lines.append("|---|---|---|---|")
    inner: list[str] = []
    for key, field in table.model_fields.items():
        nested = table_type(field.annotation)
        if nested is not None:
            inner += _tables(f"{name}.{key}", nested)
            continue
        what = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{key}` | {_type(field.annotation)} | {_default_cell(field)} | {what} |")
    return ["\n".join(lines) + "\n", *inner]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if origin is Literal:
        return " or ".join(f"`{value!r}`".replace("'", '"') for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join(_type(arg) for arg in get_args(annotation) if arg is not NoneType)
    if origin is list:
        return f"list of {_type(get_args(annotation)[0])}"
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, str(annotation))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _default_cell(field: FieldInfo) -> str:
    if field.is_required() or field.default is PydanticUndefined:
        return "required" if field.is_required() else f"`{_default(field)}`"
    return "unset" if field.default is None else f"`{_default(field)}`"


def main() -> int:
    """Write the page."""
    path = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
    path.write_text(document(), encoding="utf-8")
    sys.stdout.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

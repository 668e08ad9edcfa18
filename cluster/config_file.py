"""Reading and writing a job's configuration: TOML, `--set section.key=value`, and errors to act on."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cluster.config import ContradictionError, JobConfig
from rewards.settings import Settings

_INDEX = re.compile(r"^\d+$")


class ConfigError(ValueError):
    """The user's configuration is wrong; the message names field, value and remedy."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read `path` and apply `section.key=value` overrides in order.

    Raises ConfigError for a missing or malformed file, unknown keys, wrong types and contradictions.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give the path of a TOML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); give the path of a TOML configuration"
        ) from None
    return parse_config(text, overrides, source=str(path))


def parse_config(text: str, overrides: Sequence[str] = (), *, source: str = "configuration") -> JobConfig:
    """Parse a configuration from TOML text; see `load_config`."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: is not valid TOML: {error}") from None
    for override in overrides:
        apply_override(tables, override)
    try:
        return JobConfig.model_validate(tables)
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = [_explain(detail) for detail in details]
        more = f"\n(and {len(lines) - 5} more)" if len(lines) > 5 else ""
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines[:5]) + more) from None


def dump_config(config: JobConfig) -> str:
    """The resolved configuration as TOML; parsing it gives the same configuration back."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def apply_override(tables: dict[str, Any], override: str) -> None:
    """Set one dotted key in parsed TOML, in place. `reward.0.weight=2` reaches into a list of tables."""
    key, equals, raw = override.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        raise ConfigError(f"--set {override!r}: must look like section.key=value")
    target: Any = tables
    for name in names[:-1]:
        target = _step_into(target, name, override)
    last = names[-1]
    if isinstance(target, list):
        target[_index(target, last, override)] = _toml_value(raw)
    elif isinstance(target, dict):
        target[last] = _toml_value(raw)
    else:
        raise ConfigError(f"--set {override!r}: {'.'.join(names[:-1])} is a value, not a table")


def _step_into(target: Any, name: str, override: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, name, override)]
    if isinstance(target, dict):
        return target.setdefault(name, {})
    raise ConfigError(f"--set {override!r}: {name!r} is inside a value, not a table")


def _index(target: list[Any], name: str, override: str) -> int:
    if not _INDEX.match(name) or int(name) >= len(target):
        raise ConfigError(
            f"--set {override!r}: {name!r} must be an index below {len(target)}, as in reward.0.weight=2"
        )
    return int(name)


def _toml_value(raw: str) -> Any:
    """A TOML value where it is one (`2`, `true`, `[1, 2]`, `"x"`), else the text itself."""
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw.strip()


def _explain(detail: ErrorDetails) -> str:
    """One error as: field = value: what is wrong; remedy."""
    field = ".".join(str(part) for part in detail["loc"])
    value = detail.get("input")
    kind = detail["type"]
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(str(detail["loc"][-1]), _names_beside(detail["loc"]), n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "remove it"
        return f"{field} = {value!r}: there is no such setting; {remedy}"
    if kind == "missing":
        return f"{field}: is missing; add it"
    error = detail.get("ctx", {}).get("error")
    if isinstance(error, ContradictionError):
        return str(error)
    if error is not None:
        return f"{field}: {error}" if field else str(error)
    what = detail["msg"]
    return f"{field} = {_short(value)}: {what[0].lower()}{what[1:]}; give a value of that kind"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _names_beside(location: tuple[int | str, ...]) -> Iterable[str]:
    """The names of the settings in the table that holds the unknown one."""
    table: Any = JobConfig
    for part in location[:-1]:
        if isinstance(part, int) or table is None:
            continue
        field = table.model_fields.get(part)
        table = table_type(field.annotation) if field else None
    return list(table.model_fields) if table is not None else []


def table_type(annotation: Any) -> type[Settings] | None:
    """The settings class inside `X`, `X | None` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for arg in get_args(annotation) if (found := table_type(arg))), None)

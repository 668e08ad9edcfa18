"""Reading and writing a job's configuration: TOML, `--set section.key=value`, and errors to act on."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cluster.config import JobConfig
from cluster.iterated_job.config import RejectionJobConfig, SpinJobConfig
from cluster.preference_job.config import METHODS, PreferenceJobConfig
from cluster.reward_job.config import RewardJobConfig
from cluster.rules import ContradictionError
from cluster.supervised_job.config import SupervisedJobConfig
from learner.presets import PRESETS
from rewards.settings import Settings

AnyJobConfig = (
    JobConfig
    | RewardJobConfig
    | SupervisedJobConfig
    | SpinJobConfig
    | RejectionJobConfig
    | PreferenceJobConfig
)
OBJECTIVES: dict[str, type[AnyJobConfig]] = {
    **dict.fromkeys(PRESETS, JobConfig),
    "supervised": SupervisedJobConfig,
    "reward_model": RewardJobConfig,
    "spin": SpinJobConfig,
    "rejection": RejectionJobConfig,
    **dict.fromkeys(METHODS, PreferenceJobConfig),
}

_INDEX = re.compile(r"^\d+$")
_Config = TypeVar("_Config", bound=Settings)


class ConfigError(ValueError):
    """The user's configuration is wrong; the message names field, value and remedy."""


def load_job(path: Path, overrides: Sequence[str] = ()) -> AnyJobConfig:
    """Read `path` and apply `section.key=value` overrides in order; its `objective` says what it is.

    Raises ConfigError for a missing or malformed file, unknown keys, wrong types and contradictions.
    """
    return parse_job(_read(path), overrides, source=str(path))


def load_config(path: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job of reinforcement learning, as `load_job` does; ConfigError for any other objective."""
    return parse_config(_read(path), overrides, source=str(path))


def parse_job(text: str, overrides: Sequence[str] = (), *, source: str = "configuration") -> AnyJobConfig:
    """Parse a job of any objective from TOML text; see `load_job`."""
    tables = _tables(text, overrides, source)
    objective = tables.get("objective", "ppo")
    kind = OBJECTIVES.get(objective) if isinstance(objective, str) else None
    if kind is None:
        raise ConfigError(
            f"{source}: objective = {objective!r}: there is no such objective; use one of "
            f"{', '.join(OBJECTIVES)}"
        )
    return validated(kind, tables, source)


def parse_config(text: str, overrides: Sequence[str] = (), *, source: str = "configuration") -> JobConfig:
    """Parse a job of reinforcement learning from TOML text; see `load_config`."""
    tables = _tables(text, overrides, source)
    objective = tables.get("objective")
    if objective in OBJECTIVES and OBJECTIVES[objective] is not JobConfig:
        raise ConfigError(
            f'{source}: objective = "{objective}" has no rollouts beside training, which this command is '
            'about; give a job with objective = "ppo", or train this one with headrace train'
        )
    return validated(JobConfig, tables, source)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give the path of a TOML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); give the path of a TOML configuration"
        ) from None


def _tables(text: str, overrides: Sequence[str], source: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: is not valid TOML: {error}") from None
    for override in overrides:
        apply_override(tables, override)
    return tables


def validated(kind: type[_Config], tables: dict[str, Any], source: str) -> _Config:
    """Settings of a kind from parsed TOML; ConfigError names up to five faults, each with its remedy."""
    try:
        return kind.model_validate(tables)
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = [_explain(detail, kind) for detail in details]
        more = f"\n(and {len(lines) - 5} more)" if len(lines) > 5 else ""
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines[:5]) + more) from None


def dump_config(config: AnyJobConfig) -> str:
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


def _explain(detail: ErrorDetails, job: type[Settings]) -> str:
    """One error as: field = value: what is wrong; remedy."""
    field = ".".join(str(part) for part in detail["loc"])
    value = detail.get("input")
    kind = detail["type"]
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(str(detail["loc"][-1]), _names_beside(detail["loc"], job), n=1)
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


def _names_beside(location: tuple[int | str, ...], job: type[Settings]) -> Iterable[str]:
    """The names of the settings in the table that holds the unknown one."""
    table: Any = job
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

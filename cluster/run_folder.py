"""The folder of a run: made once, private, and resumed only by the job that made it."""

import tomllib
from pathlib import Path
from typing import Any

from cluster.config import JobConfig
from cluster.config_file import ConfigError, dump_config

CONFIG = "config.toml"
EVENTS = "events.log"  # written from the moment that a run starts
# A resumed run may be longer, faster or watched differently; what it learns from must be the same.
_MUST_MATCH = (
    "objective",
    "model",
    "task",
    "data",
    "warmup",
    "reward",
    "ppo",
    "run.seed",
    "run.batch_size",
    "rollout.group_size",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "learner.ranks",
    "learner.zero_stage",
    "learner.precision",
)


def open_run_folder(run_dir: Path, config: JobConfig, *, resume: bool) -> None:
    """Make the folder (mode 0700) and write the resolved configuration, or check it against a resume.

    Raises ConfigError where the folder holds another run, or a resume changes what must stay the same.
    """
    written = run_dir / CONFIG
    if resume:
        if not written.exists():
            raise ConfigError(
                f"--resume: {run_dir} holds no run to resume; check --run-dir or leave out --resume"
            )
        _refuse_changes(tomllib.loads(written.read_text(encoding="utf-8")), config)
    elif run_dir.exists() and not _is_free(run_dir):
        raise ConfigError(
            f"--run-dir {run_dir}: is not an empty folder; name a new one, or go on with its run by --resume"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        run_dir.chmod(0o700)
        written.write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--run-dir {run_dir}: cannot be written ({error}); name a writable folder"
        ) from None


def _is_free(run_dir: Path) -> bool:
    """Whether a run may begin here: an empty folder, or one whose run was refused before it started."""
    if not run_dir.is_dir():
        return False
    return not any(run_dir.iterdir()) or ((run_dir / CONFIG).exists() and not (run_dir / EVENTS).exists())


def _refuse_changes(before: dict[str, Any], config: JobConfig) -> None:
    now = tomllib.loads(dump_config(config))
    for name in _MUST_MATCH:
        old, new = _look_up(before, name), _look_up(now, name)
        if old != new:
            where, old, new = _first_difference(name, old, new)
            raise ConfigError(
                f"--resume: {where} = {new!r}, but the run was started with {old!r}; set it back, "
                "or start a new run"
            )


def _look_up(tables: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        tables = tables.get(name) if isinstance(tables, dict) else None
    return tables


def _first_difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return _first_difference(f"{name}.{key}", old.get(key), new.get(key))
    return name, old, new

"""The folder of a run: made once, private, and resumed only by the job that made it."""

import contextlib
import fcntl
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

from cluster.config_file import AnyJobConfig, ConfigError, dump_config
from cluster.preference_job.config import METHODS
from learner.presets import PRESETS

CONFIG = "config.toml"
INPUTS = "inputs"
QUARANTINE = "quarantine.jsonl"
STAGES = "stages"
_LOCK = ".lock"
# A resumed run may be longer, faster or watched differently; what it learns from must be the same.
_MUST_MATCH = {
    "ppo": (
        "objective",
        "model",
        "task",
        "data",
        "warmup",
        "reward",
        "ppo",
        "optimizer.betas",
        "optimizer.eps",
        "optimizer.weight_decay",
        "scoring.missing_eos_penalty",
        "run.seed",
        "run.batch_size",
        "run.evaluate_prompts",
        "run.evaluate_samples",
        "rollout.group_size",
        "rollout.max_new_tokens",
        "rollout.temperature",
        "rollout.dynamic_sampling",
        "learner.ranks",
        "learner.zero_stage",
        "learner.precision",
    ),
    "supervised": (
        "objective",
        "model",
        "task",
        "data",
        "supervised",
        "run.seed",
        "run.steps",
        "run.batch_size",
        "learner.ranks",
        "learner.zero_stage",
        "learner.precision",
    ),
    "reward_model": (
        "objective",
        "model",
        "preferences",
        "reward_model",
        "optimizer",
        "run.seed",
        "run.epochs",
        "run.batch_size",
        "learner.ranks",
        "learner.zero_stage",
        "learner.precision",
    ),
}

_MUST_MATCH |= dict.fromkeys(PRESETS, _MUST_MATCH["ppo"])
_MUST_MATCH["online_dpo"] += ("online_dpo",)
_MUST_MATCH |= {
    name: (
        *("objective", "model", "task", "data", "warmup", "reward", name, "optimizer"),
        *("run.seed", "run.prompts", "run.updates", "run.batch_size"),
        *("run.evaluate_prompts", "run.evaluate_samples", "scoring.missing_eos_penalty"),
        *("rollout.group_size", "rollout.max_new_tokens", "rollout.temperature"),
        *("learner.ranks", "learner.zero_stage", "learner.precision"),
    )
    for name in ("spin", "rejection")
}
_MUST_MATCH |= {
    name: (
        "objective",
        "model",
        "preferences",
        "text",
        "warmup",
        name,
        "optimizer",
        "run.seed",
        "run.epochs",
        "run.batch_size",
        "learner.ranks",
        "learner.zero_stage",
        "learner.precision",
    )
    for name in METHODS
}


class RunFolder:
    """The folder of one run, locked by this process until `close`."""

    def __init__(self, run_dir: Path, config: AnyJobConfig, *, resume: bool) -> None:
        """Make the folder (mode 0700) and write the resolved configuration, or check it against a resume.

        Raises ConfigError where the folder holds other things, its run is still going on, or a resume changes
        what must stay the same.
        """
        self.path = run_dir
        self._is_new = not resume
        written = run_dir / CONFIG
        if resume and not written.exists():
            raise ConfigError(
                f"--resume: {run_dir} holds no run to resume; check --run-dir or leave out --resume"
            )
        if not resume and run_dir.exists() and (not run_dir.is_dir() or _holds_other_things(run_dir)):
            raise ConfigError(
                f"--run-dir {run_dir}: is not an empty folder; name a new one, or continue with --resume"
            )
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            run_dir.chmod(0o700)
            self._lock = _lock(run_dir)
        except OSError as error:
            raise ConfigError(
                f"--run-dir {run_dir}: cannot be written ({error}); name a writable folder"
            ) from None
        try:
            if resume:
                refuse_changes(tomllib.loads(written.read_text(encoding="utf-8")), config)
            else:
                written.write_text(dump_config(config), encoding="utf-8")
        except ConfigError:
            self.close()
            raise

    def accept(self, config: AnyJobConfig) -> None:
        """Write the configuration of a resume that has been found to be possible."""
        (self.path / CONFIG).write_text(dump_config(config), encoding="utf-8")

    def discard(self) -> None:
        """Take back what a refused new run wrote, so that the folder can be used again."""
        if self._is_new:
            shutil.rmtree(self.path / INPUTS, ignore_errors=True)
            for name in (CONFIG, QUARANTINE, _LOCK):
                (self.path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else came into it meanwhile: it stays
                self.path.rmdir()

    def close(self) -> None:
        """Give the folder free."""
        os.close(self._lock)


def _holds_other_things(run_dir: Path) -> bool:
    """Whether a folder is not fit for a new run; the demo's earlier stages may lie in it."""
    return any(path.name != STAGES for path in run_dir.iterdir())


def _lock(run_dir: Path) -> int:
    """Hold the folder; ConfigError if another process does. The kernel frees it however a process ends."""
    lock = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            f"--run-dir {run_dir}: its run is still going on in another process; wait for it or stop it"
        ) from None
    return lock


def refuse_changes(before: dict[str, Any], config: AnyJobConfig) -> None:
    """Raise ConfigError where a resume would train something else than the run it goes on with."""
    now = tomllib.loads(dump_config(config))
    for name in _MUST_MATCH[config.objective]:
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

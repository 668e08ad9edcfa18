"""The copy of a run in Weights & Biases: the one file of this package that imports wandb.

The local files are the truth. Whatever fails here is counted and said once; it never stops training.
"""

import contextlib
import netrc
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.monitor_settings import MonitorSettings
from cluster.redact import redact, scrub

ID_FILE = "wandb_id"
LEARNER_AXIS = "learner_step"
WARMUP_AXIS = "warmup/step"


Mode = Literal["online", "offline", "disabled"]


def wandb_mode(settings: MonitorSettings) -> Mode:
    """online, offline or disabled: as set, or by whether a key can be found."""
    if settings.wandb != "auto":
        return settings.wandb
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted == "disabled":
        return "disabled"
    if wanted == "offline":
        return "offline"
    return "online" if os.environ.get("WANDB_API_KEY") or _has_login() else "offline"


def _has_login() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def stored_id(run_dir: Path) -> str:
    """The W&B id of the run folder, made once and kept, so that a resumed run is the same run."""
    path = run_dir / ID_FILE
    if path.is_file() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    made = uuid.uuid4().hex[:12]
    path.write_text(made + "\n", encoding="utf-8")
    return made


class WandbCopy:
    """Sends rows, sample tables and the summary to W&B; `errors` counts what could not be sent."""

    def __init__(
        self,
        run_dir: Path,
        settings: MonitorSettings,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self.errors = 0
        self.mode = wandb_mode(settings)
        self._warn = warn
        self._run: Any = None
        if self.mode == "disabled":
            return
        with self._guarded("start"):
            self._run = self._start(run_dir, settings, config, self.mode)
        if self._run is None and self.mode == "online":
            self.mode = "offline"
            with self._guarded("start offline"):
                _forget_failed_start()
                self._run = self._start(run_dir, settings, config, self.mode)

    def _start(self, run_dir: Path, settings: MonitorSettings, config: Mapping[str, Any], mode: Mode) -> Any:
        import wandb

        options = wandb.Settings(
            init_timeout=settings.start_timeout_s,
            login_timeout=settings.start_timeout_s,
            finish_timeout=settings.finish_timeout_s,
            finish_timeout_raises=False,
            silent=True,
            console="off",
            # Arguments, git addresses and code can hold secrets; the configuration says what was run.
            x_disable_meta=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
        )
        run = wandb.init(
            dir=str(run_dir),
            id=stored_id(run_dir),
            name=run_dir.name,
            resume="allow",
            mode=mode,
            project=settings.project,
            entity=settings.entity or None,
            group=settings.group or None,
            tags=list(settings.tags),
            config=redact(config),
            settings=options,
        )
        run.define_metric(LEARNER_AXIS, hidden=True)
        run.define_metric(WARMUP_AXIS, hidden=True)
        run.define_metric("warmup/*", step_metric=WARMUP_AXIS)
        run.define_metric("*", step_metric=LEARNER_AXIS)
        return run

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of numbers; nulls are left out, as W&B has no null."""
        if self._run is not None:
            with self._guarded("log"):
                self._run.log({name: value for name, value in row.items() if value is not None})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of samples."""
        if self._run is None or not rows:
            return
        with self._guarded("log samples"):
            import wandb

            columns = list(dict.fromkeys(name for row in rows for name in row))
            data = [[_cell(row.get(name)) for name in columns] for row in rows]
            self._run.log({LEARNER_AXIS: step, "samples": wandb.Table(columns=columns, data=data)})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Values of the run's overview."""
        if self._run is not None:
            with self._guarded("summary"):
                self._run.summary.update({name: value for name, value in values.items() if value is not None})

    def finish(self, exit_code: int) -> None:
        """End the run; waits for uploads no longer than `finish_timeout_s`."""
        if self._run is not None:
            with self._guarded("finish"):
                self._run.finish(exit_code=exit_code)
            self._run = None

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a copy's failure is counted and said, training goes on
            self.errors += 1
            if self.errors == 1:
                self._warn(
                    scrub(
                        f"W&B could not {what}: {type(error).__name__}: {error}. Training goes on; the local "
                        "files have everything, and further failures are only counted (monitor/wandb_errors)"
                    )
                )


def _forget_failed_start() -> None:
    """End wandb's service process, which still holds the run's id; the next start makes a new one."""
    import wandb

    wandb.teardown()


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else str(value)

"""The copy of a run in Weights & Biases: the one file of this package that imports wandb.

    Monitor ─► WandbCopy ─► a bounded list of calls ─► one thread ─► wandb's own process ─► disk, W&B

The local files are the truth. Whatever fails, hangs or finds no room here is counted and said once; it never
stops or slows training. A thread is needed for that: wandb's calls wait for its process without a deadline.
"""

import contextlib
import netrc
import os
import shlex
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.background import Background
from cluster.monitor_settings import MonitorSettings
from cluster.redact import redact, scrub
from cluster.wandb_layout import LEARNER_AXIS, SAMPLE_COLUMNS, WARMUP_AXIS, definitions, sample_cells

__all__ = ["LEARNER_AXIS", "WARMUP_AXIS", "WandbCopy", "stored_id", "wandb_mode"]

ID_FILE = "wandb_id"
_ROOM = 1000  # calls that may wait for wandb
_GRACE_S = 5.0  # beyond wandb's own deadline at the end, before its process is given up
_LONGEST_TITLE = 63  # W&B refuses longer titles of alerts
_DATA_DIR = "WANDB_DATA_DIR"

_PUBLIC_HOSTS = {"api.forge.coreweave.com", "api.wandb.ai"}  # the new and the old name of W&B's own server

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
    has_key = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    return "online" if has_key or _has_login() else "offline"


def _has_login() -> bool:
    """Whether `wandb login` has left a key for the server, where wandb itself will look for it."""
    server = os.environ.get("WANDB_BASE_URL", "")
    hosts = {urlsplit(server).netloc} if server else _PUBLIC_HOSTS
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return not hosts.isdisjoint(netrc.netrc(path).hosts)
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
    """Sends rows, samples, alerts, the report and the summary to W&B; every method returns at once.

    Args:
        run_dir: the run folder; wandb's files and what waits for a later `wandb sync` lie in it.
        settings: `[monitor]`.
        config: the job's configuration; redacted here.
        first_row: where W&B's own count of rows begins if an earlier start of the run was offline.
        earlier: samples of earlier starts, which wandb forgets when it is offline.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: MonitorSettings,
        config: Mapping[str, Any],
        *,
        first_row: int = 0,
        earlier: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.mode = wandb_mode(settings)
        self._run_dir = run_dir
        self._settings = settings
        self._first_row: int | None = first_row or None
        self._earlier = earlier
        self._run: Any = None
        self._table: Any = None
        self._own_data_dir = False
        self._incomplete = False
        self._background: Background | None = None
        if self.mode == "disabled":
            return
        config = redact(config)
        self._background = Background("wandb", _ROOM)
        self._background.do("start", lambda: self._start(config))

    @property
    def errors(self) -> int:
        """What could not be sent."""
        return self._background.errors if self._background is not None else 0

    # ---- what the monitor asks for, at once ----------------------------------------------------------------

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of numbers; nulls are left out, as W&B has no null."""
        values = {name: value for name, value in row.items() if value is not None}
        self._do("log", lambda: self._log(values))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows for the table of samples, which grows."""
        if rows:
            cells = [sample_cells(step, row) for row in rows]
            self._do("log samples", lambda: self._add_samples(step, cells))

    def alert(self, title: str, text: str, *, serious: bool) -> None:
        """A message to whoever follows the run: W&B sends it by mail or chat, as they have set there."""
        level = "ERROR" if serious else "WARN"
        self._do("send an alert", lambda: self._run.alert(title[:_LONGEST_TITLE], text, level=level))

    def report(self, path: Path) -> None:
        """The report, as a panel and as a file of the run."""
        self._do("send the report", lambda: self._send_report(path))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Values of the run's overview."""
        known = {name: value for name, value in values.items() if value is not None}
        self._do("write the summary", lambda: self._run.summary.update(known))

    def finish(self, exit_code: int) -> None:
        """End the run; waits for uploads no longer than `finish_timeout_s`, then leaves them for later."""
        if self._background is None:
            return
        seconds = self._settings.finish_timeout_s + _GRACE_S
        if self._run is None:  # it may still be starting
            seconds += self._settings.start_timeout_s
        if not self._background.close("finish", lambda: self._finish(exit_code), seconds):
            self._incomplete = True
            self._background.abandon()
            self._background.failed("finish", TimeoutError(f"no answer within {seconds:g} s"))
            _end_service()
        self._forget_data_dir()

    def news(self) -> str | None:
        """What the user should be told: the first failure, once."""
        first = self._background.take_first_error() if self._background is not None else None
        if first is None:
            return None
        return scrub(
            f"W&B could not {first}. Training goes on; the local files have everything, and further failures "
            "are only counted (monitor/wandb_errors)"
        )

    def sync_command(self) -> str | None:
        """How to send later what is not yet in W&B; None if all is there or nothing was to be sent."""
        folders = self._run_dir.resolve() / "wandb"
        if self.mode == "disabled" or not folders.is_dir():
            return None
        if self.mode == "offline":
            return f"wandb sync {shlex.quote(str(folders))}/offline-run-*"
        return f"wandb sync --include-online {shlex.quote(str(folders))}/run-*" if self._incomplete else None

    def _do(self, what: str, call: Any) -> None:
        if self._background is not None:
            self._background.do(what, lambda: call() if self._run is not None else None)

    # ---- in the thread -------------------------------------------------------------------------------------

    def _start(self, config: Mapping[str, Any]) -> None:
        if not os.environ.get(_DATA_DIR):  # files that wait for `wandb sync` stay with the run
            os.environ[_DATA_DIR] = str(self._run_dir.resolve() / "wandb" / "data")
            self._own_data_dir = True
        try:
            self._run = self._begin(config, self.mode)
        except Exception as error:
            if self.mode != "online":
                self.mode = "disabled"
                raise
            assert self._background is not None
            self._background.failed("start online, so the copy is kept offline", error)
            self.mode = "disabled"  # until it is offline
            _forget_failed_start()
            self._run = self._begin(config, "offline")
            self.mode = "offline"

    def _begin(self, config: Mapping[str, Any], mode: Mode) -> Any:
        import wandb

        settings = self._settings
        options = wandb.Settings(
            init_timeout=settings.start_timeout_s,
            login_timeout=settings.start_timeout_s,
            finish_timeout=settings.finish_timeout_s,
            finish_timeout_raises=True,
            silent=True,
            console="off",
            # Arguments, git addresses and code can hold secrets; the configuration says what was run.
            x_disable_meta=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
        )
        run = wandb.init(
            dir=str(self._run_dir),
            id=stored_id(self._run_dir),
            name=self._run_dir.name,
            resume="allow",
            mode=mode,
            project=settings.project,
            entity=settings.entity or None,
            group=settings.group or None,
            job_type=settings.job_type or None,
            notes=scrub(settings.notes) or None,
            tags=list(settings.tags) or None,
            config=dict(config),
            settings=options,
        )
        os.environ.pop("WANDB_SERVICE", None)  # the actors' processes are not to join this run
        for one in definitions():
            run.define_metric(one.name, step_metric=one.axis, summary=one.summary, hidden=one.hidden or None)
        return run

    def _log(self, values: Mapping[str, Any]) -> None:
        if self._first_row is not None and self.mode == "offline":
            # Rows of an earlier start have the numbers below; online, W&B itself knows where to go on.
            self._run.log(dict(values), step=self._first_row, commit=True)
        else:
            self._run.log(dict(values))
        self._first_row = None

    def _add_samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        if self._table is None:
            self._table = self._new_table()
        for cells in rows:
            self._table.add_data(*cells)
        self._log({LEARNER_AXIS: step, "samples": self._table})

    def _new_table(self) -> Any:
        import wandb

        table = wandb.Table(
            columns=list(SAMPLE_COLUMNS), dtype=list(SAMPLE_COLUMNS.values()), log_mode="INCREMENTAL"
        )
        if not self._run.resumed:  # a resumed online run has its earlier samples in W&B
            for row in self._earlier:
                table.add_data(*sample_cells(row[LEARNER_AXIS], row))
        self._earlier = ()
        return table

    def _send_report(self, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"report-{self._run.id}", type="report")
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)
        self._log({"report": wandb.Html(str(path), inject=False)})

    def _finish(self, exit_code: int) -> None:
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            self._incomplete = True
            raise

    def _forget_data_dir(self) -> None:
        if self._own_data_dir:
            os.environ.pop(_DATA_DIR, None)
            self._own_data_dir = False


def _forget_failed_start() -> None:
    """End wandb's service process, which still holds the run's id; the next start makes a new one."""
    import wandb

    wandb.teardown()


def _end_service() -> None:
    """Kill wandb's process, which no longer answers: the end of ours would wait for it for ever."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()
    with contextlib.suppress(Exception):  # it cannot say goodbye; this only unhooks it from our exit
        _forget_failed_start()

"""One job of any objective, from configuration to summary: prepare, run, report.

What the user can mend (configuration, data, folder) is raised as ValueError before any actor starts. Whatever
fails later ends the run with one logged cause, a summary with status `failed`, and no process left behind.
"""

import asyncio
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.config_file import AnyJobConfig
from cluster.iterated_job.config import IteratedJobConfig
from cluster.monitor import Monitor
from cluster.monitor_settings import AlertKind
from cluster.preference_job.config import PreferenceJobConfig
from cluster.redact import scrub
from cluster.reward_job.config import RewardJobConfig
from cluster.run_folder import RunFolder
from cluster.supervised_job.config import SupervisedJobConfig
from cluster.visible import visible


class Run(Protocol):
    """A run of any objective, prepared and not begun."""

    config: Any
    run_dir: Path

    @property
    def step(self) -> int:
        """Learner steps begun so far."""

    @property
    def total_steps(self) -> int:
        """Learner steps of the whole run."""

    def session(self) -> AbstractContextManager[bool]:
        """Ray, with the room that the run needs; tells whether it is on CUDA."""

    def announce(self, monitor: Monitor) -> None:
        """Say which data the run has, and what about them is in doubt."""

    async def run(self, monitor: Monitor, *, cuda: bool) -> bool:
        """Run to the end; true if a stop was asked for on the way."""

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says of the run so far."""

    def write_report(self) -> Path:
        """Write the report of the run as its folder tells it."""

    def leaves(self, status: str) -> str:
        """What the run leaves beside its report, in words; empty for nothing."""


@dataclass(frozen=True)
class Kind:
    """How runs of an objective are made.

    `resumable` gives the newest good checkpoint of a folder, with what is wrong with newer ones; `prepare`
    gives a run, from a checkpoint where it has one. Both raise ValueError for what the user can mend.
    """

    resumable: Callable[[Path, Any], tuple[Path, list[str]]]
    prepare: Callable[[Any, Path, Path | None], Run]


def kind_of(config: AnyJobConfig) -> Kind:
    """The kind of run that a configuration asks for."""
    if isinstance(config, RewardJobConfig):
        from cluster.reward_job.job import KIND as REWARD_MODEL

        return REWARD_MODEL
    if isinstance(config, SupervisedJobConfig):
        from cluster.supervised_job.job import KIND as SUPERVISED

        return SUPERVISED
    if isinstance(config, PreferenceJobConfig):
        from cluster.preference_job.job import KIND as PREFERENCES

        return PREFERENCES
    if isinstance(config, IteratedJobConfig):
        from cluster.iterated_job.job import KIND as ITERATED

        return ITERATED
    from cluster.policy_run import KIND as POLICY

    return POLICY


def run_job(config: AnyJobConfig, run_dir: Path, *, resume: bool = False) -> dict[str, Any]:
    """Run a job in `run_dir` and give its summary, which is also in `summary.json`.

    Raises ValueError for what the user can mend, before any actor starts. A later failure does not raise: the
    summary's `status` is then "failed" and its `error` the cause.
    """
    started = time.perf_counter()
    kind = kind_of(config)
    folder = RunFolder(run_dir, config, resume=resume)
    try:
        found = kind.resumable(run_dir, config) if resume else None
        try:
            run = kind.prepare(config, run_dir, found[0] if found else None)
        except (ValueError, KeyboardInterrupt):
            folder.discard()
            raise
        folder.accept(config)
        return _run_and_report(run, found, started)
    finally:
        folder.close()


def _run_and_report(run: Run, found: tuple[Path, list[str]] | None, started: float) -> dict[str, Any]:
    """Run what has been prepared; write summary and report whatever comes of it."""
    settings = run.config.model_dump(mode="json")
    resume_from = run.step if found else None
    with Monitor(
        run.run_dir, run.config.monitor, settings, run.total_steps, resume_from=resume_from
    ) as monitor:
        run.announce(monitor)
        if found is not None:
            for problem in found[1]:
                monitor.event(f"warning: checkpoint {problem}; an older one is used")
            monitor.alert("restart", f"resuming from {found[0].name}")
        outcome = run_and_catch(run, monitor)
        summary = run.summary() | outcome | {"wall_s": time.perf_counter() - started}
        monitor.summary(summary)
        report = run.write_report()
        monitor.report(report)
        status = str(outcome["status"])
        monitor.event(f"{status}: " + ", ".join(filter(None, [f"report in {report}", run.leaves(status)])))
        monitor.close(0 if status == "completed" else 1)
    return summary


def run_and_catch(run: Run, monitor: Monitor) -> dict[str, Any]:
    """Run within its session of Ray; status and error."""
    try:
        with run.session() as cuda:
            stopped = asyncio.run(run.run(monitor, cuda=cuda))
    except (KeyboardInterrupt, asyncio.CancelledError):
        monitor.alert("stop", f"interrupted at step {run.step}, without waiting for it")
        return {"status": "interrupted", "error": None}
    except Exception as error:  # noqa: BLE001 - the one place where a run's failure is reported
        cause = first_cause(error)
        said = scrub(f"{type(cause).__name__}: {cause}")
        kind: AlertKind = "sync" if "SyncRefused" in said else "failure"
        monitor.alert(kind, f"failed: {said}")
        details = "".join(traceback.format_exception(cause))
        (run.run_dir / "error.txt").write_text(visible(scrub(details)), encoding="utf-8")
        return {"status": "failed", "error": said}
    if stopped:
        monitor.alert("stop", f"stopped as asked, after step {run.step}")
    return {"status": "interrupted" if stopped else "completed", "error": None}


def first_cause(error: BaseException) -> BaseException:
    """The first real error inside nested groups of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

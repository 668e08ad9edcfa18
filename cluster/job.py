"""One training job from configuration to summary: prepare, start, warm up, train, evaluate, report.

What the user can mend (configuration, data, folder) is raised as ValueError before any actor starts. Whatever
fails later ends the run with one logged cause, a summary with status `failed`, and no process left behind.
"""

import asyncio
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from cluster import checkpoint
from cluster.config import JobConfig
from cluster.config_file import AnyJobConfig, ConfigError
from cluster.heldout import EVALUATION_AFTER
from cluster.monitor import Monitor
from cluster.monitor_settings import AlertKind
from cluster.placement import ray_session
from cluster.prepare import Prepared, prepare
from cluster.redact import scrub
from cluster.report import write_report
from cluster.reward_job.config import RewardJobConfig
from cluster.run_folder import RunFolder
from cluster.supervised_job.config import SupervisedJobConfig
from cluster.training import TrainingRun


class Run(Protocol):
    """A run of any objective."""

    run_dir: Path

    @property
    def step(self) -> int:
        """Learner steps begun so far."""

    async def run(self, monitor: Monitor, *, cuda: bool) -> bool:
        """Run to the end; true if a stop was asked for on the way."""


def run_job(config: AnyJobConfig, run_dir: Path, *, resume: bool = False) -> dict[str, Any]:
    """Run a job in `run_dir` and give its summary, which is also in `summary.json`.

    Raises ValueError for what the user can mend, before any actor starts. A later failure does not raise: the
    summary's `status` is then "failed" and its `error` the cause.
    """
    if isinstance(config, RewardJobConfig):
        from cluster.reward_job.job import run_reward_job

        return run_reward_job(config, run_dir, resume=resume)
    if isinstance(config, SupervisedJobConfig):
        from cluster.supervised_job.job import run_supervised_job

        return run_supervised_job(config, run_dir, resume=resume)
    started = time.perf_counter()
    folder = RunFolder(run_dir, config, resume=resume)
    try:
        found = _checkpoint_to_resume(run_dir, config) if resume else None
        try:
            prepared = prepare(config, run_dir)
            job = TrainingRun(config, prepared, run_dir, found[0] if found else None)
        except (ValueError, KeyboardInterrupt):
            folder.discard()
            raise
        folder.accept(config)
        return _run_and_report(job, prepared, found, started)
    finally:
        folder.close()


def _checkpoint_to_resume(run_dir: Path, config: JobConfig) -> tuple[Path, list[str]]:
    """The newest good checkpoint, and what is wrong with newer ones; ConfigError if nothing is left to do."""
    found = checkpoint.latest(run_dir / "checkpoints")
    step = checkpoint.read_state(found[0])["step"]
    finished = step == config.run.steps and (run_dir / EVALUATION_AFTER).exists()
    if finished or step > config.run.steps:
        raise ConfigError(
            f"--resume: run.steps = {config.run.steps}, but the run already has {step} steps; set it higher"
        )
    return found


def _run_and_report(
    job: TrainingRun, prepared: Prepared, found: tuple[Path, list[str]] | None, started: float
) -> dict[str, Any]:
    """Run what has been prepared; write summary and report whatever comes of it."""
    config, run_dir = job.config, job.run_dir
    with Monitor(
        run_dir,
        config.monitor,
        config.model_dump(mode="json"),
        config.run.steps,
        resume_from=job.first_step if found else None,
    ) as monitor:
        _announce(monitor, prepared, found)
        outcome = run_and_catch(job, monitor, lambda: ray_session(config, run_dir))
        summary = job.summary() | outcome | {"wall_s": time.perf_counter() - started}
        monitor.summary(summary)
        report = write_report(run_dir)
        monitor.report(report)
        monitor.event(f"{summary['status']}: report in {report}, checkpoints in {run_dir / 'checkpoints'}")
        monitor.close(0 if summary["status"] == "completed" else 1)
    return summary


def _announce(monitor: Monitor, prepared: Prepared, resume_from: tuple[Path, list[str]] | None) -> None:
    prompts = prepared.prompts
    monitor.event(
        f"data: {len(prompts.train.prompts)} training and {len(prompts.heldout.prompts)} held-out prompts, "
        f"{len(prepared.demonstrations)} demonstrations"
    )
    if prepared.quarantine.counts:
        monitor.event(
            f"warning: {prepared.quarantine.counts.total()} rows were put aside "
            f"({prepared.quarantine.describe()}): see {prepared.quarantine.path}"
        )
    if resume_from is not None:
        folder, problems = resume_from
        for problem in problems:
            monitor.event(f"warning: checkpoint {problem}; an older one is used")
        monitor.alert("restart", f"resuming from {folder.name}")


def run_and_catch(
    job: Run, monitor: Monitor, session: Callable[[], AbstractContextManager[bool]]
) -> dict[str, Any]:
    """Run the job within a session of Ray, which tells whether it is on CUDA; status and error."""
    try:
        with session() as cuda:
            stopped = asyncio.run(job.run(monitor, cuda=cuda))
    except (KeyboardInterrupt, asyncio.CancelledError):
        monitor.alert("stop", f"interrupted at step {job.step}, without waiting for it")
        return {"status": "interrupted", "error": None}
    except Exception as error:  # noqa: BLE001 - the one place where a run's failure is reported
        cause = first_cause(error)
        said = scrub(f"{type(cause).__name__}: {cause}")
        kind: AlertKind = "sync" if "SyncRefused" in said else "failure"
        monitor.alert(kind, f"failed: {said}")
        details = "".join(traceback.format_exception(cause))
        (job.run_dir / "error.txt").write_text(scrub(details), encoding="utf-8")
        return {"status": "failed", "error": said}
    if stopped:
        monitor.alert("stop", f"stopped as asked, after step {job.step}")
    return {"status": "interrupted" if stopped else "completed", "error": None}


def first_cause(error: BaseException) -> BaseException:
    """The first real error inside nested groups of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

"""Runs of the main objective: PPO on live actors, as a job of `cluster.job`."""

from contextlib import AbstractContextManager
from pathlib import Path

from cluster import checkpoint
from cluster.config import JobConfig
from cluster.config_file import ConfigError
from cluster.heldout import EVALUATION_AFTER
from cluster.job import Kind
from cluster.monitor import Monitor
from cluster.objective_rules import lag_warning, penalty_warning
from cluster.placement import ray_session
from cluster.prepare import Prepared, prepare
from cluster.report import write_report
from cluster.training import TrainingRun


class PolicyRun(TrainingRun):
    """A training run, with what it says before and after."""

    def __init__(
        self, config: JobConfig, prepared: Prepared, run_dir: Path, resume_from: Path | None
    ) -> None:
        """Raises ValueError where data or reward models are not those that a resumed run was started with."""
        super().__init__(config, prepared, run_dir, resume_from)
        self._inputs = prepared

    @property
    def total_steps(self) -> int:
        """Learner steps of the whole run."""
        return self.config.run.steps

    def session(self) -> AbstractContextManager[bool]:
        """Ray, with room for actors and learner."""
        return ray_session(self.config, self.run_dir)

    def announce(self, monitor: Monitor) -> None:
        """How many prompts and demonstrations there are, and what was put aside."""
        prompts = self._inputs.prompts
        monitor.event(
            f"data: {len(prompts.train.prompts)} training and {len(prompts.heldout.prompts)} held-out "
            f"prompts, {len(self._inputs.demonstrations)} demonstrations"
        )
        self._inputs.quarantine.announce(monitor.event)
        config = self.config
        for warning in (
            penalty_warning(config.ppo),
            lag_warning(config.correction, config.scheduler.window),
        ):
            if warning is not None:
                monitor.event(f"warning: {warning}")

    def write_report(self) -> Path:
        """The report of a run with rollouts."""
        return write_report(self.run_dir)

    def leaves(self, status: str) -> str:  # noqa: ARG002 - it leaves them however it ends
        """Where the checkpoints are."""
        return f"checkpoints in {self.run_dir / 'checkpoints'}"


def _resumable(run_dir: Path, config: JobConfig) -> tuple[Path, list[str]]:
    """The newest good checkpoint, and what is wrong with newer ones; ConfigError if nothing is left to do."""
    found = checkpoint.latest(run_dir / "checkpoints")
    step = checkpoint.read_state(found[0])["step"]
    finished = step == config.run.steps and (run_dir / EVALUATION_AFTER).exists()
    if finished or step > config.run.steps:
        raise ConfigError(
            f"--resume: run.steps = {config.run.steps}, but the run already has {step} steps; set it higher"
        )
    return found


def _prepare(config: JobConfig, run_dir: Path, resume_from: Path | None) -> PolicyRun:
    return PolicyRun(config, prepare(config, run_dir), run_dir, resume_from)


KIND = Kind(_resumable, _prepare)

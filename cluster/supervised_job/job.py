"""Supervised fine-tuning as a job of its own: from demonstrations to a policy that imitates them.

    prepare (demonstrations as tokens) → learner ranks → updates, held-out looks, checkpoints → report

Only the learner ranks are started.
"""

from itertools import islice
from pathlib import Path
from typing import Any

from cluster import checkpoint
from cluster.config_file import ConfigError
from cluster.job import Kind
from cluster.learner_ranks import put
from cluster.learner_run import LearnerRun
from cluster.monitor import Monitor
from cluster.prompt_cursor import demonstration_batches
from cluster.report import write_report
from cluster.supervised_job.config import SupervisedJobConfig
from cluster.supervised_job.inputs import SupervisedInputs, prepare_supervised_job
from learner.settings import CorrectionSettings, PPOSettings
from learner.worker import LearnerJob, LearnerWorker

_SLICE = 10  # updates between two lines of progress


class SupervisedRun(LearnerRun):
    """A run of imitation."""

    worker = LearnerWorker
    data = "demonstrations"

    def __init__(
        self, config: SupervisedJobConfig, inputs: SupervisedInputs, run_dir: Path, resume_from: Path | None
    ) -> None:
        """Raises ConfigError where a resume has other data, or nothing left to do."""
        super().__init__(config, inputs, run_dir, resume_from, config.run.steps)
        self.config: SupervisedJobConfig = config
        self.inputs = inputs
        if resume_from is not None and self.step >= config.run.steps:
            raise ConfigError(
                f"--resume: run.steps = {config.run.steps}, but the run already has {self.step}; "
                "start a new run to train longer, as the learning rate has decayed"
            )
        self._losses: list[float] = []  # held out: the first and the latest
        self._tokens = 0

    def announce(self, monitor: Monitor) -> None:
        """How many demonstrations there are."""
        inputs = self.inputs
        monitor.event(
            f"data: {len(inputs.train):,} demonstrations to train on, {len(inputs.heldout):,} held out"
        )
        inputs.quarantine.announce(monitor.event)

    def _learner_job(self) -> LearnerJob:
        config = self.config
        return LearnerJob(
            model_path=str(self.inputs.model_path),
            model=config.model,
            learner=config.learner,
            optimizer=config.optimizer,
            ppo=PPOSettings(),
            correction=CorrectionSettings(),
            warmup=config.warmup,
            temperature=1.0,
            seed=config.run.seed,
            total_updates=1,
            max_length=self.inputs.max_length,
        )

    async def _work(self) -> bool:
        run = self.config.run
        await self._restore()
        if not self.step:
            self._monitor.step({"learner_step": 0.0, "supervised/heldout_loss": await self._look()})
        every = demonstration_batches(self.inputs.train, run.batch_size, run.steps, run.seed)
        batches = list(islice(every, self.step, None))
        self._training = True
        while batches and not self._stopping:
            count = self._slice()
            part, batches = batches[:count], batches[count:]
            rows = await self._ranks.all("warmup_updates", put(part))
            self.step += count
            self._tokens += sum(len(completion) for batch in part for _, completion in batch)
            named = [self._named(row) for row in rows]
            if self._is_due(run.evaluate_every):
                named[-1]["supervised/heldout_loss"] = await self._look()
            for row in named:
                self._monitor.step(row)
            if self._is_due(run.checkpoint_every) or self._stopping:
                await self._checkpoint()
        self._training = False
        return bool(batches)

    def _named(self, row: dict[str, float]) -> dict[str, float]:
        """A warm-up's row under the names of this objective."""
        return {
            "learner_step": row["warmup/step"],
            "supervised/loss": row["warmup/loss"],
            "optimizer/lr": row["warmup/lr"],
            "optimizer/grad_norm": row["warmup/grad_norm"],
        }

    def _is_due(self, every: int) -> bool:
        return self.step == self.config.run.steps or (every > 0 and self.step % every == 0)

    def _slice(self) -> int:
        """Updates of the next call: none beyond the next look or checkpoint."""
        run, done = self.config.run, self.step
        ends = [run.steps, *(done - done % n + n for n in (run.evaluate_every, run.checkpoint_every) if n)]
        return min([_SLICE, *(end - done for end in ends)])

    async def _look(self) -> float:
        """Mean −log π a held-out token, end tokens included."""
        loss = float(await self._ranks.all("supervised_loss", put(self.inputs.heldout)))
        self._losses = [*self._losses[:1], loss]
        self._monitor.event(f"held-out loss after {self.step} updates: {loss:.4f} nats a token")
        return loss

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says of the run so far; null for what was not reached, or does not apply."""
        first, last = (self._losses[0], self._losses[-1]) if self._losses else (None, None)
        return super().summary() | {
            "heldout_loss_initial": None if self._resume_from else first,
            "heldout_loss_final": last if self.step == self.total_steps else None,
            "demonstrations": len(self.inputs.train),
            "demonstrations_heldout": len(self.inputs.heldout),
            "tokens_trained": self._tokens,
        }

    def write_report(self) -> Path:
        """The report, with the curves of imitation."""
        return write_report(self.run_dir)

    def leaves(self, status: str) -> str:  # noqa: ARG002 - it leaves them however it ends
        """Where the checkpoints are."""
        return f"checkpoints in {self.run_dir / 'checkpoints'}"


def _resumable(run_dir: Path, config: SupervisedJobConfig) -> tuple[Path, list[str]]:  # noqa: ARG001
    return checkpoint.latest(run_dir / "checkpoints")


def _prepare(config: SupervisedJobConfig, run_dir: Path, resume_from: Path | None) -> SupervisedRun:
    return SupervisedRun(config, prepare_supervised_job(config, run_dir), run_dir, resume_from)


KIND = Kind(_resumable, _prepare)

"""Supervised fine-tuning as a job of its own: from demonstrations to a policy that imitates them.

    prepare (demonstrations as tokens) → learner ranks → updates, held-out looks, checkpoints → report

Only the learner ranks are started. What the user can mend is raised as ValueError before any of them;
whatever fails later ends the run with one logged cause.
"""

import asyncio
import time
from itertools import islice
from pathlib import Path
from typing import Any

from actors.shipping import ship
from cluster import checkpoint
from cluster.config_file import ConfigError
from cluster.job import run_and_catch
from cluster.learner_ranks import LearnerRanks, put
from cluster.monitor import Monitor
from cluster.placement import learner_session
from cluster.prompt_cursor import demonstration_batches
from cluster.report import write_report
from cluster.run_folder import CONFIG, RunFolder
from cluster.stopping import stop_signals
from cluster.summary import package_versions
from cluster.supervised_job.config import SupervisedJobConfig
from cluster.supervised_job.inputs import SupervisedInputs, prepare_supervised_job
from learner.settings import CorrectionSettings, PPOSettings
from learner.worker import LearnerJob, LearnerWorker

_SLICE = 10  # updates between two lines of progress


def run_supervised_job(config: SupervisedJobConfig, run_dir: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train in `run_dir` and give the run's summary, as `cluster.job.run_job` does for other objectives."""
    started = time.perf_counter()
    folder = RunFolder(run_dir, config, resume=resume)
    try:
        found = checkpoint.latest(run_dir / "checkpoints") if resume else None
        try:
            inputs = prepare_supervised_job(config, run_dir)
            run = SupervisedRun(config, inputs, run_dir, found[0] if found else None)
        except (ValueError, KeyboardInterrupt):
            folder.discard()
            raise
        folder.accept(config)
        return _run_and_report(run, found, started)
    finally:
        folder.close()


def _run_and_report(
    run: "SupervisedRun", found: tuple[Path, list[str]] | None, started: float
) -> dict[str, Any]:
    config, run_dir = run.config, run.run_dir
    with Monitor(
        run_dir,
        config.monitor,
        config.model_dump(mode="json"),
        config.run.steps,
        resume_from=run.step if found else None,
    ) as monitor:
        inputs = run.inputs
        monitor.event(
            f"data: {len(inputs.train):,} demonstrations to train on, {len(inputs.heldout):,} held out"
        )
        if inputs.quarantine.counts:
            monitor.event(
                f"warning: {inputs.quarantine.counts.total()} rows were put aside "
                f"({inputs.quarantine.describe()}): see {inputs.quarantine.path}"
            )
        for problem in found[1] if found else []:
            monitor.event(f"warning: checkpoint {problem}; an older one is used")
        outcome = run_and_catch(
            run, monitor, lambda: learner_session(config.learner, config.cluster, run_dir)
        )
        summary = run.summary() | outcome | {"wall_s": time.perf_counter() - started}
        monitor.summary(summary)
        report = write_report(run_dir)
        monitor.report(report)
        monitor.event(f"{summary['status']}: report in {report}, checkpoints in {run_dir / 'checkpoints'}")
        monitor.close(0 if summary["status"] == "completed" else 1)
    return summary


class SupervisedRun:
    """A run in progress; `run` is the story, the rest its chapters."""

    def __init__(
        self, config: SupervisedJobConfig, inputs: SupervisedInputs, run_dir: Path, resume_from: Path | None
    ) -> None:
        """Raises ConfigError where a resume has other data, or nothing left to do."""
        self.config = config
        self.inputs = inputs
        self.run_dir = run_dir
        self.step = 0
        self._resume_from = resume_from
        if resume_from is not None:
            state = checkpoint.read_state(resume_from)
            if state.get("data") != inputs.fingerprint:
                raise ConfigError(
                    "--resume: the demonstrations are not those that the run was started with; restore the "
                    "files, or start a new run"
                )
            self.step = int(state["step"])
            if self.step >= config.run.steps:
                raise ConfigError(
                    f"--resume: run.steps = {config.run.steps}, but the run already has {self.step}; "
                    "start a new run to train longer, as the learning rate has decayed"
                )
        self._stopping = self._training = False
        self._losses: list[float] = []  # held out: the first and the latest
        self._tokens = 0

    async def run(self, monitor: Monitor, *, cuda: bool) -> bool:
        """Run to the end; true if a stop was asked for on the way."""
        self._monitor = monitor
        self._task = asyncio.current_task()
        with stop_signals(self._stop):
            config = self.config
            self._ranks = await LearnerRanks.gather(config, LearnerWorker, self._learner_job(), cuda=cuda)
            try:
                monitor.event("starting the learner")
                model = None
                if config.cluster.address:
                    model = await asyncio.to_thread(ship, self.inputs.model_path)
                await self._ranks.start(model, self.run_dir.resolve() / CONFIG)
                if self._resume_from is not None:
                    await self._ranks.all("restore", str(self._resume_from.resolve()))
                await self._train()
            finally:
                await self._ranks.dismiss()
        return self._stopping and self.step < config.run.steps

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

    async def _train(self) -> None:
        run = self.config.run
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

    async def _checkpoint(self) -> None:
        """Save what a resume needs, with the policy in it; the folder appears whole or not at all."""
        root = self.run_dir / "checkpoints"
        folder = checkpoint.begin(root, self.step)
        await self._ranks.all("save", str(folder.resolve()))
        state = {"step": self.step, "data": self.inputs.fingerprint}
        keep = self.config.run.keep_checkpoints
        final = await asyncio.to_thread(checkpoint.commit, root, self.step, state, keep=keep)
        self._monitor.event(f"checkpoint {final}")

    def _stop(self) -> None:
        """Finish these updates and save; outside training, or the second time, stop at once."""
        assert self._task is not None
        if self._stopping or not self._training:
            self._task.cancel()
            return
        self._monitor.event("stopping after these updates, with a checkpoint; once more to stop at once")
        self._stopping = True

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says of the run so far; null for what was not reached, or does not apply."""
        first, last = (self._losses[0], self._losses[-1]) if self._losses else (None, None)
        return {
            "objective": self.config.objective,
            "name": self.config.run.name,
            "steps": self.step,
            "heldout_loss_initial": None if self._resume_from else first,
            "heldout_loss_final": last if self.step == self.config.run.steps else None,
            "demonstrations": len(self.inputs.train),
            "demonstrations_heldout": len(self.inputs.heldout),
            "tokens_trained": self._tokens,
            "rows_quarantined": dict(self.inputs.quarantine.counts),
            **dict.fromkeys(_NOT_OF_IT),
            "versions": package_versions(),
        }


_NOT_OF_IT = (
    *(
        "reward_initial",
        "reward_final",
        "kl_final",
        "tokens_generated",
        "groups_dispatched",
        "groups_trained",
    ),
    *("groups_dropped", "lag_bound", "lag_max", "lag_mean", "trainer_wait_fraction", "rollout_wait_fraction"),
    *("sync_s_mean", "sync_probe_max_abs_diff", "padding_fraction"),
)

"""From labels to a policy, without a reward model: DPO, IPO, KTO, SimPO as jobs.

    prepare (responses as tokens) → learner ranks → imitation, where asked for → log π_ref of every response
      → updates, held-out looks, checkpoints → report

Only the learner ranks are started.
"""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.shipping import ship
from cluster import checkpoint
from cluster.config_file import ConfigError
from cluster.job import Kind
from cluster.learner_ranks import put
from cluster.learner_run import LearnerRun
from cluster.monitor import Monitor
from cluster.preference_job.config import PreferenceJobConfig
from cluster.preference_job.inputs import PreferenceInputs, describe, doubts, prepare_preference_job
from cluster.report import write_report
from learner.preference_batch import Measured, measure
from learner.preference_worker import PreferenceJob, PreferenceLearner
from learner.reward_training import batches_an_epoch
from rewards.preferences.evaluation import Estimate, accuracy

_SLICE_S = 1.0  # how long the updates of one call may take
_IMITATION_SLICE = 10  # updates between two lines of progress
_SCORE_AT_ONCE = 8192  # responses


class PreferenceRun(LearnerRun):
    """A run in progress; `_work` is the story, the rest its chapters."""

    worker = PreferenceLearner
    data = "preferences"

    def __init__(
        self, config: PreferenceJobConfig, inputs: PreferenceInputs, run_dir: Path, resume_from: Path | None
    ) -> None:
        """Raises ConfigError where a resume has other data, or nothing left to do."""
        updates = config.run.epochs * batches_an_epoch(len(inputs.data.train), config.run.batch_size)
        super().__init__(config, inputs, run_dir, resume_from, updates)
        self.config: PreferenceJobConfig = config
        self.inputs = inputs
        if resume_from is not None and self.step >= updates:
            raise ConfigError(
                f"--resume: the run already has all of its {updates} updates; start a new run to train "
                "longer, as the learning rate has decayed"
            )
        self._reference: list[float] = []
        self._first: Measured | None = None  # held out, before training
        self._last: Measured | None = None

    def announce(self, monitor: Monitor) -> None:
        """How many labels there are, and what of them is in doubt."""
        monitor.event(f"data: {describe(self.inputs, self.config)}")
        self.inputs.quarantine.announce(monitor.event)
        for doubt in doubts(self.inputs, self.config):
            monitor.event(f"warning: {doubt}")

    def _learner_job(self) -> PreferenceJob:
        config, inputs = self.config, self.inputs
        return PreferenceJob(
            model_path=str(inputs.model_path),
            reference_path=str(inputs.reference_path or ""),
            model=config.model,
            learner=config.learner,
            optimizer=config.optimizer,
            warmup=config.warmup,
            method=config.method,
            seed=config.run.seed,
            epochs=config.run.epochs,
            batch_size=config.run.batch_size,
        )

    async def _start(self) -> None:
        """Let the ranks meet, with all models on every host."""
        await super()._start()
        if self.config.cluster.address and self.inputs.reference_path is not None:
            shipped = await asyncio.to_thread(ship, self.inputs.reference_path)
            seconds = self.config.learner.start_timeout_s
            await self._ranks.all("use_reference", shipped, seconds, seconds=seconds + 30)

    async def _work(self) -> bool:
        await self._ranks.all("give_data", put(self.inputs.data))
        if self._resume_from is None:
            await self._imitate()
            self._monitor.event(f"log-probabilities of {len(self.inputs.data.responses):,} responses")
            await self._ranks.all("make_reference")
        else:
            await self._restore()
        self._reference = await self._ranks.one(0, "reference")
        if not self.step:
            self._first = await self._look(range(len(self.inputs.heldout)))
            self._monitor.step({"learner_step": 0.0, **_named(self._first)})
        await self._train()
        return self.step < self.total_steps

    async def _imitate(self) -> None:
        """Supervised updates on the chosen responses; interrupted, they are begun anew."""
        steps = self.config.warmup.steps
        for first in range(0, steps, _IMITATION_SLICE):
            rows = await self._ranks.all("warmup_updates", min(_IMITATION_SLICE, steps - first))
            for row in rows:
                self._monitor.warmup(row)

    async def _train(self) -> None:
        """Train to the end, or to the update at which a stop is asked for."""
        run, looked_at = self.config.run, self._looked_at()
        self._training = True
        pace = 0.0
        while self.step < self.total_steps and not self._stopping:
            count = self._slice(pace)
            began = time.perf_counter()
            rows = await self._ranks.all("update", count)
            pace = (time.perf_counter() - began) / count
            first, self.step = self.step, self.step + count
            if self.step == self.total_steps:
                self._last = await self._look(range(len(self.inputs.heldout)))
                rows[-1] |= _named(self._last)
            elif self._is_due(run.evaluate_every):
                rows[-1] |= _named(await self._look(looked_at))
            for number, row in enumerate(rows, start=first + 1):
                epoch = number * run.epochs / self.total_steps
                self._monitor.step(row | {"learner_step": float(number), "epoch": epoch})
            if self._is_due(run.checkpoint_every) or self._stopping:
                await self._checkpoint()
        self._training = False

    def _is_due(self, every: int) -> bool:
        return self.step == self.total_steps or (every > 0 and self.step % every == 0)

    def _slice(self, pace: float) -> int:
        """Updates of the next call: about a second's, and none beyond the next look or checkpoint."""
        run, done = self.config.run, self.step
        ends = [
            self.total_steps,
            *(done - done % n + n for n in (run.evaluate_every, run.checkpoint_every) if n),
        ]
        most = max(1, int(_SLICE_S / pace)) if pace else 1
        return min([most, *(end - done for end in ends)])

    # ---- held-out examples ---------------------------------------------------------------------------------

    def _looked_at(self) -> list[int]:
        """Held-out examples that are looked at during training."""
        drawn = np.random.default_rng(self.config.run.seed).permutation(len(self.inputs.heldout))
        return sorted(int(i) for i in drawn[: self.config.run.evaluate_examples])

    async def _look(self, members: Sequence[int]) -> Measured:
        """Loss and figures of held-out examples with the present weights."""
        heldout = self.inputs.heldout
        wanted = {index for i in members for index in heldout.sequences(i)}
        if heldout.mismatched:
            wanted |= {heldout.mismatched[i] for i in members}
        numbers = sorted(wanted)
        logprobs: list[float] = []
        for start in range(0, len(numbers), _SCORE_AT_ONCE):
            logprobs += await self._ranks.all("score", numbers[start : start + _SCORE_AT_ONCE])
        return measure(
            self.config.method,
            self.inputs.data.responses,
            heldout,
            members,
            logprobs=dict(zip(numbers, logprobs, strict=True)),
            reference=self._reference,
        )

    # ---- the end -------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says of the run so far; null for what was not reached, or does not apply."""
        first, last = self._first, self._last
        found = None if last is None else self._accuracy(last)
        report = self.inputs.report
        return super().summary() | {
            "heldout_loss_initial": first.loss if first else None,
            "heldout_loss_final": last.loss if last else None,
            "heldout_accuracy": found.value if found else None,
            "heldout_accuracy_ci95": [found.low, found.high] if found else None,
            "heldout_margin": last.figures.get("preference/margin") if last else None,
            "heldout_chosen_logprob_initial": _chosen(first),
            "heldout_chosen_logprob_final": _chosen(last),
            "train_examples": len(self.inputs.data.train),
            "heldout_examples": len(self.inputs.heldout),
            "preferences": report.to_json() if report else None,
        }

    def _accuracy(self, found: Measured) -> Estimate:
        """The share in the right order, its interval over prompts."""
        return accuracy(found.better, found.worse, self.inputs.heldout_prompts)

    def write_report(self) -> Path:
        """The report, with the curves of implicit rewards."""
        return write_report(self.run_dir)

    def leaves(self, status: str) -> str:  # noqa: ARG002 - it leaves them however it ends
        """Where the checkpoints are."""
        return f"checkpoints in {self.run_dir / 'checkpoints'}"


def _named(found: Measured) -> dict[str, float]:
    """Held-out figures under their names."""
    figures = {name.replace("/", "/heldout_"): value for name, value in found.figures.items()}
    return {"preference/heldout_loss": found.loss, **figures}


def _chosen(found: Measured | None) -> float | None:
    return None if found is None else found.figures.get("preference/chosen_logprob")


def _resumable(run_dir: Path, config: PreferenceJobConfig) -> tuple[Path, list[str]]:  # noqa: ARG001
    return checkpoint.latest(run_dir / "checkpoints")


def _prepare(config: PreferenceJobConfig, run_dir: Path, resume_from: Path | None) -> PreferenceRun:
    return PreferenceRun(config, prepare_preference_job(config, run_dir), run_dir, resume_from)


KIND = Kind(_resumable, _prepare)

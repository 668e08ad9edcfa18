"""Held-out looks of an iterated job: rewards of samples, and the loss on demonstrations.

held-out prompts ─► rollout actors ─► scoring actors (rewards, KL to the start) ─► metrics, samples
held-out demonstrations ─► learner ─► loss
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.evaluation import Evaluation, evaluate, paired_gain
from cluster.iterated_job.config import IteratedJobConfig
from cluster.iterated_job.crew import IteratedLearner
from cluster.iterated_job.inputs import IteratedInputs
from cluster.monitor import Monitor, write_atomically
from cluster.rollout_pool import RolloutPool
from cluster.scoring_pool import ScoringPool
from rewards.roles import roles_of

BEFORE = "evaluation_before.json"


class Looks:
    """The looks of one run; the first of all starts is kept in the run folder, to compare with."""

    def __init__(
        self, config: IteratedJobConfig, inputs: IteratedInputs, run_dir: Path, first_loss: float | None
    ) -> None:
        """`first_loss` is that of an earlier start, where a run is resumed."""
        self._config = config
        self._inputs = inputs
        self._run_dir = run_dir
        self._evaluated = roles_of(config.rewards()).evaluated
        self._before: Evaluation | None = None
        self._latest: Evaluation | None = None
        self.first_loss = first_loss
        self._latest_loss: float | None = None

    @property
    def samples(self) -> bool:
        """Whether they sample the policy, which must then have the newest weights."""
        return bool(self._inputs.heldout_prompts)

    async def take(
        self,
        step: int,
        learner: IteratedLearner,
        rollouts: RolloutPool,
        scoring: ScoringPool,
        monitor: Monitor,
    ) -> dict[str, float]:
        """Look at the policy of this step; values for its row of metrics."""
        row: dict[str, float] = {}
        if self._inputs.heldout:
            loss = await learner.heldout_loss(self._inputs.heldout)
            self._latest_loss = loss
            self.first_loss = loss if self.first_loss is None else self.first_loss
            row["supervised/heldout_loss"] = loss
        if self.samples:
            evaluation = await evaluate(
                self._inputs.heldout_prompts,
                rollouts,
                scoring,
                self._config.rollout,
                samples=self._config.run.evaluate_samples,
                version=step,
            )
            row |= self._take_in(evaluation, step, monitor)
        if row:
            said = ", ".join(
                f"{name} {row[key]:.4f}"
                for key, name in (("supervised/heldout_loss", "loss"), ("heldout/reward", "reward"))
                if key in row
            )
            monitor.event(f"held out after {step} updates: {said}")
        return row

    def _take_in(self, evaluation: Evaluation, step: int, monitor: Monitor) -> dict[str, float]:
        self._latest = evaluation
        if step == 0:
            self._before = evaluation
            write_atomically(self._run_dir / BEFORE, evaluation.to_json())
        phase = "during" if step else "before"
        monitor.samples(step, [{"phase": phase} | asdict(one) for one in evaluation.samples])
        return evaluation.metrics(self._evaluated)

    def summary(self, *, finished: bool) -> dict[str, Any]:
        """Values for the summary; `finished`: the latest look is that of the trained policy."""
        path = self._run_dir / BEFORE
        if self._before is None and path.exists():
            self._before = Evaluation.load(path)
        before, after = self._before, self._latest if finished else None
        gain = paired_gain(before, after) if before is not None and after is not None else None
        evaluated = {
            f"heldout_{when}": {label: one.mean_of(label) for label in self._evaluated}
            for when, one in (("initial", before), ("final", after))
            if one is not None and self._evaluated
        }
        return {
            "reward_initial": before.mean if before else None,
            "reward_final": after.mean if after else None,
            "reward_gain": gain.mean if gain else None,
            "reward_gain_ci95": [gain.low, gain.high] if gain else None,
            "kl_final": after.kl_per_sequence if after else None,
            "heldout_loss_initial": self.first_loss,
            "heldout_loss_final": self._latest_loss if finished else None,
            **evaluated,
        }

"""The held-out evaluations of a run: before, during and after training, and what they lead to.

    prompts ─► evaluate ─► metrics, samples, a line for people ─► OverOptimisation ─► best? stop? warn?

`TrainingRun` says when; it saves the checkpoint of a best evaluation, and stops where a rule says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.config import JobConfig
from cluster.data import PromptData
from cluster.evaluation import Evaluation, evaluate
from cluster.monitor import Monitor, write_atomically
from cluster.overoptimisation import Observation, OverOptimisation, in_words
from cluster.pass_at_k import PassRule
from cluster.rollout_pool import RolloutPool
from cluster.scoring_pool import ScoringPool
from rewards.overoptimisation import Verdict

EVALUATION_BEFORE = "evaluation_before.json"
EVALUATION_AFTER = "evaluation_after.json"
EVALUATIONS = "evaluations"  # the folder of those during training


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an evaluation gave: values for the metrics, and whether it is the best by held-out reward."""

    row: dict[str, float]
    is_best: bool


class HeldOut:
    """The evaluations of one run. `attach` before the first."""

    def __init__(
        self, config: JobConfig, prompts: PromptData, run_dir: Path, state: Mapping[str, Any] | None
    ) -> None:
        """`state` is what `state()` gave for the checkpoint that the run goes on from."""
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None
        self.tracker = OverOptimisation(config.reward, config.stop, state)
        self.stopped_by: Verdict | None = None
        self._config = config
        self._prompts = prompts
        self._run_dir = run_dir
        self._latest: Evaluation | None = None
        self._said: set[str] = set()
        self._rule = PassRule(config.run.pass_threshold, config.run.pass_reward)

    def attach(
        self,
        monitor: Monitor,
        rollouts: RolloutPool,
        scoring: ScoringPool,
        on_free: Callable[[], None] | None = None,
    ) -> None:
        """Say who samples, who scores, and who writes it down.

        `on_free`, where training goes on beside evaluations, is called when there may be a slot for it.
        """
        self._monitor, self._rollouts, self._scoring = monitor, rollouts, scoring
        self._on_free = on_free

    def state(self) -> dict[str, Any]:
        """What a resume needs, in JSON's types."""
        return self.tracker.state()

    def resume(self, step: int) -> None:
        """Take up what an earlier start measured; `step` is that of the checkpoint.

        The evaluation at the end of a run comes after its last checkpoint, so it is taken in here. Those of
        later steps are removed: they are taken anew.
        """
        for path in (self._run_dir / EVALUATIONS).glob("step_*.json"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()
        before, after = (self._run_dir / name for name in (EVALUATION_BEFORE, EVALUATION_AFTER))
        if before.exists():
            self.before = Evaluation.load(before)
            if self.tracker.last_step < 0:
                self.tracker.observe(self.before, candidate=False)
        if after.exists():
            last = Evaluation.load(after)
            if last.version == step > self.tracker.last_step:
                self.tracker.observe(last, candidate=self._has_choice)

    @property
    def _has_choice(self) -> bool:
        """Whether there are several evaluations to choose the best from."""
        return self._config.run.evaluate_every > 0

    async def measure_before(self, step: int) -> None:
        """Measure the policy before training, unless an earlier start did; a rule may hold already."""
        if self.before is not None:
            return
        self.before = await self._evaluate(step, "before")
        write_atomically(self._run_dir / EVALUATION_BEFORE, self.before.to_json())
        row = self._take_in(self.before, candidate=False, may_stop=True).row
        self._monitor.step(self._metrics(self.before) | row | {"learner_step": step})

    async def measure_during(self, step: int, training_s: float | None = None) -> Outcome:
        """Measure it beside training, on actors that hold the weights of `step` until this returns.

        It has a row of metrics of its own, as later steps may have theirs already; `training_s` is then the
        time of training that made the weights. `stopped_by` is afterwards the verdict that ends the run, if
        any. An evaluation that ended before the run was resumed is taken in from its file.
        """
        path = self._run_dir / EVALUATIONS / f"step_{step:06d}.json"
        if path.exists():
            evaluation = self._latest = Evaluation.load(path)
            seen = self._take_in(evaluation, candidate=True, may_stop=True, told=True)
            return Outcome(self._metrics(evaluation) | seen.row, seen.is_best)
        evaluation = await self._evaluate(step, "during", self._on_free)
        seen = self._take_in(evaluation, candidate=True, may_stop=True)
        row = self._metrics(evaluation) | seen.row
        clock = {} if training_s is None else {"time/training_s": training_s}
        self._monitor.step(row | clock | {"learner_step": step})
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, evaluation.to_json())  # last: where it is, all else was written
        return Outcome(row, seen.is_best)

    async def measure_after(self, step: int) -> Outcome:
        """Measure the trained policy; where a rule stopped the run, its evaluation is the last one."""
        if self.stopped_by is not None and self._latest is not None and self._latest.version == step:
            evaluation, outcome = self._latest, Outcome({}, is_best=False)
        else:
            evaluation = await self._evaluate(step, "after")
            seen = self._take_in(evaluation, candidate=self._has_choice, may_stop=False)
            outcome = Outcome(self._metrics(evaluation) | seen.row, seen.is_best)
        self.after = evaluation
        write_atomically(self._run_dir / EVALUATION_AFTER, evaluation.to_json())
        return outcome

    async def _evaluate(self, step: int, phase: str, on_free: Callable[[], None] | None = None) -> Evaluation:
        evaluation = await evaluate(
            self._prompts.heldout.prompts,
            self._rollouts,
            self._scoring,
            self._config.rollout,
            samples=self._config.run.evaluate_samples,
            version=step,
            rule=self._rule,
            heldout_rewards=self.tracker.roles.heldout,
            on_free=on_free,
        )
        self._latest = evaluation
        rows = [{"phase": phase} | asdict(sample) for sample in evaluation.samples]
        self._monitor.samples(evaluation.version, rows)
        when = f"of step {step}" if phase == "during" else f"{phase} training"
        others = "".join(
            f", {label} {mean:.3f}"
            for label in self.tracker.roles.evaluated
            if (mean := evaluation.mean_of(label)) is not None
        )
        self._monitor.event(
            f"held-out reward {when}: {evaluation.mean:.3f}{others} on {len(evaluation.rewards)} "
            "prompts"
            + (f", {evaluation.reward_errors} left out by reward errors" if evaluation.reward_errors else "")
        )
        return evaluation

    def _metrics(self, evaluation: Evaluation) -> dict[str, float]:
        return evaluation.metrics(self.tracker.roles.evaluated)

    def _take_in(
        self, evaluation: Evaluation, *, candidate: bool, may_stop: bool, told: bool = False
    ) -> Observation:
        """Feed the tracker; say which rules fired, and once of a rule that is to stop why it cannot judge.

        `told`: an earlier start has said it already.
        """
        known = len(self.tracker.verdicts)
        seen = self.tracker.observe(evaluation, candidate=candidate)
        if may_stop and seen.verdict is not None and seen.verdict.action == "stop":
            self.stopped_by = seen.verdict
        if told:
            return seen
        for verdict in self.tracker.verdicts[known:]:
            self._monitor.decision(evaluation.version, {"setting": "stop", **verdict}, in_words(verdict))
            if verdict["action"] == "warn":
                self._monitor.alert("overoptimisation", f"warning: stop.{verdict['rule']} holds")
        for rule, reason in self.tracker.unjudged.items():
            if getattr(self._config.stop, rule) == "stop" and rule not in self._said:
                self._said.add(rule)
                self._monitor.event(f'warning: stop.{rule} = "stop" could not judge: {reason}')
        return seen

"""A training run on live actors: start, warm up, first sync, evaluate, train, evaluate, save."""

import asyncio
import uuid
from collections import deque
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from actors.records import RewardFailure
from cluster import adversarial, best_checkpoint, checkpoint
from cluster.accounts import Totals, scoring_exposed
from cluster.adaptation import Adaptation
from cluster.adaptive import Decision
from cluster.config import JobConfig
from cluster.controller import Controller, Hooks, StepReport
from cluster.crew import Crew, shipped, shipped_for_scoring
from cluster.heldout import HeldOut
from cluster.host_watch import host_watches
from cluster.learner_group import LearnerGroup, probe_sequences
from cluster.monitor import Monitor
from cluster.placement import learner_job
from cluster.prepare import Prepared
from cluster.prompt_cursor import PromptCursor, demonstration_batches
from cluster.recruiting import Recruiter
from cluster.rollout_pool import RolloutPool
from cluster.run_folder import CONFIG
from cluster.sampling import Sampling
from cluster.scheduler import Scheduler
from cluster.scoring_pool import ScoringPool
from cluster.services import serving
from cluster.stopping import stop_signals
from cluster.summary import run_summary
from rewards.model_reward import model_facts, refuse_other_versions

_WARMUP_SLICE = 10  # updates between two lines of progress


class TrainingRun:
    """A run in progress; `run` is the story, the rest its chapters."""

    def __init__(
        self, config: JobConfig, prepared: Prepared, run_dir: Path, resume_from: Path | None
    ) -> None:
        """Raises ValueError where data or reward models are not those that a resumed run was started with."""
        self.config = config
        self.run_dir = run_dir
        self._prepared = prepared
        self._resume_from = resume_from
        self._state: dict[str, Any] = checkpoint.read_state(resume_from) if resume_from else {}
        self._cursor = PromptCursor(prepared.prompts.train.prompts, config.run.seed, self._shuffle())
        if self._state:
            self._cursor.restore(self._state["cursor"])
        pending = self._state.get("pending", [])
        self._requeued = deque(self._cursor.prompt_by_id(prompt_id) for prompt_id in pending)
        self._saved_step = self.first_step if resume_from else None
        self._saving = False
        self._checkpointing = asyncio.Lock()
        self._models = model_facts(config.reward)
        refuse_other_versions(self._state.get("reward_versions", {}), self._models)
        self._heldout = HeldOut(config, prepared.prompts, run_dir, self._state.get("overoptimisation"))
        if resume_from is not None:
            self._heldout.resume(self.first_step)
        self._controller: Controller | None = None
        self._rollout_wait_fraction: float | None = None
        self._last_row: dict[str, float] = {}
        self._run_id = f"{config.run.name[:40]}-{uuid.uuid4().hex[:8]}"
        self._cuda = False
        self._recruiter: Recruiter | None = None

    @property
    def first_step(self) -> int:
        """The step at which this process takes up the run."""
        return int(self._state.get("step", 0))

    @property
    def step(self) -> int:
        """Learner steps begun so far."""
        return self._controller.step if self._controller else self.first_step

    async def run(self, monitor: Monitor, *, cuda: bool) -> bool:
        """Run to the end, or to where a stop rule ends it; true if the user asked for a stop on the way."""
        self._monitor = monitor
        self._task = asyncio.current_task()
        config, self._cuda = self.config, cuda
        for label, facts in self._models.items():
            monitor.event(f"reward {label!r}: {facts.in_words()}")
        best_checkpoint.restore(self._checkpoints, self._heldout.tracker.best_facts())
        crew = await Crew.gather(
            config,
            learner_job(config, self._prepared),
            self._reference_path(),
            cuda=cuda,
            step=self.first_step,
            on_event=partial(monitor.alert, "restart"),
        )
        self._recruiter = crew.recruiter
        learner, rollouts, scoring = crew.learner, crew.rollouts, crew.scoring
        try:
            with stop_signals(self._stop):
                await self._start(crew)
                controller = self._controller = self._make_controller(learner, rollouts, scoring)
                services = [rollouts.watch(), scoring.run(), crew.recruiter.run(rollouts, controller.pump)]
                services += host_watches(config.monitor.hosts_every_s, crew.everyone, monitor)
                async with serving(*services):
                    await controller.load_everywhere(await learner.publish(controller.step))
                    beside = None if config.run.evaluate_pauses else controller.pump
                    self._heldout.attach(monitor, rollouts, scoring, beside)
                    await self._heldout.measure_before(controller.step)
                    self._obey(controller)
                    await self._train(controller, rollouts)
                    if not controller.stopping or self._heldout.stopped_by:
                        await self._evaluate_after(controller.step)
        finally:
            self._write_last_row()
            await crew.dismiss()
        return controller.stopping and self._heldout.stopped_by is None

    # ---- before training -----------------------------------------------------------------------------------

    def _reference_path(self) -> Path:
        """The frozen reference: as configured, or the policy as it is when reinforcement learning begins."""
        if self._prepared.reference_path is not None:
            return self._prepared.reference_path
        return self.run_dir.resolve() / "reference" if self.config.warmup.steps else self._prepared.model_path

    async def _start(self, crew: Crew) -> None:
        """Engines start beside the learner and its warm-up; scoring needs the reference that this leaves."""
        prepared, config, learner = self._prepared, self.config, crew.learner
        self._monitor.event("starting the learner, the rollout engines and scoring")
        async with asyncio.TaskGroup() as tasks:
            engines = tasks.create_task(crew.rollouts.start())
            if crew.model is not None:
                critic = await asyncio.to_thread(shipped, config, prepared.critic_path)
                await learner.use_models(crew.model, critic, self.run_dir.resolve() / CONFIG)
            await learner.start()
            await self._warm_up(learner)
            await self._start_discriminator(learner)
            reference = await asyncio.to_thread(shipped_for_scoring, config, self._reference_path())
            tasks.create_task(crew.scoring.start(config.rollout.start_timeout_s, reference))
        if self._resume_from is not None:
            await learner.restore(self._resume_from.resolve())
        await learner.open_publisher(
            [actor.remote for actor in crew.rollouts.actors],
            config.rollout,
            config.sync,
            run_id=self._run_id,
            probe=probe_sequences(
                prepared.prompts.train.prompts, prepared.tokenizer.eos_token_id, config.sync.probe_sequences
            ),
            cuda=self._cuda,
            actor_hosts=[facts.host_id for facts in engines.result()],
            colocated=crew.factory.colocated,
            elastic=bool(config.cluster.address),
        )

    async def _warm_up(self, learner: LearnerGroup) -> None:
        """Supervised fine-tuning on the demonstrations, then freeze what came of it as the reference."""
        settings = self.config.warmup
        reference = self.run_dir / "reference"
        if not settings.steps or (self._resume_from is not None and reference.exists()):
            return
        batches = list(
            demonstration_batches(
                self._prepared.demonstrations, settings.batch_size, settings.steps, self.config.run.seed
            )
        )
        for first in range(0, settings.steps, _WARMUP_SLICE):
            for row in await learner.warm_up(batches[first : first + _WARMUP_SLICE]):
                self._monitor.warmup(row)
        await learner.finish_warm_up(reference.resolve())
        self._monitor.event(f"warmed up with {settings.steps} updates; the result is the frozen reference")

    async def _start_discriminator(self, learner: LearnerGroup) -> None:
        """Where the rewards have one: it starts from its own model or from the reference."""
        if isinstance(learner, adversarial.AdversarialLearner):
            job = adversarial.discriminator_job(self.config, self._prepared, self._reference_path())
            model = await asyncio.to_thread(shipped, self.config, Path(job.model_path))
            await learner.start_discriminator(job, model)
            self._monitor.event(adversarial.in_words(job))

    def _make_controller(
        self, learner: LearnerGroup, rollouts: RolloutPool, scoring: ScoringPool
    ) -> Controller:
        config, state = self.config, self._state
        scheduler = Scheduler(
            groups_per_step=config.groups_per_step,
            window=config.scheduler.first_window,
            total_steps=config.run.steps,
            step=state.get("step", 0),
            first_id=state.get("next_group_id", 0),
        )
        totals = Totals(**state["totals"]) if state else Totals()
        adaptation = Adaptation(
            config.scheduler,
            scheduler,
            groups_per_step=config.groups_per_step,
            state=state.get("adaptation"),
        )
        sampling = Sampling(
            config=config,
            scheduler=scheduler,
            cursor=self._cursor,
            rollouts=rollouts,
            scoring=scoring,
            totals=totals,
            on_reward_error=self._on_reward_error,
            requeued=self._requeued,
        )
        hooks = Hooks(self._on_step, self._on_checkpoint, self._on_evaluate, self._on_decision)
        return Controller(
            config=config,
            sampling=sampling,
            learner=learner,
            adaptation=adaptation,
            hooks=hooks,
            totals=totals,
            evaluated=max(0, self._heldout.tracker.last_step),
        )

    def _shuffle(self) -> bool:
        return self.config.data.shuffle if self.config.data is not None else True

    # ---- training ------------------------------------------------------------------------------------------

    async def _train(self, controller: Controller, rollouts: RolloutPool) -> None:
        try:
            await controller.run()
        finally:
            self._rollout_wait_fraction = rollouts.idle_fraction()
        if self._saved_step != controller.step:
            await self._on_checkpoint(controller.step)

    def _on_step(self, report: StepReport) -> None:
        exposed = scoring_exposed(report.trace)
        row = report.row | {
            "learner_step": float(report.step),
            "wait/scoring_exposed_s": exposed,
            "perf/scoring_exposed_fraction": exposed / report.row["timing_s/step"],
        }
        if self._controller is not None:
            totals = self._controller.totals
            totals.scoring_exposed_s += exposed
            self._monitor.reward_errors(totals.groups_dropped, totals.groups_dropped + totals.groups_trained)
        if report.step == self.config.run.steps:
            self._last_row = row  # it waits for the held-out reward
        else:
            self._monitor.step(row)
        if self.config.monitor.trace:
            self._monitor.trace(report.trace)
        every = self.config.monitor.samples_every
        if every and report.step % every == 0:
            rows = [
                {
                    "phase": "train",
                    "prompt_id": group.prompt.id,
                    "prompt": group.prompt.text,
                    "completion": trajectory.completion.text,
                    "reward": trajectory.reward,
                    "finished": trajectory.completion.finished,
                }
                for group in report.groups[: self.config.monitor.samples]
                for trajectory in group.trajectories[:1]
            ]
            self._monitor.samples(report.step, rows)

    def _write_last_row(self) -> None:
        if self._last_row:
            self._monitor.step(self._last_row)
            self._last_row = {}

    def _on_reward_error(self, failure: RewardFailure) -> None:
        self._monitor.event(
            f"reward_error: group {failure.group_id} (prompt {failure.prompt_id}) is left out, "
            f"reward {failure.reward!r}: {failure.reason}"
        )

    def _on_decision(self, decision: Decision) -> None:
        name = {"window": "window S", "publish_every": "publish interval", "ahead": "groups ahead"}
        self._monitor.decision(
            decision.step,
            asdict(decision),
            f"scheduler: {name[decision.setting]} {decision.old} → {decision.new}: {decision.reason}",
        )

    @property
    def _checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    async def _on_checkpoint(self, step: int) -> None:
        """Save everything that a resume needs; the folder appears whole or not at all.

        What is saved already is not saved again. An evaluation may ask beside the controller: one at a time.
        """
        async with self._checkpointing:
            if self._saved_step != step:
                await self._save(step)

    async def _save(self, step: int) -> None:
        controller = self._controller
        assert controller is not None
        assert controller.step == step, f"the learner holds step {controller.step}, not {step}"
        self._saving = True
        folder = checkpoint.begin(self._checkpoints, step)
        await controller.learner.save(folder.resolve())
        state = {
            "step": step,
            "next_group_id": controller.sampling.scheduler.next_id,
            "cursor": controller.sampling.cursor.state(),
            "pending": controller.sampling.pending_prompts(),
            "adaptation": controller.adaptation.state(),
            "totals": asdict(controller.totals),
            "overoptimisation": self._heldout.state(),
            "reward_versions": {label: facts.version for label, facts in self._models.items()},
        }
        # Hashing gigabytes must not hold up the actors.
        final = await asyncio.to_thread(
            checkpoint.commit, self._checkpoints, step, state, keep=best_checkpoint.KEEP_ALL
        )
        best_checkpoint.prune(self._checkpoints, self.config.run.keep_checkpoints, written=final)
        self._saving, self._saved_step = False, step
        self._monitor.event(f"checkpoint {final}")

    # ---- held-out evaluation -------------------------------------------------------------------------------

    async def _on_evaluate(self, version: int, training_s: float) -> None:
        """Evaluate the weights of a step beside training: keep the best, stop where a rule says so."""
        controller = self._controller
        assert controller is not None
        outcome = await self._heldout.measure_during(version, training_s)
        if outcome.is_best:
            await self._on_checkpoint(version)  # the controller has it saved; this waits for the end of that
            self._mark_best(version)
        self._obey(controller)

    def _obey(self, controller: Controller) -> None:
        """Stop where a rule says so."""
        verdict = self._heldout.stopped_by
        if verdict is not None:
            self._monitor.alert("stop", f"stopping by rule {verdict.rule}: {verdict.reason}")
            controller.request_stop()

    def _mark_best(self, step: int) -> None:
        """Point to the checkpoint of this step as the best, which spares it, and lets the last best go."""
        facts = self._heldout.tracker.best_facts()
        best_checkpoint.mark(self._checkpoints, step, facts)
        written = checkpoint.step_folder(self._checkpoints, step)
        best_checkpoint.prune(self._checkpoints, self.config.run.keep_checkpoints, written=written)
        self._monitor.event(f"best so far by {facts['by']}: {facts['reward']:.3f} at step {step}")

    async def _evaluate_after(self, step: int) -> None:
        outcome = await self._heldout.measure_after(step)
        if outcome.is_best:
            self._mark_best(step)
        if outcome.row:
            self._last_row |= outcome.row | {"learner_step": float(step)}
        self._write_last_row()

    # ---- the end -------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says of the run so far; null where a thing was not reached."""
        return run_summary(
            self.config,
            self._prepared.quarantine.counts,
            self._controller,
            self._heldout,
            self._models,
            rollout_wait_fraction=self._rollout_wait_fraction,
            actors_joined=self._recruiter.joined if self._recruiter else 0,
        )

    def _stop(self) -> None:
        """Finish the step and save; before training, or the second time, stop at once."""
        controller = self._controller
        if controller is None or controller.stopping or not (controller.running or self._saving):
            assert self._task is not None
            self._task.cancel()
            return
        self._monitor.event("stopping after this step, with a checkpoint; once more to stop at once")
        controller.request_stop()

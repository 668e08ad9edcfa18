"""A training run on live actors: start, warm up, first sync, evaluate, train, evaluate, save."""

import asyncio
import contextlib
import signal
import uuid
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from actors.records import RewardFailure
from cluster import checkpoint
from cluster.accounts import Totals
from cluster.adaptation import Adaptation
from cluster.adaptive import Decision
from cluster.config import JobConfig
from cluster.controller import Controller, Hooks, StepReport
from cluster.crew import Crew, shipped
from cluster.evaluation import Evaluation, evaluate
from cluster.host_watch import HostWatch
from cluster.learner_group import LearnerGroup, probe_sequences
from cluster.monitor import Monitor, write_atomically
from cluster.placement import learner_job
from cluster.prepare import Prepared
from cluster.prompt_cursor import PromptCursor, demonstration_batches
from cluster.recruiting import Recruiter
from cluster.rollout_pool import RolloutPool
from cluster.run_folder import CONFIG
from cluster.sampling import Sampling
from cluster.scheduler import Scheduler
from cluster.scoring_pool import ScoringPool
from cluster.summary import run_summary

_WARMUP_SLICE = 10  # updates between two lines of progress
_EVALUATION_BEFORE = "evaluation_before.json"
EVALUATION_AFTER = "evaluation_after.json"


class TrainingRun:
    """A run in progress; `run` is the story, the rest its chapters."""

    def __init__(
        self, config: JobConfig, prepared: Prepared, run_dir: Path, resume_from: Path | None
    ) -> None:
        """Raises ValueError where the data are not those that a resumed run was started with."""
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
        self._before: Evaluation | None = None
        self._after: Evaluation | None = None
        self._controller: Controller | None = None
        self._rollout_wait_fraction: float | None = None
        self._last_row: dict[str, float] = {}
        self._run_id = f"{config.run.name[:40]}-{uuid.uuid4().hex[:8]}"
        self._cuda = False
        self._recruiter: Recruiter | None = None
        self._hosts: HostWatch | None = None

    @property
    def first_step(self) -> int:
        """The step at which this process takes up the run."""
        return int(self._state.get("step", 0))

    @property
    def step(self) -> int:
        """Learner steps begun so far."""
        return self._controller.step if self._controller else self.first_step

    async def run(self, monitor: Monitor, *, cuda: bool) -> bool:
        """Run to the end; true if a stop was asked for on the way."""
        self._monitor = monitor
        config, self._cuda = self.config, cuda
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
            with self._stop_on_signals():
                await self._start(crew)
                controller = self._controller = self._make_controller(learner, rollouts, scoring)
                services = [rollouts.watch(), scoring.run(), crew.recruiter.run(rollouts, controller.pump)]
                if config.monitor.hosts_every_s:
                    self._hosts = HostWatch(config.monitor.hosts_every_s, crew.everyone, monitor.event)
                    services.append(self._hosts.run())
                async with _serving(*services):
                    await controller.load_everywhere(await learner.publish(controller.step))
                    await self._evaluate_before(rollouts, scoring)
                    await self._train(controller, rollouts)
                    if not controller.stopping:
                        await self._evaluate_after(rollouts, scoring)
        finally:
            self._write_last_row()
            await crew.dismiss()
        return controller.stopping

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
            reference = await asyncio.to_thread(shipped, config, self._reference_path())
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
        hosts = self._hosts.row() if self._hosts is not None else {}
        row = report.row | hosts | {"learner_step": float(report.step)}
        if self._controller is not None:
            totals = self._controller.totals
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
        """Save everything that a resume needs; the folder appears whole or not at all."""
        controller = self._controller
        assert controller is not None
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
        }
        keep = self.config.run.keep_checkpoints
        # Hashing gigabytes must not hold up the actors.
        final = await asyncio.to_thread(checkpoint.commit, self._checkpoints, step, state, keep=keep)
        self._saving, self._saved_step = False, step
        self._monitor.event(f"checkpoint {final}")

    # ---- held-out evaluation -------------------------------------------------------------------------------

    async def _evaluate(self, rollouts: RolloutPool, scoring: ScoringPool, phase: str) -> Evaluation:
        assert self._controller is not None
        evaluation = await evaluate(
            self._prepared.prompts.heldout.prompts,
            rollouts,
            scoring,
            self.config.rollout,
            samples=self.config.run.evaluate_samples,
            version=self._controller.step,
        )
        rows = [{"phase": phase} | asdict(sample) for sample in evaluation.samples]
        self._monitor.samples(evaluation.version, rows)
        self._monitor.event(
            f"held-out reward {phase} training: {evaluation.mean:.3f} on {len(evaluation.rewards)} prompts"
            + (f", {evaluation.reward_errors} left out by reward errors" if evaluation.reward_errors else "")
        )
        return evaluation

    async def _on_evaluate(self) -> dict[str, float]:
        assert self._controller is not None
        sampling = self._controller.sampling
        return (await self._evaluate(sampling.rollouts, sampling.scoring, "during")).metrics()

    async def _evaluate_before(self, rollouts: RolloutPool, scoring: ScoringPool) -> None:
        """Measure the policy before training; a resumed run takes the figures of its first start."""
        path = self.run_dir / _EVALUATION_BEFORE
        if self._resume_from is not None and path.exists():
            self._before = Evaluation.load(path)
            return
        self._before = await self._evaluate(rollouts, scoring, "before")
        write_atomically(path, self._before.to_json())
        self._monitor.step(self._before.metrics() | {"learner_step": self._before.version})

    async def _evaluate_after(self, rollouts: RolloutPool, scoring: ScoringPool) -> None:
        self._after = await self._evaluate(rollouts, scoring, "after")
        write_atomically(self.run_dir / EVALUATION_AFTER, self._after.to_json())
        self._last_row |= self._after.metrics() | {"learner_step": float(self._after.version)}
        self._write_last_row()

    # ---- the end -------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says of the run so far; null where a thing was not reached."""
        return run_summary(
            self.config,
            self._prepared.quarantine.counts,
            self._controller,
            self._before,
            self._after,
            rollout_wait_fraction=self._rollout_wait_fraction,
            actors_joined=self._recruiter.joined if self._recruiter else 0,
        )

    @contextlib.contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """Ctrl-C or SIGTERM: finish the step and save; before training, or the second time, stop at once."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def stop() -> None:
            controller = self._controller
            if controller is None or controller.stopping or not (controller.running or self._saving):
                task.cancel()
                return
            self._monitor.event("stopping after this step, with a checkpoint; once more to stop at once")
            controller.request_stop()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


@contextlib.asynccontextmanager
async def _serving(*services: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run services beside a block of code; the failure of one ends the block."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(service) for service in services]
        yield
        for service in running:
            service.cancel()

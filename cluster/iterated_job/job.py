"""Jobs that learn from their own samples, iteration by iteration: SPIN, and imitation of the best of K.

    warm-up ─► evaluate ─► ┌─ publish the weights, sample prompts ─► examples ─► updates ─┐ ─► evaluate, save
                           └───────────────────────── next iteration ◄────────────────────┘

Sampling and training alternate: an iteration learns from samples of the weights with which it began. The rest
(actors, weight sync with its proof, successors for lost actors) is that of reinforcement learning.
"""

import asyncio
import dataclasses
import uuid
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from cluster import checkpoint
from cluster.config_file import ConfigError
from cluster.crew import Crew, shipped_for_scoring
from cluster.host_watch import host_watches
from cluster.iterated_job.config import IteratedJobConfig, RejectionJobConfig, SpinJobConfig
from cluster.iterated_job.crew import IteratedFactory, IteratedLearner
from cluster.iterated_job.examples import Figures, Lessons, contrast, select
from cluster.iterated_job.inputs import IteratedInputs, prepare_iterated_job
from cluster.iterated_job.looks import Looks
from cluster.iterated_job.sampling import sample, sample_and_score, scored_groups
from cluster.job import Kind
from cluster.learner_group import probe_sequences
from cluster.monitor import Monitor
from cluster.placement import learner_job, ray_session
from cluster.prompt_cursor import demonstration_batches
from cluster.report import write_report
from cluster.run_folder import CONFIG
from cluster.services import serving
from cluster.stopping import stop_signals
from cluster.summary import package_versions
from learner.settings import PPOSettings
from learner.worker import LearnerJob
from rewards.model_reward import model_facts, refuse_other_versions

_SLICE = 10  # updates between two lines of progress
_WITHOUT_VALUES = PPOSettings(advantage="reward_to_go", value_model="none")
_OF_LAG = (
    *("groups_dispatched", "groups_trained", "groups_dropped", "lag_bound", "lag_max", "lag_mean"),
    *("trainer_wait_fraction", "rollout_wait_fraction", "padding_fraction"),
)


class NothingLearnedError(RuntimeError):
    """No sample of an iteration was worth imitating."""


class IteratedRun:
    """A run in progress; `_work` is the story, the rest its chapters."""

    def __init__(
        self, config: IteratedJobConfig, inputs: IteratedInputs, run_dir: Path, resume_from: Path | None
    ) -> None:
        """Raises ValueError where data or models are not those of a resumed run, or nothing is left to do."""
        self.config = config
        self.inputs = inputs
        self.run_dir = run_dir
        self.total_steps = config.total_updates
        self._policy_job = config.policy_job()
        self._resume_from = resume_from
        state = checkpoint.read_state(resume_from) if resume_from is not None else {}
        self.step = int(state.get("step", 0))
        self._models = model_facts(config.rewards())
        if resume_from is not None:
            self._check(state)
        self._totals: dict[str, float] = state.get("totals", {"generated": 0, "trained": 0})
        self._history: list[Figures] = state.get("history", [])
        self._syncs: list[tuple[float, float]] = []  # seconds, largest difference of the proof
        self._published = -1
        self._saved = self.step if resume_from is not None else -1
        self._stopping = False  # asked to
        self._training = False  # and able to stop with a checkpoint
        self._sampling: asyncio.Task[tuple[Lessons, Figures]] | None = None
        self._looks = Looks(config, inputs, run_dir, state.get("heldout_loss_initial"))

    def _check(self, state: dict[str, Any]) -> None:
        if state.get("data") != self.inputs.fingerprint:
            raise ConfigError(
                "--resume: prompts or demonstrations are not those that the run was started with (their "
                "rows, or the tokens made of them, have changed); restore the files, or start a new run"
            )
        if self.step >= self.total_steps:
            raise ConfigError(
                f"--resume: run.iterations = {self.config.run.iterations}, but the run already has "
                f"{self.step // self.config.run.updates}; set it higher"
            )
        refuse_other_versions(state.get("reward_versions", {}), self._models)

    def session(self) -> AbstractContextManager[bool]:
        """Ray, with room for actors and learner."""
        return ray_session(self._policy_job, self.run_dir)

    def announce(self, monitor: Monitor) -> None:
        """How many prompts and demonstrations there are, and what was put aside."""
        inputs = self.inputs
        monitor.event(
            f"data: {len(inputs.prompts):,} training and {len(inputs.heldout_prompts):,} held-out prompts, "
            f"{len(inputs.demonstrations):,} demonstrations and {len(inputs.heldout):,} held-out ones"
        )
        inputs.quarantine.announce(monitor.event)

    async def run(self, monitor: Monitor, *, cuda: bool) -> bool:
        """Run to the end; true if a stop was asked for on the way."""
        self._monitor = monitor
        self._task = asyncio.current_task()
        for label, facts in self._models.items():
            monitor.event(f"reward {label!r}: {facts.in_words()}")
        crew = self._crew = await Crew.gather(
            self._policy_job,
            self._learner_job(),
            self._reference_path(),
            cuda=cuda,
            step=self.step,
            on_event=partial(monitor.alert, "restart"),
            make=IteratedFactory,
        )
        self._learner = IteratedLearner(crew.ranks, self.config.learner)
        services = [crew.rollouts.watch(), crew.scoring.run(), crew.recruiter.run(crew.rollouts, _nothing)]
        services += host_watches(self.config.monitor.hosts_every_s, crew.everyone, monitor)
        try:
            with stop_signals(self._stop):
                await self._start(cuda=cuda)
                async with serving(*services):
                    return await self._work()
        finally:
            for service in services:
                service.close()
            await crew.dismiss()

    # ---- before training -----------------------------------------------------------------------------------

    def _learner_job(self) -> LearnerJob:
        """The job of the learner without a value model, and with the warm-up that the user set."""
        job = learner_job(self._policy_job, self.inputs.prepared)
        return dataclasses.replace(job, ppo=_WITHOUT_VALUES, warmup=self.config.warmup)

    def _reference_path(self) -> Path:
        """What held-out samples are compared with: the policy with which the first iteration begins."""
        prepared = self.inputs.prepared
        if prepared.reference_path is not None:
            return prepared.reference_path
        return self.run_dir.resolve() / "reference" if self.config.warmup.steps else prepared.model_path

    async def _start(self, *, cuda: bool) -> None:
        """Engines start beside the learner and its warm-up; scoring needs the reference that this leaves."""
        crew, learner, config, prepared = self._crew, self._learner, self.config, self.inputs.prepared
        self._monitor.event("starting the learner and the rollout engines")
        async with asyncio.TaskGroup() as tasks:
            engines = tasks.create_task(crew.rollouts.start())
            if crew.model is not None:
                await learner.use_models(crew.model, None, self.run_dir.resolve() / CONFIG)
            await learner.start()
            await self._warm_up()
            if config.rewards():
                reference = await asyncio.to_thread(
                    shipped_for_scoring, self._policy_job, self._reference_path()
                )
                tasks.create_task(crew.scoring.start(config.rollout.start_timeout_s, reference))
        if self._resume_from is not None:
            await learner.restore(self._resume_from.resolve())
        await learner.open_publisher(
            [actor.remote for actor in crew.rollouts.actors],
            config.rollout,
            config.sync,
            run_id=f"{config.run.name[:40]}-{uuid.uuid4().hex[:8]}",
            probe=probe_sequences(
                self.inputs.prompts, prepared.tokenizer.eos_token_id, config.sync.probe_sequences
            ),
            cuda=cuda,
            actor_hosts=[facts.host_id for facts in engines.result()],
            colocated=crew.factory.colocated,
            elastic=bool(config.cluster.address),
        )

    async def _warm_up(self) -> None:
        """Supervised fine-tuning on the demonstrations; what comes of it is where the iterations begin."""
        settings, reference = self.config.warmup, self.run_dir / "reference"
        if not settings.steps or (self._resume_from is not None and reference.exists()):
            return
        every = demonstration_batches(
            self.inputs.demonstrations, settings.batch_size, settings.steps, self.config.run.seed
        )
        while part := list(islice(every, _SLICE)):
            for row in await self._learner.warm_up(part):
                self._monitor.warmup(row)
        await self._learner.finish_warm_up(reference.resolve())
        self._monitor.event(f"warmed up with {settings.steps} updates")

    # ---- iterations ----------------------------------------------------------------------------------------

    async def _work(self) -> bool:
        if self._resume_from is None:
            row = await self._look()
            if row:
                self._monitor.step(row | {"learner_step": 0.0})
        self._training = True
        while self.step < self.total_steps and not self._stopping:
            iteration, done = divmod(self.step, self.config.run.updates)
            lessons = await self._lessons(iteration, done)
            if lessons is not None:
                await self._learn(lessons, iteration, done)
        self._training = False
        if self._saved != self.step:
            await self._checkpoint()
        return self.step < self.total_steps

    async def _lessons(self, iteration: int, done: int) -> Lessons | None:
        """The examples of an iteration: sampled, or read again in its midst; None where a stop came first."""
        path = self.run_dir / "iterations" / f"{iteration:03d}.jsonl"
        if done:
            lessons = Lessons.read(path)
        else:
            await self._publish()
            self._sampling = asyncio.create_task(self._sample(iteration))
            try:
                lessons, figures = await self._sampling
            except asyncio.CancelledError:
                if self._stopping and self._task is not None and not self._task.cancelling():
                    return None
                raise
            finally:
                self._sampling = None
            self._history = [*self._history[:iteration], figures]
        if lessons.rejected:
            await self._learner.take_contrasts(lessons.contrasts(), lessons.reference)
            if not lessons.reference:
                lessons = lessons.with_reference(await self._learner.reference())
        if not done:
            lessons.write(path)
        return lessons

    async def _sample(self, iteration: int) -> tuple[Lessons, Figures]:
        """Sample the iteration's prompts with the present weights, and make examples of the samples."""
        config, run, crew = self.config, self.config.run, self._crew
        numbers = list(range(len(self.inputs.prompts)))
        every = demonstration_batches(numbers, run.prompts, iteration + 1, run.seed)
        chosen = next(islice(every, iteration, None))
        prompts = [self.inputs.prompts[number] for number in chosen]
        first_id = iteration * run.prompts
        if isinstance(config, SpinJobConfig):
            sampled = await sample(crew.rollouts, prompts, config.rollout, first_id)
            self._count_generated(len(one.token_ids) for group in sampled for one in group.completions)
            return contrast(sampled, [self.inputs.demonstrations[number] for number in chosen])
        assert isinstance(config, RejectionJobConfig)
        answers = await sample_and_score(crew.rollouts, crew.scoring, prompts, config.rollout, first_id)
        groups = scored_groups(answers, config.scoring.max_error_fraction)
        self._count_generated(len(one.completion.token_ids) for group in groups for one in group.trajectories)
        lessons, figures = select(groups, config.rejection)
        figures["reward_errors"] = float(len(answers) - len(groups))
        if not len(lessons):
            best = max(one.reward for group in groups for one in group.trajectories)
            raise NothingLearnedError(
                f"iteration {iteration + 1}: none of {len(groups)} prompts has a sample that ends by itself "
                f"with a reward of rejection.minimum = {config.rejection.minimum}; the best of all samples "
                f"has {best:.4g}. Lower it, raise rollout.group_size or rollout.max_new_tokens, or warm the "
                "policy up for longer"
            )
        return lessons, figures

    async def _learn(self, lessons: Lessons, iteration: int, done: int) -> None:
        """The updates of an iteration from `done` on, to its end or to where a stop is asked for."""
        run = self.config.run
        seed = run.seed * 1_000_003 + iteration + 1
        order = demonstration_batches(list(range(len(lessons))), run.batch_size, run.updates, seed)
        batches = list(islice(order, done, None))
        figures = self._history[iteration] if not done else {}
        pairs = lessons.pairs()
        while batches and not self._stopping:
            part, batches = batches[:_SLICE], batches[_SLICE:]
            if isinstance(self.config, SpinJobConfig):
                rows = await self._learner.contrast(part, self.config.spin.beta)
            else:
                rows = await self._learner.imitate([[pairs[i] for i in batch] for batch in part])
            self._totals["trained"] += sum(len(lessons.chosen[i]) for batch in part for i in batch)
            rows[0], figures = rows[0] | figures, {}
            first = self.step
            self.step += len(part)
            if self.step % run.updates == 0:
                self._history[iteration] |= {
                    name: value for name, value in rows[-1].items() if name.startswith(_OF_AN_ITERATION)
                }
                if self._is_due(run.evaluate_every, iteration):
                    rows[-1] |= await self._look()
            for number, row in enumerate(rows):
                known = {"learner_step": float(first + number + 1), "iteration": float(iteration + 1)}
                self._monitor.step(row | known)
        if not batches:
            self._monitor.event(f"iteration {iteration + 1} of {run.iterations}: {len(lessons):,} examples")
            if self._is_due(run.checkpoint_every, iteration):
                await self._checkpoint()

    def _is_due(self, every: int, iteration: int) -> bool:
        last = iteration + 1 == self.config.run.iterations
        return last or (every > 0 and (iteration + 1) % every == 0)

    async def _look(self) -> dict[str, float]:
        """Held-out loss and rewards with the present weights."""
        if self._looks.samples:
            await self._publish()
        crew = self._crew
        return await self._looks.take(self.step, self._learner, crew.rollouts, crew.scoring, self._monitor)

    async def _publish(self) -> None:
        """Give the present weights to the rollout actors, unless they have them."""
        if self._published == self.step:
            return
        began = asyncio.get_running_loop().time()
        update = await self._learner.publish(self.step)
        proofs = await self._crew.rollouts.load_everywhere(update, _nothing)
        seconds = asyncio.get_running_loop().time() - began
        self._syncs.append((seconds, max((proof.probe_max_abs_diff for proof in proofs), default=0.0)))
        self._published = self.step

    async def _checkpoint(self) -> None:
        """Save what a resume needs; the folder appears whole or not at all."""
        root = self.run_dir / "checkpoints"
        folder = checkpoint.begin(root, self.step)
        await self._learner.save(folder.resolve())
        state = {
            "step": self.step,
            "data": self.inputs.fingerprint,
            "totals": self._totals,
            "history": self._history,
            "heldout_loss_initial": self._looks.first_loss,
            "reward_versions": {label: facts.version for label, facts in self._models.items()},
        }
        keep = self.config.run.keep_checkpoints
        final = await asyncio.to_thread(checkpoint.commit, root, self.step, state, keep=keep)
        self._saved = self.step
        self._monitor.event(f"checkpoint {final}")

    def _count_generated(self, lengths: Any) -> None:
        self._totals["generated"] += sum(lengths)

    def _stop(self) -> None:
        """Finish these updates and save; samples under way are given up. The second time, stop at once."""
        assert self._task is not None
        if self._stopping or not self._training:
            self._task.cancel()
            return
        self._monitor.event("stopping after these updates, with a checkpoint; once more to stop at once")
        self._stopping = True
        if self._sampling is not None:
            self._sampling.cancel()

    # ---- the end -------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says of the run so far; null for what was not reached, or does not apply."""
        finished = self.step == self.total_steps
        return {
            "objective": self.config.objective,
            "name": self.config.run.name,
            "steps": self.step,
            "iterations": self.step // self.config.run.updates,
            "history": self._history,
            "rows_quarantined": dict(self.inputs.quarantine.counts),
            **self._looks.summary(finished=finished),
            "demonstrations": len(self.inputs.demonstrations),
            "tokens_generated": int(self._totals["generated"]),
            "tokens_trained": int(self._totals["trained"]),
            "sync_s_mean": sum(s for s, _ in self._syncs) / len(self._syncs) if self._syncs else None,
            "sync_probe_max_abs_diff": max((apart for _, apart in self._syncs), default=None),
            **dict.fromkeys(_OF_LAG),
            "reward_models": {label: dataclasses.asdict(one) for label, one in self._models.items()},
            "versions": package_versions(),
        }

    def write_report(self) -> Path:
        """The report of a run with rollouts."""
        return write_report(self.run_dir)

    def leaves(self, status: str) -> str:  # noqa: ARG002 - it leaves them however it ends
        """Where the checkpoints are."""
        return f"checkpoints in {self.run_dir / 'checkpoints'}"


_OF_AN_ITERATION = ("supervised/loss", "loss/preference", "preference/")


def _nothing() -> None:
    """Nobody waits for actors: whoever samples next finds them."""


def _resumable(run_dir: Path, config: IteratedJobConfig) -> tuple[Path, list[str]]:  # noqa: ARG001
    return checkpoint.latest(run_dir / "checkpoints")


def _prepare(config: IteratedJobConfig, run_dir: Path, resume_from: Path | None) -> IteratedRun:
    return IteratedRun(config, prepare_iterated_job(config, run_dir), run_dir, resume_from)


KIND = Kind(_resumable, _prepare)

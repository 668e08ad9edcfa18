"""A controller on stand-ins for its actors, for the tests of its loops: a small world in one process."""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from actors.records import (
    Completion,
    Group,
    Prompt,
    RewardFailure,
    SampledGroup,
    SyncProof,
    Trajectory,
    WeightUpdate,
)
from cluster.accounts import Totals
from cluster.adaptation import Adaptation
from cluster.adaptive import Decision
from cluster.config import JobConfig
from cluster.config_file import parse_config
from cluster.controller import Controller, Hooks, StepReport
from cluster.evaluation import Evaluation, evaluate
from cluster.job import first_cause
from cluster.prompt_cursor import PromptCursor
from cluster.recruiting import Recruiter
from cluster.remote import WorkerFailedError, WorkerLostError
from cluster.rollout_pool import RolloutPool
from cluster.sampling import Sampling
from cluster.scheduler import Scheduler
from cluster.scoring_pool import ScoringPool


def build_controller(
    config: JobConfig,
    *,
    rollouts: Sequence[Any],
    scorers: Sequence[Any],
    learner: Any,
    prompts: list[Prompt],
    hooks: Hooks,
    on_reward_error: Callable[[RewardFailure], None],
    recruiter: Recruiter | None = None,
    create_scorer: Callable[[int], Any] | None = None,
    on_event: Callable[[str], None] = print,
    step: int = 0,
) -> Controller:
    """All that stands between stand-ins is the real thing. Every actor holds the weights of `step`."""
    on_loss = recruiter.on_loss if recruiter else None
    pool = RolloutPool(list(rollouts), config.rollout, config.sync, on_loss=on_loss)
    for actor in pool.actors:
        pool.slots.set_version(actor.remote.name, step)
    scheduler = Scheduler(
        groups_per_step=config.groups_per_step,
        window=config.scheduler.first_window,
        total_steps=config.run.steps,
        step=step,
    )
    totals = Totals()
    sampling = Sampling(
        config=config,
        scheduler=scheduler,
        cursor=PromptCursor(prompts, 0),
        rollouts=pool,
        scoring=ScoringPool(list(scorers), config.scoring, create=create_scorer, on_event=on_event),
        totals=totals,
        on_reward_error=on_reward_error,
    )
    adaptation = Adaptation(config.scheduler, scheduler, groups_per_step=config.groups_per_step)
    return Controller(config, sampling, learner, adaptation, hooks, totals)


def run_controller(
    controller: Controller,
    seconds: float,
    *beside: Coroutine[Any, Any, None],
    recruiter: Recruiter | None = None,
) -> None:
    """Train to the end, with a run's services and what goes on beside; TimeoutError if that takes longer."""

    async def all_of_it() -> None:
        async with asyncio.TaskGroup() as tasks:
            services = [controller.sampling.scoring.run(), *beside]
            if recruiter is not None:
                services.append(recruiter.run(controller.sampling.rollouts, controller.pump))
            running = [tasks.create_task(service) for service in services]
            try:
                await asyncio.wait_for(controller.run(), seconds)
            finally:
                for service in running:
                    service.cancel()

    try:
        asyncio.run(all_of_it())
    except BaseExceptionGroup as group:
        raise first_cause(group) from None


JOB = """
[run]
steps = 12
batch_size = 4
checkpoint_every = 5
[model.scratch]
[task]
kind = "reversal"
[[reward]]
kind = "task"
[rollout]
group_size = 2
"""


class StandIn:
    """Plays every actor of a small world; `log` has the learner's and the rollout actors' calls in order."""

    def __init__(self, name: str, world: "World", place: int = 0) -> None:
        self.name = name
        self.world = world
        self.place = place
        self.version = world.first_step

    async def call(self, method: str, *args: Any, seconds: float) -> Any:
        self._live()
        answer = await getattr(self, method)(*args)
        self._live()  # what a process answers after its end nobody hears
        return answer

    def _live(self) -> None:
        if self.name in self.world.lost:
            raise WorkerLostError(f"{self.name} died")

    def kill(self) -> None:
        self.world.lost.add(self.name)

    async def start(self) -> None:
        await asyncio.sleep(self.world.start_seconds)

    async def sample(self, request: Any) -> SampledGroup:
        started = self.version
        load = self.world.rollouts.slots[self.name].in_flight
        self.world.most_in_flight[self.name] = max(self.world.most_in_flight[self.name], load)
        await asyncio.sleep(self.world.sample_seconds(request.prompt.id) * self.world.slowness[self.name])
        if request.prompt.id.startswith("h"):
            self.world.held_back += 1
            self.world.most_held_back = max(self.world.most_held_back, self.world.held_back)
            await self.world.gate.wait()
            self.world.held_back -= 1
        if self.name in self.world.broken:
            raise WorkerFailedError(f"{self.name} failed to sample: no luck")
        tokens = tuple(range(3))
        versions = (started, self.version, self.version)
        completions = (Completion(tokens, (-1.0,) * 3, versions, "abc", "stop"),) * request.group_size
        self.world.sampled_by[request.group_id] = self.name
        return SampledGroup(request.group_id, request.prompt, completions, self.name, 0.001)

    async def score(self, groups: list[SampledGroup]) -> list[Any]:
        await asyncio.sleep(0.0003)
        if any(group.prompt.id == self.world.poisonous for group in groups):
            self.kill()
        return [self._scored(group) for group in groups]

    def _scored(self, group: SampledGroup) -> Any:
        if group.prompt.id in self.world.unscorable:
            return RewardFailure(group.group_id, group.prompt.id, "gold", "raised")
        trajectories = tuple(
            Trajectory(c, self.world.reward(group.prompt.id, i), {"gold": 1.0}, c.logprobs)
            for i, c in enumerate(group.completions)
        )
        return Group(group.group_id, group.prompt, trajectories, group.actor, 0.001, 0.001)

    async def load_weights(self, update: WeightUpdate) -> SyncProof:
        await asyncio.sleep(self.world.rng.random() * self.world.load_seconds)
        assert update.version > self.version
        self.version = update.version
        return SyncProof(self.name, update.version, 1e-6, 0.001, 0.001, 0)


class Learner:
    """Records what it is asked; fails if steps and publications are out of order."""

    def __init__(self, world: "World") -> None:
        self.world = world

    async def step(self, groups: list[Group], version: int) -> dict[str, float]:
        self.world.log.append(("step", version))
        lags = [version - v for g in groups for t in g.trajectories for v in t.completion.versions]
        await asyncio.sleep(self.world.train_seconds)
        self.world.trained += [group.prompt.id for group in groups]
        self.world.group_ids += [group.group_id for group in groups]
        row = {"lag/mean": sum(lags) / len(lags), "lag/max": float(max(lags)), "perf/padding_fraction": 0.0}
        for lag in set(lags):
            drift = self.world.engine + self.world.drift * lag
            row |= {
                f"mismatch/kl_by_lag/{lag}": drift,
                f"mismatch/kl_se_by_lag/{lag}": 0.01 * drift + 1e-9,
                f"mismatch/tokens_by_lag/{lag}": float(lags.count(lag)),
                f"mismatch/ess_by_lag/{lag}": 0.99,
            }
        return row | {"mismatch/ess": 0.99}

    async def publish(self, version: int) -> WeightUpdate:
        self.world.log.append(("publish", version))
        await asyncio.sleep(0.0005)
        return WeightUpdate(version, {}, ((1, 2),), ((-1.0,),))


class World:
    """A controller with everything it needs; `reports` and `checkpoints` are what it told the outside."""

    def __init__(
        self,
        *overrides: str,
        actors: int = 2,
        window: int | str = 2,
        seed: int = 0,
        most_actors: int = 0,
        step: int = 0,
    ) -> None:
        """`most_actors`: how many there may be; 0: a lost one has no successor. `step`: where it begins."""
        self.first_step = step
        self.rng = random.Random(seed)
        self.log: list[tuple[str, int]] = []
        self.trained: list[str] = []
        self.group_ids: list[int] = []
        self.sampled_by: dict[int, str] = {}
        self.broken: set[str] = set()
        self.lost: set[str] = set()
        self.poisonous = ""  # a prompt that takes the scoring actor with it
        self.events: list[str] = []
        self.has_room = True
        self.start_seconds = 0.005
        self.made = 0
        self.unscorable: set[str] = set()
        self.reports: list[StepReport] = []
        self.failures: list[RewardFailure] = []
        self.checkpoints: list[tuple[int, list[str]]] = []
        self.saved: list[tuple[int, int]] = []  # (step of a checkpoint, learner steps that were begun)
        self.evaluations: list[Evaluation] = []
        self.heldout = [Prompt(f"h{i}", (1, 2), "x") for i in range(12)]
        self.gate = asyncio.Event()  # held-out samples come back once it is set
        self.held_back = self.most_held_back = 0
        self.gate.set()
        self.reward: Callable[[str, int], float] = lambda _prompt, _sample: 1.0
        self.decisions: list[Decision] = []
        config = parse_config(JOB, [f"scheduler.window={window}", *overrides])
        self.sample_seconds: Callable[[str], float] = lambda _: self.rng.paretovariate(1.2) * 0.0005
        self.train_seconds = 0.001
        self.load_seconds = 0.002
        self.engine, self.drift = 1e-5, 1e-4  # D(s) = engine + drift · s
        self.most_in_flight: Counter[str] = Counter()
        self.slowness: defaultdict[str, float] = defaultdict(lambda: 1.0)
        prompts = [Prompt(f"p{i}", (1, 2), "x") for i in range(400)]
        if most_actors:
            self.recruiter: Recruiter | None = Recruiter(
                create=lambda place: self._create("rollout", place),
                has_room=lambda: self.has_room,
                on_event=self.events.append,
                places=actors,
                most_places=most_actors,
            )
        else:
            self.recruiter = None
        self.controller = build_controller(
            config,
            rollouts=[StandIn(f"rollout-{i}", self, i) for i in range(actors)],
            scorers=[StandIn("scoring-0", self)],
            learner=Learner(self),
            prompts=prompts,
            hooks=Hooks(self._report, self._checkpoint, self._evaluate, self.decisions.append),
            on_reward_error=self.failures.append,
            recruiter=self.recruiter,
            create_scorer=(lambda place: self._create("scoring", place)) if most_actors else None,
            on_event=self.events.append,
            step=step,
        )
        self.sampling = self.controller.sampling
        self.rollouts = self.sampling.rollouts

    def _create(self, role: str, place: int) -> Any:
        self.made += 1
        return StandIn(f"{role}-{place}.{self.made}", self, place)

    def _report(self, report: StepReport) -> None:
        self.reports.append(report)

    async def _checkpoint(self, step: int) -> None:
        self.checkpoints.append((step, self.sampling.pending_prompts()))
        begun = [number for kind, number in self.log if kind == "step"]
        self.saved.append((step, begun[-1] + 1 if begun else self.first_step))

    async def _evaluate(self, version: int, _training_s: float) -> None:
        """The real evaluation, on stand-ins: it refuses samples of another version itself."""
        pauses = self.controller.config.run.evaluate_pauses
        assert not pauses or self.sampling.scheduler.in_flight == 0
        self.log.append(("evaluate", version))
        found = await evaluate(
            self.heldout,
            self.rollouts,
            self.sampling.scoring,
            self.controller.config.rollout,
            samples=2,
            version=version,
            on_free=None if pauses else self.controller.pump,
        )
        self.evaluations.append(found)
        self.log.append(("evaluated", version))

    def during(self, version: int) -> list[int]:
        """The learner steps that began after weights were out and before they were evaluated."""
        first, last = (self.log.index((kind, version)) for kind in ("publish", "evaluated"))
        return [number for kind, number in self.log[first:last] if kind == "step"]

    def run(self, *beside: Coroutine[Any, Any, None]) -> None:
        run_controller(self.controller, 120, *beside, recruiter=self.recruiter)

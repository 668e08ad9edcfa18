"""A run without the machines: the real scheduler, dispatcher and adaptive rule, with simulated times.

    next_dispatch ─► Engine (tokens, virtual time) ─► scoring ─► scheduler.complete
          ▲                    ▲                                      │ ready
          └──── new weights ◄──┴── sync ◄── publish ◄── training ◄────┘ take

Discrete events: nothing happens between two of them. Work (sampling, scoring, training, loading) is counted
in seconds of work; where cores are shared and more are wanted than there are, all of it slows down alike, and
only the rate of that one clock changes. Losses and recoveries of actors happen in wall-clock seconds.
"""

import dataclasses
import gc
from collections import deque
from collections.abc import Iterator

import numpy as np

from actors.settings import BATCH_GROUPS
from cluster.accounts import Occupancy, WaitCause, wait_cause
from cluster.adaptation import Adaptation
from cluster.dispatch import Dispatcher, next_dispatch
from cluster.plan_model import Workload
from cluster.scheduler import Refusal, Scheduler
from cluster.sim_clock import Agenda
from cluster.sim_engine import Engine, Flight
from cluster.sim_record import Recorder
from cluster.sim_results import Plant, SimResult, StepRecord, synthetic_mismatch

_MOST_LOSSES = 20  # of a group, on average: more, and a run would hardly ever end


class SimulationStalledError(RuntimeError):
    """Nothing is under way and nothing can start: a defect of the scheduler or of the simulator."""


class Simulation:
    """One run of `steps` learner steps. `run` gives what came of it."""

    def __init__(
        self, plant: Plant, workload: Workload, *, steps: int, seed: int = 0, spans_of_steps: int = 0
    ) -> None:
        """`spans_of_steps`: of how many steady steps to keep who did what when, for a picture."""
        self.plant, self.workload, self.steps = plant, workload, steps
        self.scheduler = Scheduler(
            groups_per_step=plant.groups_per_step, window=plant.scheduler.first_window, total_steps=steps
        )
        self.adaptation = Adaptation(plant.scheduler, self.scheduler, groups_per_step=plant.groups_per_step)
        self.transitions = 0  # of groups: admitted, completed, taken, dispatched again
        self._dispatcher = Dispatcher()
        lengths_rng, self._rng = (np.random.default_rng([seed, part]) for part in (1, 2))
        self._lengths: Iterator[tuple[int, ...]] = workload.lengths.groups(
            plant.group_size, plant.max_new_tokens, lengths_rng
        )
        self._clock = Agenda()
        self._notes = Recorder(self._clock, plant.actors, pictures=spans_of_steps > 0)
        self._flights: dict[int, Flight] = {}
        self._scored: dict[int, tuple[Flight, int]] = {}  # ready groups, steps finished by then
        self._engines: dict[str, Engine] = {}
        self._dirty: dict[str, Engine] = {}  # engines whose next change must be found anew
        self._lost: deque[int] = deque()  # groups to dispatch again
        self._to_score: deque[Flight] = deque()
        self._free_scorers = plant.scorers
        self._scorers = Occupancy()
        self._published = 0
        self._finished = 0  # learner steps
        self._syncing: set[str] = set()  # actors that have not proved the newest weights
        self._losses = self._lost_groups = 0
        self._learner_busy = False
        self._want_publish = False
        self._refusal: Refusal = Refusal.NO_SLOT
        self._span_steps = spans_of_steps
        self._done = False
        self._build_actors()

    # ---- the clock ----------------------------------------------------------------------------------------

    def run(self) -> SimResult:
        """Simulate to the end."""
        collecting = gc.isenabled()
        gc.disable()  # nothing here makes cycles, and looking for them would cost a tenth
        try:
            self._pump()
            self._try_step()
            while not self._done:
                if self._dirty:
                    self._predict()
                if not self._clock.advance():
                    raise SimulationStalledError(
                        f"step {self.scheduler.step}: {self.scheduler.queued} groups ready, "
                        f"{self.scheduler.in_flight} in flight, and nothing is due"
                    )
        finally:
            if collecting:
                gc.enable()
        notes = self._notes
        result = SimResult(self.plant, notes.records, self._clock.wall, self.transitions, self._losses)
        if not self._span_steps:
            return result
        end = result.steady_steps[1]
        first, last = notes.records[max(0, end - self._span_steps)], notes.records[end - 1]
        shown = (first.started, last.ended)
        return dataclasses.replace(result, spans=notes.spans, shown=shown, occupancy=notes.occupancy)

    def _share_cores(self) -> None:
        """Set the rate of work: cores there are over cores wanted, at most 1."""
        sharing = self.workload.sharing
        if not sharing.cores:
            return
        wanted = (
            self._notes.busy_actors * sharing.actor
            + self._learner_busy * sharing.learner
            + (self.plant.scorers - self._free_scorers) * sharing.scoring
        )
        self._clock.rate = min(1.0, sharing.cores / wanted) if wanted else 1.0

    # ---- rollout actors -----------------------------------------------------------------------------------

    def _build_actors(self) -> None:
        plant, generation = self.plant, self.workload.generation
        most = max(plant.max_num_seqs, plant.group_size)
        speeds = [generation.speeds[i % len(generation.speeds)] for i in range(plant.actors)]
        self._tables = {speed: generation.table(most, plant.max_num_seqs, speed) for speed in set(speeds)}
        self._speeds = {f"rollout-{i}": speed for i, speed in enumerate(speeds)}
        for name in self._speeds:
            self._add_actor(name)

    def _add_actor(self, name: str) -> None:
        plant, generation = self.plant, self.workload.generation
        self._engines[name] = Engine(
            name,
            self._tables[self._speeds[name]],
            max_num_seqs=plant.max_num_seqs,
            prompt_tokens=generation.prompt_tokens,
            prefill_token_s=generation.prompt_token_s,
            version=self._published,
            now=self._clock.work,
        )
        self._dispatcher.add(name, capacity=plant.max_groups_in_flight, version=self._published)
        if mean := self.workload.failures.mean_s_between:
            self._clock.after_wall(self._rng.exponential(mean), self._lose, name)

    def _pump(self) -> None:
        """Give work to every free slot that the scheduler admits, lost groups first."""
        while self._lost and self._send_again(self._lost[0]):
            self._lost.popleft()
        while True:
            answer = next_dispatch(self.scheduler, self._dispatcher)
            if isinstance(answer, Refusal):
                self._refusal = answer
                return
            admission, actor = answer
            lengths = next(self._lengths)
            flight = Flight(admission.group_id, lengths, sum(lengths), self._clock.wall, actor.version)
            self._flights[admission.group_id] = flight
            self._give(flight, self._engines[actor.name])

    def _pump_slots(self, version: int) -> None:
        """`_pump` after a slot became free on an actor of this version, where that can help."""
        refusal = self._refusal
        if (
            self._lost
            or refusal is Refusal.NO_SLOT
            or (refusal is Refusal.STALE_ACTOR and self.scheduler.has_room_for(version))
        ):
            self._pump()

    def _give(self, flight: Flight, engine: Engine) -> None:
        self.transitions += 1
        if engine.empty and engine.busy_since is None:
            engine.busy_since = self._clock.wall
            self._notes.busy(1)
            self._share_cores()
        engine.add(flight, self._clock.work)
        self._notes.groups_at(engine)
        self._dirty[engine.name] = engine

    def _send_again(self, group_id: int) -> bool:
        for actor in self._dispatcher.best_of_each_version():
            if self.scheduler.redispatch(group_id, actor.version):
                self._dispatcher.begin(actor.name)
                self._flights[group_id].admitted = actor.version
                self._give(self._flights[group_id], self._engines[actor.name])
                return True
        return False

    def _predict(self) -> None:
        """Put the next change of every engine that something happened to among the events."""
        for engine in self._dirty.values():
            engine.stamp += 1
            if (change := engine.next_change()) is not None:
                self._clock.at_work(change, self._engine_changed, engine, engine.stamp)
        self._dirty.clear()

    def _engine_changed(self, engine: Engine, stamp: int) -> None:
        """A group is done, or one that waited inside the engine could enter."""
        if stamp != engine.stamp:
            return
        self._dirty[engine.name] = engine
        done = engine.collect(self._clock.work)
        for flight in done:
            flight.sampled = self._clock.wall
            self._dispatcher.end(engine.name)
            self._to_score.append(flight)
        if not done:
            return
        self._notes.groups_at(engine)
        self._rest_if_empty(engine)
        if engine.draining and not engine.loading and not engine.running:  # what was in flight has finished
            self._clock.at_work(self._begin_load(engine), self._loaded, ([engine], self._clock.wall))
        self._pump_slots(self._dispatcher[engine.name].version)
        self._score()

    def _rest_if_empty(self, engine: Engine) -> None:
        if not engine.empty or engine.busy_since is None:
            return
        self._notes.span("sampling", engine.name, engine.busy_since)
        engine.busy_since = None
        self._notes.busy(-1)
        self._share_cores()

    # ---- scoring ------------------------------------------------------------------------------------------

    def _score(self) -> None:
        """Give queued groups to free scoring actors, up to a batch each."""
        scoring = self.workload.scoring
        while self._to_score and self._free_scorers:
            batch = [self._to_score.popleft() for _ in range(min(BATCH_GROUPS, len(self._to_score)))]
            self._free_scorers -= 1
            self._scorers.change(1, self.plant.scorers, self._clock.wall)
            self._share_cores()
            self._clock.after(
                scoring.call_s + scoring.group_s * len(batch), self._batch_scored, (self._clock.wall, batch)
            )

    def _batch_scored(self, what: tuple[float, list[Flight]], _: int) -> None:
        started, batch = what
        self._free_scorers += 1
        self._scorers.change(-1, self.plant.scorers, self._clock.wall)
        self._share_cores()
        self._notes.span("scoring", "scoring", started)
        moved = False
        for flight in batch:
            self.scheduler.complete(flight.group_id, flight.oldest_version)
            flight.scored = self._clock.wall
            self._scored[flight.group_id] = (flight, self._finished)
            self.transitions += 1
            moved |= flight.oldest_version > flight.admitted
        if moved:  # only a later deadline makes room
            self._pump()
        self._score()
        self._try_step()

    # ---- the learner --------------------------------------------------------------------------------------

    def _try_step(self) -> None:
        """Start the next step if the learner is free and the scheduler says ready."""
        if self._learner_busy or self._want_publish or self._done:
            return
        if not self.scheduler.ready():
            enough = self.scheduler.queued >= self.plant.groups_per_step
            self._notes.wait_for(wait_cause(enough_ready=enough, refusal=self._refusal))
            return
        self._notes.end_wait()
        step = self.scheduler.step
        flights = [self._take(group_id) for group_id in self.scheduler.take()]
        self.transitions += len(flights)
        self._pump()
        record = self._notes.step(step, flights, self.scheduler, self.adaptation.publish_every)
        learner = self.workload.learner
        tokens = record.tokens + len(flights) * self.plant.group_size * self.workload.generation.prompt_tokens
        seconds = learner.step_s + learner.token_s * tokens
        if learner.variation:  # a gamma variable of mean 1
            shape = learner.variation**-2
            seconds *= self._rng.gamma(shape, 1 / shape)
        self._learner_works(True)
        self._clock.after(seconds, self._trained, (record, self._clock.wall))

    def _take(self, group_id: int) -> tuple[Flight, int]:
        del self._flights[group_id]
        return self._scored.pop(group_id)

    def _learner_works(self, busy: bool) -> None:
        self._learner_busy = busy
        self._share_cores()

    def _trained(self, what: tuple[StepRecord, float], _: int) -> None:
        """A step is done: adapt, and publish if that is due."""
        record, started = what
        self._learner_works(False)
        self._notes.span("training", "learner", started, step=record.step)
        self._notes.finish(record)
        self._finished = record.step + 1
        self._adapt(record)
        self._pump()
        if self.scheduler.step >= self.steps:
            self._done = True
            return
        due = self.scheduler.publish_due(self._published, self.adaptation.publish_every)
        self._notes.wait_for(WaitCause.SYNC)
        if due:
            self._want_publish = True
            self._publish_when_synced()
        else:
            self._try_step()

    def _publish_when_synced(self) -> None:
        """Publish as soon as every actor has proved the weights before."""
        if not self._want_publish or self._learner_busy or self._syncing:
            return
        self._notes.end_wait()
        self._learner_works(True)
        self._clock.after(self.workload.sync.publish_s, self._sent, self._clock.wall)

    def _sent(self, started: float, _: int) -> None:
        """The weights are out: every actor loads and proves them, and the learner goes on."""
        self._learner_works(False)
        self._want_publish = False
        self._published = self.scheduler.step
        self._notes.records[-1].publish_s = self._clock.wall - started
        self._notes.span("publishing", "learner", started)
        self._notes.wait_for(WaitCause.SYNC)
        self._notes.sync_began()
        self._syncing = set(self._engines)
        together: dict[float, list[Engine]] = {}  # engines whose loads end at one moment are one event
        for engine in self._engines.values():
            if self.plant.keep_in_flight or not engine.running:
                together.setdefault(self._begin_load(engine), []).append(engine)
            else:
                engine.draining = True
        for end, engines in together.items():
            self._clock.at_work(end, self._loaded, (engines, self._clock.wall))
        self._try_step()

    def _begin_load(self, engine: Engine) -> float:
        """Nothing is sampled until the moment that this gives; groups that come wait for the new weights."""
        engine.draining = engine.loading = True
        engine.stamp += 1
        sync = self.workload.sync
        return engine.hold(self._clock.work, sync.load_s + sync.actor_s * self.plant.actors)

    def _loaded(self, what: tuple[list[Engine], float], _: int) -> None:
        engines, started = what
        for engine in engines:
            self._notes.span("loading", engine.name, started)
            engine.loading = False
            engine.switch(self._published, self._clock.work)
            if engine.running and self._is_there(engine):
                self._dirty[engine.name] = engine
        self._clock.after(self.workload.sync.probe_s, self._proved, (engines, self._published))

    def _proved(self, what: tuple[list[Engine], int], _: int) -> None:
        engines, version = what
        for engine in engines:
            if self._is_there(engine):
                self._dispatcher.set_version(engine.name, version)
                self._syncing.discard(engine.name)
                self._pump_slots(version)
        self._sync_may_be_over()

    def _is_there(self, engine: Engine) -> bool:
        return self._engines.get(engine.name) is engine

    def _sync_may_be_over(self) -> None:
        """The learner may go on publishing once every actor that is there has proved the last weights."""
        if not self._syncing:
            self._notes.sync_ended()
        self._publish_when_synced()
        self._try_step()

    # ---- losses -------------------------------------------------------------------------------------------

    def _lose(self, name: str, _: int) -> None:
        """An actor is lost with all its groups; they are dispatched again, and it comes back later."""
        engine = self._engines.pop(name)
        engine.stamp += 1
        self._dirty.pop(name, None)
        self._losses += 1
        lost = engine.lose()
        self._lost_groups += len(lost)
        if self._lost_groups > 1000 + _MOST_LOSSES * self.steps * self.plant.groups_per_step:
            raise ValueError(
                f"failures.mean_s_between = {self.workload.failures.mean_s_between:g}: actors are lost "
                f"before they finish a group (step {self.scheduler.step} of {self.steps}); raise it"
            )
        self._notes.groups_at(engine)
        self._rest_if_empty(engine)
        self._dispatcher.remove(name)
        self._lost.extend(flight.group_id for flight in lost)
        self._clock.after_wall(self.workload.failures.recovery_s, self._recover, name)
        self._syncing.discard(name)
        self._pump()
        self._sync_may_be_over()

    def _recover(self, name: str, _: int) -> None:
        self._add_actor(name)
        self._pump()
        self._try_step()

    def _adapt(self, record: StepRecord) -> None:
        """Give the adaptive rule, where there is one, what a real run would have measured."""
        if not self.plant.scheduler.is_adaptive:
            return
        before = self._notes.records[-2] if len(self._notes.records) > 1 else None
        sync = self.workload.sync
        self.adaptation.after_step(
            record.step + 1,
            synthetic_mismatch(record.lags, self.workload.drift, self._rng),
            step_seconds=record.ended - (before.ended if before else 0.0),
            wait_seconds={cause.value: seconds for cause, seconds in record.waits.items()},
            sync_seconds=sync.load_s + sync.actor_s * self.plant.actors if before else 0.0,
            published=self._published == record.step,
            ready_left=record.queued,
            saturated_seconds=self._scorers.lap(self._clock.wall),
        )

"""What a simulated run notes while it goes on: steps, waits by cause, how busy actors are, and a timeline."""

from collections import Counter
from collections.abc import Sequence

from cluster.accounts import WaitCause
from cluster.scheduler import Scheduler
from cluster.sim_clock import Agenda
from cluster.sim_engine import Engine, Flight
from cluster.sim_results import Span, StepRecord


class Recorder:
    """Keeps a record of every step; with `pictures` also who did what when."""

    def __init__(self, clock: Agenda, actors: int, *, pictures: bool) -> None:
        self.records: list[StepRecord] = []
        self.spans: list[Span] = []
        self.occupancy: dict[str, list[tuple[float, int]]] = {}
        self.busy_actors = 0
        self._clock = clock
        self._actors = actors
        self._pictures = pictures
        self._waits: dict[WaitCause, float] = dict.fromkeys(WaitCause, 0.0)
        self._waiting_since: float | None = 0.0
        self._waiting_for = WaitCause.SAMPLING
        self._area = self._noted = self._reported = 0.0  # actor-seconds with work
        self._sync_began: float | None = None

    # ---- waits and work ------------------------------------------------------------------------------

    def wait_for(self, cause: WaitCause) -> None:
        """From now on the learner waits for this; what it waited for until now is counted."""
        self.end_wait()
        self._waiting_since, self._waiting_for = self._clock.wall, cause

    def end_wait(self) -> None:
        """The learner waits no longer."""
        if self._waiting_since is not None:
            self._waits[self._waiting_for] += self._clock.wall - self._waiting_since
            self._waiting_since = None

    def busy(self, more: int) -> None:
        """So many more actors have work."""
        now = self._clock.wall
        self._area += self.busy_actors * (now - self._noted)
        self._noted = now
        self.busy_actors += more

    def sync_began(self) -> None:
        """Weights are on their way to all actors."""
        self._sync_began = self._clock.wall

    def sync_ended(self) -> None:
        """All actors have proved them: the first time that this is said after `sync_began` counts."""
        if self._sync_began is not None:
            self.records[-1].sync_s = self._clock.wall - self._sync_began
            self._sync_began = None

    # ---- steps ---------------------------------------------------------------------------------------

    def step(
        self, number: int, taken: Sequence[tuple[Flight, int]], scheduler: Scheduler, publish_every: int
    ) -> StepRecord:
        """A step begins, with these groups; beside each the learner's step when it became ready."""
        lags: Counter[int] = Counter()
        in_queue = 0.0
        for flight, ready_step in taken:
            in_queue += (number - ready_step) * flight.tokens
            for version, tokens in flight.versions:
                lags[number - version] += tokens
        waits, self._waits = self._waits, dict.fromkeys(WaitCause, 0.0)
        return StepRecord(
            step=number,
            started=self._clock.wall,
            tokens=sum(lags.values()),
            lags=lags,
            queue_lag=in_queue / sum(lags.values()),
            waits=waits,
            sample_s=sum(flight.sampled - flight.dispatched for flight, _ in taken) / len(taken),
            window=scheduler.window,
            publish_every=publish_every,
            queued=scheduler.queued,
            in_flight=scheduler.in_flight,
        )

    def finish(self, record: StepRecord) -> None:
        """The step is trained."""
        self.busy(0)
        record.rollout_busy_s = (self._area - self._reported) / self._actors
        self._reported = self._area
        record.ended = self._clock.wall
        record.train_s = record.ended - record.started
        self.records.append(record)

    # ---- for pictures --------------------------------------------------------------------------------

    def span(self, kind: str, who: str, started: float, step: int = -1) -> None:
        """Something that began at `started` ends now."""
        if self._pictures:
            self.spans.append(Span(kind, who, started, self._clock.wall, step))

    def groups_at(self, engine: Engine) -> None:
        """The number of an actor's groups changed."""
        if self._pictures:
            groups = len(engine.running) + len(engine.waiting)
            self.occupancy.setdefault(engine.name, []).append((self._clock.wall, groups))

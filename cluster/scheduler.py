"""The scheduler: which group may be sampled, and which groups a learner step trains on.

A pure, synchronous state machine: no Ray, no torch, no clock. The controller (and the simulator) call its
verbs in the order of a group's life: `admit` → `complete` → `take`, with `redispatch` after a lost sample
and `drop` where a group is left out. After each step `publish_due` says whether weights must go out.

Legend: k = the learner's next step (= the newest weight version), P = groups a step, S = the window: the
largest lag allowed. The *lag* of a token is the step that trains it minus the version that sampled it.

The bound. A group's deadline is the last step that may train it: (oldest version among its tokens) + S, with
S as it was at admission. The scheduler keeps this invariant:

    for every step j ≥ k:  (untrained groups with a deadline ≤ j)  ≤  P · (j − k + 1)

so there is always room to train every group in time. `admit` answers no where a new group would break it;
`ready` answers no where training the P earliest ready groups would break it for the rest. Why no token is
then ever trained with lag > S, and why the system cannot deadlock, stands in docs/scheduler.md.
"""

import heapq
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal

from pydantic import Field

from rewards.settings import Settings


class LagBoundError(AssertionError):
    """A group would be trained after its deadline: a defect of the scheduler or of its caller."""


class SchedulerSettings(Settings):
    """`[scheduler]`: how far sampling may run ahead of training."""

    window: Annotated[int, Field(ge=0)] | Literal["adaptive"] = Field(
        1,
        description="S: largest lag of a trained token, in learner steps; 0 is synchronous; adaptive: as "
        "small as keeps the learner busy, within `max_drift` and `min_ess`.",
    )
    publish_every: int = Field(
        1,
        ge=1,
        description="M: learner steps between two publications of weights, at most S + 1; adaptive: where "
        "it starts.",
    )
    max_window: int = Field(8, ge=0, description="Adaptive: largest S.")
    max_drift: float = Field(
        0.02, gt=0, description="Adaptive: largest KL(μ‖π) at lag S that is accepted, in nats a token."
    )
    min_ess: float = Field(
        0.8, gt=0, lt=1, description="Adaptive: smallest effective sample size that is accepted, as a share."
    )
    wait_tolerance: float = Field(
        0.05, gt=0, lt=1, description="Adaptive: share of a step that the learner may wait unmended."
    )
    sync_share: float = Field(
        0.1, gt=0, lt=1, description="Adaptive: share of a step that weight sync may take from the actors."
    )

    @property
    def is_adaptive(self) -> bool:
        """Whether S follows measurement."""
        return self.window == "adaptive"

    @property
    def first_window(self) -> int:
        """S at the start: as set, or 1 where it adapts."""
        return min(1, self.max_window) if isinstance(self.window, str) else self.window

    @property
    def largest_window(self) -> int:
        """What S never passes."""
        return self.max_window if isinstance(self.window, str) else self.window


class Refusal(Enum):
    """Why no group may be admitted now, and what would change it."""

    WINDOW_FULL = "the window is full: a step must be trained first"
    AHEAD_FULL = "as many groups as wanted are under way: a step must be trained first"
    STALE_ACTOR = "the actor's weights are too old: it must load newer ones first"
    BUDGET_SPENT = "every group that the run still needs is under way"
    NO_SLOT = "every slot of every actor is taken: a group must come back first"


@dataclass(frozen=True, slots=True)
class Admission:
    """Permission to sample one group; `deadline` is the last step that may train it."""

    group_id: int
    deadline: int


@dataclass(slots=True)
class _Entry:
    version: int  # no token of the group is older
    deadline: int
    is_ready: bool = False


class Scheduler:
    """Admission and consumption of groups under a hard bound on lag."""

    def __init__(
        self, *, groups_per_step: int, window: int, total_steps: int, step: int = 0, first_id: int = 0
    ) -> None:
        """Start at learner step `step` of `total_steps` with nothing under way; ids count from `first_id`."""
        if groups_per_step < 1 or window < 0 or not 0 <= step <= total_steps:
            raise ValueError(
                f"need P ≥ 1, S ≥ 0 and 0 ≤ step ≤ total_steps, got P = {groups_per_step}, S = {window}, "
                f"step = {step}, total_steps = {total_steps}"
            )
        self._groups_per_step = groups_per_step
        self._window = window
        self._ahead: int | None = None
        self._total_steps = total_steps
        self._step = step
        self._next_id = first_id
        self._untrained: dict[int, _Entry] = {}
        self._untrained_by_deadline: Counter[int] = Counter()
        self._ready_by_deadline: Counter[int] = Counter()
        self._ready_heap: list[tuple[int, int]] = []  # (deadline, group id); entries are checked when popped
        self._ready_count = 0
        self._last_deadline = 0
        self.dispatched = 0
        self.dropped = 0
        self.trained = 0

    # ---- what it knows ---------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """k: the next step to be trained."""
        return self._step

    @property
    def next_id(self) -> int:
        """The id that the next admitted group gets."""
        return self._next_id

    @property
    def window(self) -> int:
        """S for the groups admitted from now on."""
        return self._window

    @property
    def in_flight(self) -> int:
        """Admitted groups that are not yet ready."""
        return len(self._untrained) - self._ready_count

    @property
    def queued(self) -> int:
        """Groups that are ready and not yet taken."""
        return self._ready_count

    @property
    def untrained(self) -> int:
        """Admitted groups that no step has taken yet, ready or not."""
        return len(self._untrained)

    def full(self) -> Refusal | None:
        """Why no actor, whatever its weights, may have one more group; None where one on new weights may."""
        untrained, groups = len(self._untrained), self._groups_per_step
        if untrained >= groups * (self._total_steps - self._step):
            return Refusal.BUDGET_SPENT
        if untrained >= groups * (self._window + 1):
            return Refusal.WINDOW_FULL
        if self._ahead is not None and untrained >= self._ahead:
            return Refusal.AHEAD_FULL
        return None

    @property
    def room(self) -> int:
        """How many groups may be admitted now on the newest weights."""
        most = self._groups_per_step * min(self._window + 1, self._total_steps - self._step)
        if self._ahead is not None and self._ahead < most:
            most = self._ahead
        return max(0, most - len(self._untrained))

    @property
    def ahead(self) -> int | None:
        """Most untrained groups at a time, where something but the window limits them."""
        return self._ahead

    def set_window(self, window: int) -> None:
        """Change S for later admissions; groups already admitted keep their deadlines."""
        if window < 0:
            raise ValueError(f"window must be at least 0, got {window}")
        self._window = window

    def set_ahead(self, most: int | None) -> None:
        """Admit no more than `most` untrained groups at a time, however wide the window; None: no limit."""
        if most is not None and most < self._groups_per_step:
            raise ValueError(f"ahead must be at least P = {self._groups_per_step}, got {most}")
        self._ahead = most

    def publish_due(self, published: int, every: int) -> bool:
        """Whether weights must go out before step k, where those of version `published` are the newest out.

        They must after `every` steps; earlier where no group of that version could meet step k any more
        (published + S < k), since nothing could be admitted then; and when the last step is done.
        """
        age = self._step - published
        return age > 0 and (age >= every or age > self._window or self._step >= self._total_steps)

    # ---- the life of a group -----------------------------------------------------------------------------

    def admit(self, actor_version: int) -> Admission | Refusal:
        """Ask to sample one more group on an actor that holds weights of `actor_version`."""
        if (full := self.full()) is not None:
            return full
        if not self.has_room_for(actor_version):
            return Refusal.STALE_ACTOR  # a newer actor's group would get a later deadline, which has room
        deadline = actor_version + self._window
        group_id = self._next_id
        self._next_id += 1
        self.dispatched += 1
        self._untrained[group_id] = _Entry(actor_version, deadline)
        self._untrained_by_deadline[deadline] += 1
        self._last_deadline = max(self._last_deadline, deadline)
        return Admission(group_id, deadline)

    def redispatch(self, group_id: int, actor_version: int) -> bool:
        """Ask to sample a lost group again on another actor; false where that actor's weights are too old.

        The deadline stays or moves later, so the invariant holds as it did before.
        """
        entry = self._untrained[group_id]
        if actor_version < entry.version:
            return False
        self._move(entry, max(entry.deadline, actor_version + self._window))
        entry.version = actor_version
        return True

    def complete(self, group_id: int, oldest_version: int) -> None:
        """A group is sampled and scored; `oldest_version` is the lowest among its tokens."""
        entry = self._untrained[group_id]
        if entry.is_ready:
            raise ValueError(f"group {group_id} was completed twice")
        if oldest_version < entry.version:
            raise LagBoundError(
                f"group {group_id} holds tokens of version {oldest_version}, older than the version "
                f"{entry.version} it was admitted with"
            )
        entry.is_ready = True
        self._ready_count += 1
        self._ready_by_deadline[entry.deadline] += 1
        heapq.heappush(self._ready_heap, (entry.deadline, group_id))
        # The group is younger than was promised where the actor loaded weights before its first token.
        self._move(entry, entry.deadline + oldest_version - entry.version, group_id)
        entry.version = oldest_version

    def drop(self, group_id: int) -> None:
        """Leave a group out (a reward error, say); its place is free for another."""
        entry = self._untrained.pop(group_id)
        self._untrained_by_deadline[entry.deadline] -= 1
        if entry.is_ready:
            self._ready_count -= 1
            self._ready_by_deadline[entry.deadline] -= 1
        self.dropped += 1

    def ready(self) -> bool:
        """Whether step k may start: P groups are ready and the rest would still meet their deadlines."""
        if self._step >= self._total_steps or self._ready_count < self._groups_per_step:
            return False
        to_take = self._groups_per_step
        left_due = 0  # untrained groups due by j that this step would leave
        for due in sorted(d for d, count in self._untrained_by_deadline.items() if count):
            taken = min(to_take, self._ready_by_deadline[due])
            to_take -= taken
            left_due += self._untrained_by_deadline[due] - taken
            if left_due > self._groups_per_step * (due - self._step):
                return False
        return True

    def take(self) -> list[int]:
        """Take the P ready groups with the earliest deadlines for step k, and move on to step k + 1.

        Raises LagBoundError if a group is past its deadline: checked again here, whatever came before.
        """
        if not self.ready():
            raise ValueError(f"step {self._step} cannot start yet: {self._ready_count} groups are ready")
        taken: list[int] = []
        while len(taken) < self._groups_per_step:
            deadline, group_id = heapq.heappop(self._ready_heap)
            entry = self._untrained.get(group_id)
            if entry is None or entry.deadline != deadline:
                continue  # dropped or moved since it was pushed
            if deadline < self._step:
                raise LagBoundError(f"group {group_id} was due by step {deadline}, but this is {self._step}")
            del self._untrained[group_id]
            self._untrained_by_deadline[deadline] -= 1
            self._ready_by_deadline[deadline] -= 1
            taken.append(group_id)
        self._ready_count -= len(taken)
        self.trained += len(taken)
        self._step += 1
        self._forget_past_deadlines()
        return taken

    # ---- the invariant -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise LagBoundError unless the invariant holds now. For tests: the verbs above keep it."""
        due_by = 0
        for due in sorted(d for d, count in self._untrained_by_deadline.items() if count):
            due_by += self._untrained_by_deadline[due]
            if due_by > self._groups_per_step * (due - self._step + 1):
                raise LagBoundError(
                    f"{due_by} groups are due by step {due}, but the next step is {self._step}"
                )

    def has_room_for(self, actor_version: int) -> bool:
        """Whether one more group of these weights keeps the invariant.

        Only steps from `deadline` on have one more group due; from the last deadline down to it is O(S) at
        worst, and one comparison for a group on the newest weights.
        """
        deadline = actor_version + self._window
        if deadline < self._step:
            return False
        due_by = len(self._untrained) + 1
        if deadline >= self._last_deadline and due_by <= self._groups_per_step * (deadline - self._step + 1):
            return True
        for due in range(max(self._last_deadline, deadline), deadline - 1, -1):
            if due_by > self._groups_per_step * (due - self._step + 1):
                return False
            due_by -= self._untrained_by_deadline[due]
        return True

    def _move(self, entry: _Entry, deadline: int, ready_group_id: int | None = None) -> None:
        """Give an entry a later deadline."""
        if deadline == entry.deadline:
            return
        self._untrained_by_deadline[entry.deadline] -= 1
        self._untrained_by_deadline[deadline] += 1
        self._last_deadline = max(self._last_deadline, deadline)
        if ready_group_id is not None:
            self._ready_by_deadline[entry.deadline] -= 1
            self._ready_by_deadline[deadline] += 1
            heapq.heappush(self._ready_heap, (deadline, ready_group_id))
        entry.deadline = deadline

    def _forget_past_deadlines(self) -> None:
        for counts in (self._untrained_by_deadline, self._ready_by_deadline):
            for due in [d for d, count in counts.items() if not count]:
                del counts[due]

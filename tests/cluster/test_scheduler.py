"""The scheduler against its invariant, under arbitrary interleavings."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.scheduler import Admission, LagBoundError, Refusal, Scheduler


def admit(scheduler: Scheduler, version: int) -> int:
    admission = scheduler.admit(version)
    assert isinstance(admission, Admission)
    return admission.group_id


def test_synchronous_admits_exactly_one_batch_of_current_weights() -> None:
    # S = 0, P = 2: only two groups may be due by step 0, and version-0 groups are due by step 0.
    scheduler = Scheduler(groups_per_step=2, window=0, total_steps=2)
    first, second = admit(scheduler, 0), admit(scheduler, 0)
    assert scheduler.admit(0) is Refusal.WINDOW_FULL
    scheduler.complete(second, 0)
    assert not scheduler.ready()
    scheduler.complete(first, 0)
    assert scheduler.take() == [first, second]
    # Step 1 needs version-1 weights.
    assert scheduler.admit(0) is Refusal.STALE_ACTOR
    assert isinstance(scheduler.admit(1), Admission)


def test_budget_is_never_exceeded() -> None:
    scheduler = Scheduler(groups_per_step=2, window=3, total_steps=1)
    admit(scheduler, 0), admit(scheduler, 0)
    assert scheduler.admit(0) is Refusal.BUDGET_SPENT


def test_dropped_group_frees_its_place() -> None:
    scheduler = Scheduler(groups_per_step=1, window=0, total_steps=1)
    scheduler.drop(admit(scheduler, 0))
    replacement = admit(scheduler, 0)
    scheduler.complete(replacement, 0)
    assert scheduler.take() == [replacement]
    assert (scheduler.dispatched, scheduler.dropped, scheduler.trained) == (2, 1, 1)


def test_learner_waits_for_a_slow_group_only_when_its_bound_would_break() -> None:
    # P = 1, S = 1. The slow group (version 0) is due by step 1, the quick ones by then too.
    scheduler = Scheduler(groups_per_step=1, window=1, total_steps=5)
    slow, quick = admit(scheduler, 0), admit(scheduler, 0)
    assert scheduler.admit(0) is Refusal.WINDOW_FULL  # 3 groups due by step 1 > P·(1 − 0 + 1) = 2
    scheduler.complete(quick, 0)
    assert scheduler.take() == [quick]  # step 0 runs: the slow group can still be trained at step 1
    later = admit(scheduler, 1)
    scheduler.complete(later, 1)
    assert not scheduler.ready()  # training `later` at step 1 would leave the slow one past its deadline
    scheduler.complete(slow, 0)
    assert scheduler.take() == [slow]


def test_finished_groups_are_taken_by_deadline_whatever_the_order_of_completion() -> None:
    scheduler = Scheduler(groups_per_step=1, window=2, total_steps=5)
    old = admit(scheduler, 0)
    scheduler.complete(admit(scheduler, 0), 0)
    scheduler.take()
    young = admit(scheduler, 1)
    scheduler.complete(young, 1)
    scheduler.complete(old, 0)
    assert scheduler.take() == [old]


def test_group_whose_actor_loaded_newer_weights_first_gets_a_later_deadline() -> None:
    scheduler = Scheduler(groups_per_step=1, window=1, total_steps=9)
    early, late = admit(scheduler, 0), admit(scheduler, 0)
    scheduler.complete(early, 0)
    scheduler.take()
    scheduler.complete(late, 1)  # sampled wholly with version 1: due by step 2, not 1
    competitor = admit(scheduler, 1)
    scheduler.complete(competitor, 1)
    scheduler.take()
    assert scheduler.ready()


def test_tokens_older_than_admitted_are_an_error() -> None:
    scheduler = Scheduler(groups_per_step=1, window=1, total_steps=9, step=3)
    group = admit(scheduler, 3)
    with pytest.raises(LagBoundError, match="older than the version 3"):
        scheduler.complete(group, 2)


def test_redispatch_keeps_the_deadline_and_refuses_older_actors() -> None:
    scheduler = Scheduler(groups_per_step=1, window=1, total_steps=9, step=1)
    group = admit(scheduler, 1)
    assert not scheduler.redispatch(group, 0)
    assert scheduler.redispatch(group, 1)
    scheduler.complete(group, 1)
    assert scheduler.take() == [group]


class Interleavings(RuleBasedStateMachine):
    """Dispatch, completion, loss, drop, publish and a changing S, in any order, on actors that differ."""

    @initialize(groups=st.integers(1, 5), window=st.integers(0, 5), actors=st.integers(1, 4))
    def start(self, groups: int, window: int, actors: int) -> None:
        self.scheduler = Scheduler(groups_per_step=groups, window=window, total_steps=10**6)
        self.actors = [0] * actors
        self.published = 0
        self.running: dict[int, tuple[int, int]] = {}  # group -> (actor, version it was admitted with)
        self.done: dict[int, tuple[int, int]] = {}  # group -> (oldest version, S at admission)
        self.window_of: dict[int, int] = {}

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.running)))

    @rule(actor=st.integers(0, 3))
    def dispatch(self, actor: int) -> None:
        actor %= len(self.actors)
        admission = self.scheduler.admit(self.actors[actor])
        if isinstance(admission, Admission):
            self.running[admission.group_id] = (actor, self.actors[actor])
            self.window_of[admission.group_id] = self.scheduler.window

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        group = self.pick(data)
        actor, version = self.running.pop(group)
        oldest = data.draw(st.integers(version, max(version, self.actors[actor])))
        self.scheduler.complete(group, oldest)
        self.done[group] = (oldest, self.window_of[group])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), actor=st.integers(0, 3))
    def lose_and_redispatch(self, data: st.DataObject, actor: int) -> None:
        group = self.pick(data)
        actor %= len(self.actors)
        if self.scheduler.redispatch(group, self.actors[actor]):
            self.running[group] = (actor, self.actors[actor])
            self.window_of[group] = max(self.window_of[group], self.scheduler.window)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        group = self.pick(data)
        del self.running[group]
        self.scheduler.drop(group)

    @rule(window=st.integers(0, 6))
    def change_window(self, window: int) -> None:
        self.scheduler.set_window(window)

    @rule(actor=st.integers(0, 3))
    def load_newest(self, actor: int) -> None:
        self.actors[actor % len(self.actors)] = self.published

    @precondition(lambda self: self.scheduler.ready())
    @rule()
    def train_and_publish(self) -> None:
        step = self.scheduler.step
        for group in self.scheduler.take():
            oldest, window = self.done.pop(group)
            assert 0 <= step - oldest <= window
        self.published = step + 1

    @invariant()
    def bound_holds_and_nothing_is_stuck(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        if not self.running and not self.scheduler.ready():
            # With nothing in flight, fresh weights on one actor are always enough to go on.
            assert self.published == self.scheduler.step
            probe = self.scheduler.admit(self.published)
            assert isinstance(probe, Admission)
            self.scheduler.drop(probe.group_id)


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=60, stateful_step_count=120, deadline=None)


@pytest.mark.parametrize("seed", range(4))
def test_bound_is_reached_and_never_broken_in_long_random_runs(seed: int) -> None:
    """25,000 turns a seed with heavy-tailed generation times; lag reaches S exactly and never passes."""
    rng = random.Random(seed)
    groups, window, actors = rng.randint(1, 4), rng.randint(1, 4), [0, 0, 0]
    scheduler = Scheduler(groups_per_step=groups, window=window, total_steps=10**6)
    running: dict[int, tuple[float, int]] = {}
    oldest: dict[int, int] = {}
    clock, max_lag = 0.0, 0
    for _ in range(25_000):
        clock += 1
        actor = rng.randrange(len(actors))
        actors[actor] = scheduler.step if rng.random() < 0.5 else actors[actor]
        admission = scheduler.admit(actors[actor])
        if isinstance(admission, Admission):
            running[admission.group_id] = (clock + rng.paretovariate(1.1), actors[actor])
        for group in [g for g, (finish, _) in running.items() if finish <= clock]:
            oldest[group] = running.pop(group)[1]
            scheduler.complete(group, oldest[group])
        if scheduler.ready():
            step = scheduler.step
            lags = [step - oldest.pop(group) for group in scheduler.take()]
            max_lag = max(max_lag, *lags)
        scheduler.check()
    assert max_lag == window
    assert scheduler.trained > 1000

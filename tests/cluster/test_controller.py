"""The controller's loops on stand-ins for the actors: order of calls, lag, retries, omissions, stopping."""

from collections import Counter

import pytest
from controller_helpers import World

from actors.records import (
    Prompt,
)
from cluster.controller import StepReport
from cluster.prompt_cursor import PromptCursor
from cluster.remote import WorkerFailedError
from cluster.sampling import RewardErrorsError

pytestmark = pytest.mark.alone


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_publishes_before_the_next_and_lag_stays_in_the_window(window: int, seed: int) -> None:
    world = World(window=window, seed=seed)
    world.run()
    # step 0, publish 1, step 1, publish 2, …: weights of version k always hold exactly k steps.
    assert world.log == [entry for k in range(12) for entry in (("step", k), ("publish", k + 1))]
    assert [report.step for report in world.reports] == list(range(1, 13))
    assert max(report.row["lag/max"] for report in world.reports) <= window
    assert Counter(world.trained).most_common(1)[0][1] == 1
    assert len(world.trained) == 24
    totals = world.controller.totals
    assert (totals.groups_dispatched, totals.groups_trained, totals.groups_dropped) == (24, 24, 0)


def test_a_checkpoint_knows_every_prompt_that_is_under_way() -> None:
    world = World(window=3)
    world.run()
    order = PromptCursor([Prompt(f"p{i}", (1, 2), "x") for i in range(400)], 0)
    handed_out = {order.next().id for _ in range(24)}
    for step, pending in world.checkpoints:
        trained = world.trained[: 2 * step]
        assert not set(trained) & set(pending)
        assert set(trained) | set(pending) <= handed_out
    assert [step for step, _ in world.checkpoints] == [5, 10]


def test_a_failed_sample_is_drawn_again_on_another_actor() -> None:
    world = World(window=1)
    world.broken = {"rollout-0"}
    world.run()
    assert set(world.sampled_by.values()) == {"rollout-1"}
    assert len(world.trained) == 24


def test_a_sample_that_always_fails_ends_the_run_with_its_cause() -> None:
    world = World(window=1)
    world.broken = {"rollout-0", "rollout-1"}
    with pytest.raises(WorkerFailedError, match="no luck"):
        world.run()


def test_unscorable_groups_are_left_out_replaced_and_counted() -> None:
    world = World(window=1)
    world.unscorable = {f"p{i}" for i in range(0, 400, 5)}
    world.run()
    assert not world.unscorable & set(world.trained)
    assert len(world.trained) == 24
    assert world.controller.totals.groups_dropped == len(world.failures) > 0


def test_a_reward_that_never_works_stops_the_run() -> None:
    world = World(window=1)
    world.unscorable = {f"p{i}" for i in range(400)}
    with pytest.raises(RewardErrorsError, match=r"'gold' on prompt p\d+: raised"):
        world.run()
    assert world.trained == []


def test_a_stop_finishes_the_step_and_reports_it() -> None:
    world = World(window=2)
    report = world._report

    def stop_after_three(done: StepReport) -> None:
        report(done)
        if done.step == 3:
            world.controller.request_stop()

    world.controller.hooks.on_step = stop_after_three
    world.run()
    steps = [step for kind, step in world.log if kind == "step"]
    assert len(world.reports) == len(steps) < 12
    assert world.log[-1] == ("publish", steps[-1] + 1)
    assert len(world.trained) == 2 * len(steps)


@pytest.mark.parametrize(("window", "every"), [(1, 2), (3, 2), (3, 4)])
def test_weights_go_out_at_the_publish_interval_and_lag_stays_in_the_window(window: int, every: int) -> None:
    world = World(f"scheduler.publish_every={every}", window=window)
    world.run()
    published = [version for kind, version in world.log if kind == "publish"]
    assert published == [v for v in range(1, 13) if v % every == 0]
    assert [report.step for report in world.reports] == list(range(1, 13))
    assert max(report.row["lag/max"] for report in world.reports) <= window
    assert [r.row["timing_s/publish"] > 0 for r in world.reports] == [k % every == 0 for k in range(1, 13)]
    # Rows of steps that published nothing hold no sync figures, rather than old ones.
    assert ["timing_s/sync" in r.row for r in world.reports] == [k % every == 0 for k in range(1, 13)]


def test_groups_spread_over_the_actors_and_never_exceed_their_slots() -> None:
    world = World("rollout.max_groups_in_flight=3", actors=2, window=3)
    world.run()
    assert world.most_in_flight == {"rollout-0": 3, "rollout-1": 3}
    assert all(actor.slot.in_flight == 0 for actor in world.rollouts.actors)


def test_lag_is_split_into_flight_and_queue() -> None:
    world = World(window=3)
    world.run()
    for report in world.reports:
        row = report.row
        assert row["lag/in_flight_mean"] + row["lag/in_queue_mean"] == pytest.approx(row["lag/mean"])
        assert row["lag/in_flight_mean"] >= 0
        assert row["lag/in_queue_mean"] >= 0
    assert max(report.row["lag/in_queue_mean"] for report in world.reports) > 0


def test_waits_are_told_apart_and_add_up() -> None:
    """Sampling takes 100 ms, all else next to nothing: the learner waits for the window, or for slots."""
    world = World(window=1)
    world.sample_seconds = lambda _: 0.1
    world.load_seconds = 0.0
    world.run()
    totals = world.controller.totals
    assert sum(totals.wait_by_cause.values()) == pytest.approx(totals.learner_wait_s)
    assert max(totals.wait_by_cause, key=lambda cause: totals.wait_by_cause[cause]) == "window"
    full = World("rollout.max_groups_in_flight=1", actors=1, window=3)
    full.sample_seconds = lambda _: 0.1
    full.load_seconds = 0.0
    full.run()
    causes = full.controller.totals.wait_by_cause
    assert max(causes, key=lambda cause: causes[cause]) == "sampling"


def test_a_step_waits_for_the_group_that_is_due_and_says_so() -> None:
    """One prompt takes far longer than the rest: the step that is its deadline waits for it and trains it."""
    world = World(window=2)
    world.sample_seconds = lambda prompt: 0.3 if prompt == slow else 0.001
    order = PromptCursor([Prompt(f"p{i}", (1, 2), "x") for i in range(400)], 0)
    slow = order.next().id
    world.run()
    assert world.trained.index(slow) // 2 == 2  # sampled with version 0, so due by step 2
    assert world.controller.totals.wait_by_cause["deadline"] > 0.2


def test_every_trained_group_leaves_its_times() -> None:
    world = World(window=2)
    world.run()
    for report in world.reports:
        *groups, moments = report.trace
        assert [row["group"] for row in groups] == world.group_ids[2 * report.step - 2 : 2 * report.step]
        for row in groups:
            assert 0 <= row["dispatched_s"] <= row["sampled_s"] <= row["scored_s"] <= row["taken_s"]
            assert row["learner_step"] == moments["learner_step"] == report.step
        order = ("wait_from_s", "train_from_s", "train_to_s", "publish_from_s", "publish_to_s", "loaded_s")
        assert [moments[name] for name in order] == sorted(moments[name] for name in order)


def test_the_adaptive_window_widens_while_the_learner_waits_and_narrows_when_samples_drift() -> None:
    world = World("run.steps=60", "scheduler.max_window=4", window="adaptive", actors=2)
    world.sample_seconds = lambda _: 0.02  # a step at S = 1 takes 20 ms, at S = 4 it could take 5
    world.train_seconds = 0.003
    world.run()
    assert any(d.setting == "window" and d.new > d.old for d in world.decisions)
    assert max(report.row["lag/max"] for report in world.reports) <= 4
    drifting = World("run.steps=60", "scheduler.max_window=4", window="adaptive", actors=2)
    drifting.sample_seconds = lambda _: 0.004
    drifting.drift = 0.2  # ten times what the default accepts, a version
    drifting.run()
    halved = [d for d in drifting.decisions if d.setting == "window" and d.new < d.old]
    assert halved
    assert halved[-1].new == 0
    # It tries again now and then, less and less often, and takes the step back at once.
    assert sum(report.row["lag/max"] > 0 for report in drifting.reports) <= 15


def test_measurement_changes_nothing_where_the_window_is_fixed() -> None:
    world = World(window=2)
    world.drift = 5.0
    world.run()
    assert world.decisions == []
    assert {report.row["scheduler/window"] for report in world.reports} == {2}
    assert world.reports[-1].row["mismatch/drift"] == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize("window", [0, 1])
def test_the_first_actor_with_new_weights_does_not_take_the_whole_step(window: int) -> None:
    world = World("run.batch_size=24", actors=3, window=window)  # 12 groups a step
    world.sample_seconds = lambda _: 0.005
    world.load_seconds = 0.004
    world.run()
    by_actor = Counter(world.sampled_by.values())
    assert min(by_actor.values()) >= sum(by_actor.values()) / 6


@pytest.mark.parametrize("window", [0, 2, "adaptive"])
def test_actors_of_unequal_speed_and_a_learner_that_slows_down_keep_the_bound(window: int | str) -> None:
    world = World("run.steps=30", "scheduler.max_window=3", window=window, actors=3)
    world.slowness["rollout-2"] = 20.0
    report = world._report

    def slow_down(done: StepReport) -> None:
        report(done)
        world.train_seconds = 0.02 if 10 <= done.step < 20 else 0.001

    world.controller.hooks.on_step = slow_down
    world.run()
    assert [one.step for one in world.reports] == list(range(1, 31))
    assert max(one.row["lag/max"] for one in world.reports) <= (3 if window == "adaptive" else int(window))
    assert set(world.sampled_by.values()) == {"rollout-0", "rollout-1", "rollout-2"}
    totals = world.controller.totals
    assert totals.groups_dispatched == totals.groups_sampled == totals.groups_trained == 60
    assert totals.lengths_sampled == totals.lengths_trained  # nothing slow was left out

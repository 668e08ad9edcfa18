"""What a run counts, against values counted by hand."""

import pytest

from actors.records import Completion, Group, Prompt, SampledGroup, Trajectory
from cluster.accounts import (
    Occupancy,
    Stopwatch,
    TakenGroup,
    Totals,
    WaitCause,
    lag_split,
    length_histogram,
    length_metrics,
    length_quantile,
    mean_length,
    pace_metrics,
    scoring_exposed,
    wait_cause,
)
from cluster.scheduler import Refusal


def completion(*versions: int) -> Completion:
    return Completion((1,) * len(versions), (-1.0,) * len(versions), versions, "", "stop")


def group(number: int, *completions: Completion, seconds: float = 1.0) -> Group:
    trajectories = tuple(Trajectory(c, 1.0, {}, c.logprobs) for c in completions)
    return Group(number, Prompt(f"p{number}", (1, 2, 3), ""), trajectories, "a", seconds, 0.5)


def test_a_stopwatch_adds_up_processor_time_and_laps(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 1.5, 4.0, 4.25, 9.0, 10.0])
    monkeypatch.setattr("cluster.accounts.time.thread_time", lambda: next(moments))
    watch = Stopwatch()
    for _ in range(2):
        with watch:
            pass
    assert watch.lap() == 0.75
    with watch:
        pass
    assert (watch.lap(), watch.lap(), watch.total) == (1.0, 0.0, 1.75)


def test_seconds_in_which_every_place_was_taken() -> None:
    places = Occupancy()
    places.change(1, 2, 10.0)
    places.change(1, 2, 11.0)  # both from 11 …
    assert places.lap(14.0) == 3.0
    places.change(-1, 2, 15.0)  # … to 15
    places.change(0, 1, 20.0)  # one of the two is lost: the other is all there is, from 20 …
    assert places.lap(22.0) == 1.0 + 2.0
    places.change(-1, 1, 23.0)  # … to 23
    places.change(0, 0, 24.0)  # none is left, and none is at work
    assert (places.lap(30.0), places.lap(31.0)) == (1.0, 0.0)


def test_lag_is_split_at_the_moment_the_group_was_ready() -> None:
    # Trained at step 5; ready when 4 steps were finished. Tokens of versions 2, 4, 4: lags 3, 1, 1, of which
    # 4 − version = 2, 0, 0 arose in flight and 5 − 4 = 1 each in the queue.
    one = TakenGroup(group(0, completion(2, 4, 4)), 4, {})
    assert lag_split([one], 5) == {"lag/in_flight_mean": pytest.approx(2 / 3), "lag/in_queue_mean": 1.0}
    # A second group of 1 token, fresh and ready at once: means are over tokens, not groups.
    two = TakenGroup(group(1, completion(5)), 5, {})
    assert lag_split([one, two], 5) == {"lag/in_flight_mean": 0.5, "lag/in_queue_mean": 0.75}


def test_a_bias_against_long_answers_shows() -> None:
    totals = Totals()
    short, long = group(0, completion(0), completion(0)), group(1, completion(*[0] * 9))
    for one in (short, long):
        totals.dispatched(3)
        completions = tuple(t.completion for t in one.trajectories)
        totals.sampled(SampledGroup(one.group_id, one.prompt, completions, "a", 1.0))
    totals.trained([short], {"lag/mean": 0.0, "lag/max": 0.0, "perf/padding_fraction": 0.0})
    # Sampled: lengths 1, 1, 9, mean 11/3. Trained: 1, 1. (1 − 11/3) / (11/3) = −8/11.
    found = length_metrics(totals)
    assert found["length/bias"] == pytest.approx(-8 / 11)
    assert found["length/prompt_bias"] == 0.0
    assert (totals.tokens_generated, totals.tokens_trained) == (11, 2)
    totals.trained([long], {"lag/mean": 0.0, "lag/max": 0.0, "perf/padding_fraction": 0.0})
    assert length_metrics(totals)["length/bias"] == 0.0


def test_quantiles_and_means_of_counted_lengths() -> None:
    counts = {"2": 5, "10": 4, "100": 1}
    assert mean_length(counts) == 15.0
    assert [length_quantile(counts, share) for share in (0.5, 0.51, 0.9, 0.91, 1.0)] == [2, 10, 10, 100, 100]
    assert mean_length({}) == length_quantile({}, 0.5) == 0.0


@pytest.mark.parametrize(
    ("enough", "refusal", "cause"),
    [
        (True, Refusal.WINDOW_FULL, WaitCause.DEADLINE),
        (False, Refusal.WINDOW_FULL, WaitCause.WINDOW),
        (False, Refusal.AHEAD_FULL, WaitCause.AHEAD),
        (False, Refusal.STALE_ACTOR, WaitCause.SYNC),
        (False, Refusal.NO_SLOT, WaitCause.SAMPLING),
        (False, Refusal.BUDGET_SPENT, WaitCause.SAMPLING),
    ],
)
def test_what_the_learner_waits_for(enough: bool, refusal: Refusal, cause: WaitCause) -> None:
    assert wait_cause(enough_ready=enough, refusal=refusal) is cause


def test_where_a_steps_time_goes() -> None:
    # A step of 10 s: the learner works 6 of them, the actors have work for 8: η = 8/10.
    waits = {WaitCause.WINDOW: 3.0, WaitCause.SYNC: 1.0}
    found = pace_metrics([group(0, completion(0, 0))], step_s=10, busy_s=6, rollout_idle_s=2, waits=waits)
    assert found["perf/efficiency"] == 0.8
    assert found["perf/learner_wait_fraction"] == 0.4
    assert found["perf/rollout_wait_fraction"] == 0.2
    assert found["perf/tokens_per_s"] == 0.2
    assert (found["wait/by_cause/window"], found["wait/by_cause/deadline"]) == (3.0, 0.0)


def test_a_histogram_of_lengths_has_every_response_once() -> None:
    totals = Totals(lengths_sampled={"1": 2, "7": 3, "90": 1}, lengths_trained={"7": 3})
    # The longest has 90 tokens, so 40 bins are 3 wide: 1 → bin 0, 7 → bin 2, 90 → bin 30, which ends at 93.
    found = length_histogram(totals)
    assert found["edges"][:3] == [0, 3, 6]
    assert found["edges"][-1] == 93
    assert {i: n for i, n in enumerate(found["sampled"]) if n} == {0: 2, 2: 3, 30: 1}
    assert {i: n for i, n in enumerate(found["trained"]) if n} == {2: 3}


@pytest.mark.parametrize(
    ("groups", "wait_from", "train_from", "exposed"),
    [
        # Sampled at 2 and 5, scored at 3 and 7: from 5 to 7 nothing but scoring was outstanding.
        ([(2.0, 3.0), (5.0, 7.0)], 1.0, 7.0, 2.0),
        # The learner came free only at 6, so it waited for 1 of these 2 seconds.
        ([(2.0, 3.0), (5.0, 7.0)], 6.0, 7.0, 1.0),
        # All was scored before the learner was free.
        ([(2.0, 3.0), (5.0, 7.0)], 8.0, 8.0, 0.0),
        # The group that was scored last came early: sampling of the other one hid its scoring.
        ([(1.0, 6.0), (5.9, 6.0)], 0.0, 6.0, 0.1),
        # Sampling ended last and its group was scored at once.
        ([(1.0, 3.0), (4.0, 4.0)], 0.0, 4.0, 0.0),
    ],
)
def test_scoring_is_exposed_where_nothing_else_is_outstanding(
    groups: list[tuple[float, float]], wait_from: float, train_from: float, exposed: float
) -> None:
    trace = [{"sampled_s": sampled, "scored_s": scored} for sampled, scored in groups]
    step = {"wait_from_s": wait_from, "train_from_s": train_from}
    assert scoring_exposed([*trace, step]) == pytest.approx(exposed)

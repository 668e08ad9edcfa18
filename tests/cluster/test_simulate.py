"""The simulator against closed forms, and its promises: real scheduler, bound, determinism, losses."""

import math
from typing import Any

import pytest

from cluster import simulate
from cluster.plan_model import Lengths, Workload
from cluster.scheduler import Scheduler, SchedulerSettings
from cluster.sim_engine import Engine, Flight, token_seconds
from cluster.sim_results import Plant
from cluster.simulate import Simulation

P, LENGTH, TOKEN_S = 4, 100, 0.01
G = LENGTH * TOKEN_S  # 1.0 s: a group alone, or among any number of others at a rate that does not fall


def workload(**tables: dict[str, Any]) -> Workload:
    """Fixed lengths, a constant token rate, nothing shared; tables of changes on top."""
    made = Workload.model_validate({}).changed("lengths", kind="fixed", median=float(LENGTH))
    made = made.changed("generation", token_s=[[1.0, TOKEN_S]], prompt_tokens=0.0)
    made = made.changed("scoring", call_s=0.3, group_s=0.0)
    made = made.changed("learner", step_s=2.0, token_s=0.0)
    made = made.changed("sync", publish_s=0.1, load_s=0.2, probe_s=0.4)
    for name, values in tables.items():
        made = made.changed(name, **values)
    return made


def plant(
    window: int | str = 0, *, actors: int = 1, slots: int = 64, publish_every: int = 1, **more: Any
) -> Plant:
    settings = SchedulerSettings.model_validate(
        {"window": window, "publish_every": publish_every, **more.pop("scheduler", {})}
    )
    values: dict[str, Any] = {
        "groups_per_step": P,
        "group_size": 2,
        "actors": actors,
        "max_groups_in_flight": slots,
        "max_num_seqs": 1000,
        "max_new_tokens": 100_000,
        "scorers": 1,
        "scheduler": settings,
    }
    return Plant(**(values | more))


# ---- one engine ----------------------------------------------------------------------------------------


def engine(curve: list[tuple[float, float]], *, limit: int = 100, prefill: float = 0.0) -> Engine:
    return Engine(
        "rollout-0", token_seconds(curve, 100, limit), max_num_seqs=limit, prompt_tokens=10.0,
        prefill_token_s=prefill, version=0, now=0.0,
    )  # fmt: skip


def flight(group_id: int, *lengths: int) -> Flight:
    return Flight(group_id, lengths, sum(lengths), 0.0)


def finish(one: Engine) -> list[tuple[float, int]]:
    """(time, id) of every group until the engine is empty."""
    done = []
    while (when := one.next_change()) is not None:
        done += [(when, found.group_id) for found in one.collect(when)]
    return done


def test_sequences_share_the_engine_and_free_it_when_they_end() -> None:
    # τ(1) = .01, τ(2) = .015: both run until the short one ends, 100 · .015 = 1.5 s; then 100 · .01 = 1 s.
    one = engine([(1, 0.01), (2, 0.015)])
    one.add(flight(0, 100), 0.0)
    one.add(flight(1, 200), 0.0)
    assert finish(one) == [(pytest.approx(1.5), 0), (pytest.approx(2.5), 1)]


def test_a_sample_that_ended_early_makes_the_rest_of_its_group_faster() -> None:
    # One group of 100 and 200 tokens: the same 1.5 + 1.0 s.
    one = engine([(1, 0.01), (2, 0.015)])
    one.add(flight(0, 100, 200), 0.0)
    assert finish(one) == [(pytest.approx(2.5), 0)]


def test_a_sequence_that_comes_later_slows_the_first_from_then_on() -> None:
    # 50 tokens in .5 s alone; then both at .015: the first needs 50 · .015 = .75 s more, until 1.25 s, when
    # the second has 50 of 100; those take .5 s alone.
    one = engine([(1, 0.01), (2, 0.015)])
    one.add(flight(0, 100), 0.0)
    one.add(flight(1, 100), 0.5)
    assert finish(one) == [(pytest.approx(1.25), 0), (pytest.approx(1.75), 1)]


def test_a_group_waits_until_the_engine_has_room_for_it() -> None:
    # Room for 2 sequences: one place is free at 1.0 s, but the next group needs both. It enters at 2.0 s.
    one = engine([(1, 0.01)], limit=2)
    one.add(flight(0, 100, 200), 0.0)
    one.add(flight(1, 100, 100), 0.0)
    assert finish(one) == [(pytest.approx(2.0), 0), (pytest.approx(3.0), 1)]


def test_beyond_its_limit_an_engine_takes_turns() -> None:
    assert token_seconds([(1, 0.01)], most=8, limit=4)[1:] == pytest.approx(
        [0.01] * 4 + [0.0125, 0.015, 0.0175, 0.02]
    )


def test_the_curve_is_straight_between_points_and_beyond_the_last() -> None:
    assert token_seconds([(1, 0.01), (3, 0.03), (5, 0.04)], 7, 7) == pytest.approx(
        [0.01, 0.01, 0.02, 0.03, 0.035, 0.04, 0.045, 0.05]
    )


def test_tokens_after_a_load_carry_the_newer_version() -> None:
    # The load begins at .5 s with 50 tokens of each sample done, and lasts .2 s.
    one = engine([(1, 0.01)])
    one.add(flight(0, 60, 100), 0.0)
    assert one.hold(0.5, 0.2) == pytest.approx(0.7)
    one.switch(3, 0.7)
    when = one.next_change()
    assert when == pytest.approx(1.2)
    (done,) = one.collect(when)
    # Version 0: 50 + 50 tokens; version 3: 10 + 50.
    assert done.versions == [(0, 100), (3, 60)]
    assert done.oldest_version == 0


def test_a_load_has_running_sequences_read_again() -> None:
    # Prompts: 10 tokens · .001 = .01 s on arrival. At .51 s both samples have 50 tokens, so a load has
    # 2 · (10 + 50) = 120 tokens read again: .12 s; 50 tokens are left, .5 s.
    one = engine([(1, 0.01)], prefill=0.001)
    one.add(flight(0, 100, 100), 0.0)
    one.switch(1, 0.51)
    assert finish(one) == [(pytest.approx(0.51 + 0.12 + 0.5), 0)]


# ---- whole runs against closed forms ---------------------------------------------------------------------


def test_synchronous_steps_take_the_sum_of_their_parts() -> None:
    # G 1.0 + scoring .3 + training 2.0 + publishing .1 + loading .2 + proving .4
    found = Simulation(plant(0), workload(), steps=12).run().steady()
    assert found.step_s == pytest.approx(4.0)
    assert found.lag_mean == 0
    assert found.generation_s == pytest.approx(1.0)
    assert found.learner_s == pytest.approx(2.1)
    assert found.learner_wait_fraction == pytest.approx(1.9 / 4.0)
    assert found.rollout_wait_fraction == pytest.approx(3.0 / 4.0)
    assert found.efficiency == pytest.approx(2.1 / 4.0)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_where_training_is_longer_a_step_takes_as_long_as_the_learner_and_lag_is_the_window(
    window: int,
) -> None:
    # Little's law for the queue: it holds S · P groups and P leave it a step, so a group waits S steps.
    found = Simulation(plant(window), workload(), steps=24).run().steady()
    assert found.step_s == pytest.approx(2.1)  # 2.0 training + .1 publishing; all else beside it
    assert found.learner_wait_fraction == pytest.approx(0, abs=1e-9)
    assert found.efficiency == pytest.approx(1.0)
    assert found.lag_mean == pytest.approx(window)
    assert found.lag_max == window


@pytest.mark.parametrize(("actors", "expected"), [(1, 4 * G + 0.2), (2, 2 * G + 0.2), (4, 1 * G + 0.2)])
def test_where_sampling_is_longer_a_step_takes_as_long_as_the_actors(actors: int, expected: float) -> None:
    # One slot an actor: its P / actors groups come one after another, and it stops .2 s to load.
    quick = workload(learner={"step_s": 0.5}, scoring={"call_s": 0.05})
    found = Simulation(plant(8, actors=actors, slots=1), quick, steps=40).run().steady()
    assert found.step_s == pytest.approx(expected, rel=0.01)
    assert found.rollout_wait_fraction == pytest.approx(0, abs=0.01)
    assert found.efficiency == pytest.approx(1.0, abs=0.01)


def test_one_core_does_the_work_of_learner_and_actor_one_after_another() -> None:
    # Work of a step on one core: 4 groups of 1 s in one slot, 2.0 s training; nothing else takes time.
    shared = workload(
        sharing={"cores": 1.0, "learner": 1.0, "actor": 1.0, "scoring": 0.0},
        scoring={"call_s": 0.0},
        sync={"publish_s": 0.0, "load_s": 0.0, "probe_s": 0.0},
    )
    found = Simulation(plant(4, slots=1), shared, steps=60).run().steady()
    assert found.step_s == pytest.approx(4 * G + 2.0, rel=0.01)


def test_publishing_every_other_step_takes_half_the_time() -> None:
    found = Simulation(plant(3, publish_every=2), workload(), steps=41).run()
    assert found.steady((10, 30)).step_s == pytest.approx(2.0 + 0.1 / 2)


def test_actors_of_unequal_speed_add_up() -> None:
    # Rates 1 and 1/3 group a second: P = 4 groups take 4 / (4/3) = 3 s, and no load stops them.
    uneven = workload(
        generation={"speeds": [1.0, 1 / 3]},
        learner={"step_s": 0.1},
        scoring={"call_s": 0.0},
        sync={"publish_s": 0.0, "load_s": 0.0, "probe_s": 0.0},
    )
    found = Simulation(plant(8, actors=2, slots=1), uneven, steps=60).run().steady()
    assert found.step_s == pytest.approx(3.0, rel=0.03)


def test_waiting_for_requests_in_flight_keeps_groups_of_one_version() -> None:
    tail = workload(lengths={"kind": "lognormal", "median": 100.0, "sigma": 0.8})
    mixed = {}
    for keep in (True, False):
        made = Simulation(plant(2, keep_in_flight=keep), tail, steps=20)
        versions: list[int] = []
        note = made._notes.step

        def record(number: int, taken: Any, *rest: Any, note: Any = note, versions: Any = versions) -> Any:
            versions.extend(len(one.versions) for one, _ in taken)
            return note(number, taken, *rest)

        made._notes.step = record  # type: ignore[method-assign]
        made.run()
        mixed[keep] = max(versions)
    assert mixed[False] == 1
    assert mixed[True] > 1


# ---- promises --------------------------------------------------------------------------------------------


TAIL: dict[str, dict[str, Any]] = {
    "lengths": {"kind": "pareto", "median": 100.0, "alpha": 1.3, "within_group": 0.4},
    "generation": {"token_s": [[1.0, 0.01], [32.0, 0.02]], "prompt_token_s": 1e-4, "prompt_tokens": 20.0},
    "learner": {"step_s": 1.0, "token_s": 1e-4, "variation": 0.2},
}


def test_it_drives_the_real_scheduler_which_keeps_its_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    class Checked(Scheduler):
        def admit(self, actor_version: int) -> Any:
            nonlocal asked
            asked += 1
            answer = super().admit(actor_version)
            self.check()
            return answer

    monkeypatch.setattr(simulate, "Scheduler", Checked)
    made = Simulation(plant(3, actors=3), workload(**TAIL), steps=30)
    result = made.run()
    assert isinstance(made.scheduler, Scheduler)
    assert asked > 30 * P
    assert made.scheduler.trained == 30 * P
    assert max(lag for record in result.records for lag in record.lags) <= 3


def test_a_seed_gives_the_same_run_and_another_seed_another() -> None:
    def ends(seed: int) -> list[float]:
        return [r.ended for r in Simulation(plant(2), workload(**TAIL), steps=10, seed=seed).run().records]

    assert ends(1) == ends(1)
    assert ends(1) != ends(2)


@pytest.mark.parametrize("window", [0, 1, 4])
def test_lost_actors_cost_time_but_no_groups(window: int) -> None:
    # Each actor is lost every 15 s and away for 5 s: its groups are sampled again, all steps are trained.
    lossy = workload(**TAIL, failures={"mean_s_between": 15.0, "recovery_s": 5.0})
    small = plant(window, actors=3, slots=4, max_new_tokens=400)
    sound = Simulation(small, workload(**TAIL), steps=30).run()
    made = Simulation(small, lossy, steps=30)
    result = made.run()
    assert result.losses > 3
    assert made.scheduler.trained == 30 * P
    assert result.seconds > sound.seconds
    assert max(lag for record in result.records for lag in record.lags) <= window


def test_a_cluster_that_never_finishes_a_group_is_refused() -> None:
    hopeless = workload(failures={"mean_s_between": 0.01, "recovery_s": 0.0})
    with pytest.raises(
        ValueError, match=r"failures.mean_s_between = 0.01: actors are lost before they finish"
    ):
        Simulation(plant(1), hopeless, steps=5).run()


def test_two_thousand_actors_finish_within_the_bound() -> None:
    big = plant(2, actors=2000, groups_per_step=4000, slots=8)
    result = Simulation(big, workload(**TAIL), steps=5).run()
    assert len(result.records) == 5
    assert result.records[-1].tokens > 0
    assert max(lag for record in result.records for lag in record.lags) <= 2
    assert result.transitions >= 3 * 5 * 4000  # admitted, completed, taken


def test_the_adaptive_rule_opens_the_window_where_the_learner_waits_and_drift_is_small() -> None:
    slow = TAIL | {"drift": {"engine": 1e-4, "per_version": 1e-4, "noise": 0.05, "ess_per_version": 0.999}}
    fixed = Simulation(plant(1, slots=8), workload(**slow), steps=80).run().steady()
    adaptive = Simulation(plant("adaptive", slots=8), workload(**slow), steps=80).run()
    assert fixed.learner_wait_fraction > 0.1
    assert adaptive.steady().window > 1.5
    assert adaptive.steady().step_s < fixed.step_s
    assert adaptive.steady().lag_max <= 8


def test_the_adaptive_rule_keeps_the_window_small_where_drift_is_large() -> None:
    drifting = TAIL | {"drift": {"engine": 0.001, "per_version": 0.015, "noise": 0.05}}
    limited = plant("adaptive", slots=8, scheduler={"max_drift": 0.02})
    found = Simulation(limited, workload(**drifting), steps=80).run().steady()
    # D(1) = .016 ≤ max_drift = .02 < D(2) = .031
    assert found.window <= 1.5


def test_the_adaptive_rule_keeps_the_window_small_where_scoring_is_the_bottleneck() -> None:
    # Sampling takes 1 s and learning 2 s, but the scorer takes 4 s for the groups of a step, whatever S is.
    slow = {"scoring": {"call_s": 0.0, "group_s": 1.0}, "drift": {"engine": 1e-4, "per_version": 1e-4}}
    steps = [
        Simulation(plant(window, slots=8), workload(**slow), steps=80).run().steady().step_s
        for window in (1, 4)
    ]
    assert steps == pytest.approx([4.0, 4.0], rel=0.02)
    found = Simulation(plant("adaptive", slots=8), workload(**slow), steps=80).run()
    assert {record.window for record in found.records} == {1}
    assert found.steady().learner_wait_fraction > 0.3


# ---- lengths ---------------------------------------------------------------------------------------------


def test_lengths_have_the_median_and_tail_that_were_asked_for() -> None:
    import numpy as np

    # Pareto with P(L > x) = ½ (x / 100)^−1.5: beyond 400 lie ½ · 4^−1.5 = 1/16.
    pareto = Lengths.model_validate({"kind": "pareto", "median": 100.0, "alpha": 1.5})
    groups = pareto.groups(8, 10**6, np.random.default_rng(0))
    drawn = np.array([next(groups) for _ in range(4000)]).ravel()
    assert np.median(drawn) == pytest.approx(100, rel=0.03)
    assert (drawn > 400).mean() == pytest.approx(1 / 16, rel=0.06)


def test_lengths_of_a_group_are_correlated_as_asked_and_capped() -> None:
    import numpy as np

    normal = Lengths.model_validate({"kind": "lognormal", "median": 50.0, "sigma": 1.0, "within_group": 0.6})
    groups = normal.groups(2, 10**6, np.random.default_rng(1))
    logs = np.log(np.array([next(groups) for _ in range(6000)], dtype=float))
    assert np.corrcoef(logs.T)[0, 1] == pytest.approx(0.6, abs=0.03)
    capped = normal.groups(4, 60, np.random.default_rng(1))
    assert max(max(next(capped)) for _ in range(100)) == 60
    assert math.isclose(float(normal.at(np.array([0.5]))[0]), 50.0)

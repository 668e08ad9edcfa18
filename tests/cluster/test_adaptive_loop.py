"""The adaptive rule in a closed loop with a model of a run, and its bounds whatever is measured."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.adaptive import AdaptiveRule, StepMeasurement
from cluster.drift import LagBin
from cluster.scheduler import SchedulerSettings

P = 8


@dataclass(slots=True)
class Plant:
    """A run in one line: a step takes max(T, G / depth), or T + G when synchronous.

    T learner and G sampling seconds for P groups, depth = groups under way in steps, at most S: with d steps
    of groups under way a group is trained d steps after it was begun, so its sampling may take d steps.
    """

    learn: float = 1.0
    generate: float = 2.5
    a: float = 0.001
    b: float = 0.001
    noise: float = 0.05
    sync: float = 0.02
    seed: int = 0
    draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def run(self, step: int, rule: AdaptiveRule) -> StepMeasurement:
        gauss = self.draw.gauss
        T = self.learn * math.exp(self.noise * gauss(0, 1))
        G = self.generate * math.exp(self.noise * gauss(0, 1))
        depth = min(rule.window, rule.ahead / P)
        seconds = T + G if depth == 0 else max(T, G / depth)
        in_flight = P * max(0, math.ceil(G / seconds) - 1)
        is_waiting = seconds > T * 1.001
        left = 0 if is_waiting else max(0, rule.ahead - P - in_flight)
        level = math.exp(0.2 * gauss(0, 1))
        top = min(rule.window, math.ceil(rule.ahead / P))
        bins = []
        for lag in sorted({top, max(top - 1, 0)}):
            kl = (self.a + self.b * lag) * level * math.exp(0.05 * gauss(0, 1))
            bins.append(LagBin(lag, 1000, kl, 0.05 * kl, 1 / (1 + 2 * kl)))
        return StepMeasurement(
            step=step,
            step_seconds=seconds,
            wait_seconds={"ahead" if rule.ahead / P < rule.window else "window": seconds - T},
            sync_seconds=self.sync,
            published=(step + 1) % rule.publish_every == 0,
            ready_left=left,
            bins=tuple(bins),
            ess=min(found.ess for found in bins),
        )


@dataclass(slots=True)
class Trace:
    windows: list[int] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def changes(self, since: int) -> int:
        """How often the window changed after step `since`."""
        return sum(x != y for x, y in zip(self.windows[since:-1], self.windows[since + 1 :], strict=True))


def closed_loop(
    plant: Plant, steps: int, *, window: int = 0, change: Callable[[int, Plant], None] | None = None
) -> Trace:
    rule, trace = AdaptiveRule(SchedulerSettings(), P, window=window), Trace()
    for step in range(steps):
        if change is not None:
            change(step, plant)
        measured = plant.run(step, rule)
        rule.after_step(measured)
        trace.windows.append(rule.window)
        trace.ahead.append(rule.ahead)
        trace.seconds.append(measured.step_seconds)
    return trace


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


SEEDS = range(4)


@pytest.mark.parametrize(("generate", "needed"), [(0.5, 1), (1.5, 2), (2.5, 3), (4.5, 5)])
@pytest.mark.parametrize("seed", SEEDS)
def test_finds_the_smallest_window_without_wait(generate: float, needed: int, seed: int) -> None:
    # No wait needs S ≥ G/T.
    trace = closed_loop(Plant(generate=generate, seed=seed), 80)
    assert trace.windows[-1] == needed
    assert trace.changes(since=40) == 0
    assert mean(trace.seconds[40:]) < 1.05
    assert trace.ahead[-1] <= needed * P + 1  # and no more groups than keep the learner fed


@pytest.mark.parametrize("seed", SEEDS)
def test_never_stays_beyond_what_drift_permits(seed: int) -> None:
    # D(s) = .001 + .008 s: S* = 2, while the learner would wait less up to S = 6.
    trace = closed_loop(Plant(generate=6, b=0.008, seed=seed), 200)
    assert sum(window > 2 for window in trace.windows) <= 20
    assert max(trace.windows) <= 3
    # The level scatters by 20 % a step, yet the window moves seldom.
    assert trace.changes(since=20) <= 8
    assert mean([float(w) for w in trace.windows[20:]]) > 1.5


@pytest.mark.parametrize("seed", SEEDS)
def test_comes_down_from_a_start_that_was_too_large(seed: int) -> None:
    trace = closed_loop(Plant(generate=6, b=0.02, seed=seed), 40, window=8)
    assert max(trace.windows[30:]) <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_follows_drift_that_grows_and_sampling_that_slows_or_speeds_up(seed: int) -> None:
    def drift(step: int, plant: Plant) -> None:
        plant.b = 0.001 if step < 60 else 0.03

    trace = closed_loop(Plant(seed=seed), 90, change=drift)
    assert trace.windows[59] == 3
    assert max(trace.windows[75:]) <= 1  # D(1) = .031

    def slower(step: int, plant: Plant) -> None:
        plant.generate = 2.5 if step < 60 else 4.5

    trace = closed_loop(Plant(seed=seed), 100, change=slower)
    assert trace.windows[59] == 3
    assert min(trace.windows[80:]) >= 5
    assert mean(trace.seconds[80:]) < 1.05

    def faster(step: int, plant: Plant) -> None:
        plant.generate = 2.5 if step < 60 else 0.7

    trace = closed_loop(Plant(seed=seed), 100, change=faster)
    assert trace.ahead[-1] == P + 1
    assert trace.windows[-1] <= 2
    assert mean(trace.seconds[60:]) < 1.05


def test_a_restored_rule_decides_as_if_it_had_never_stopped() -> None:
    plant, other = Plant(generate=4, b=0.004, sync=0.9, seed=3), Plant(generate=4, b=0.004, sync=0.9, seed=3)
    straight, first = (
        AdaptiveRule(SchedulerSettings(), P, window=0),
        AdaptiveRule(SchedulerSettings(), P, window=0),
    )
    expected, made = [], []
    for step in range(120):
        expected += straight.after_step(plant.run(step, straight))
        made += first.after_step(other.run(step, first))
        if step % 7 == 0:
            state = json.loads(json.dumps(first.state(), allow_nan=False))
            first = AdaptiveRule(SchedulerSettings(), P, window=0)
            first.restore(state)
            assert first.state() == state
    assert made == expected
    assert len(made) > 8


# ---- whatever is measured ----------------------------------------------------------------------

any_number = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 2)
any_bin = st.builds(LagBin, st.integers(0, 12), any_number, any_number, any_number, any_number)
any_step = st.tuples(
    any_number,
    st.dictionaries(st.sampled_from(["window", "ahead", "deadline", "sampling", "sync"]), any_number),
    any_number,
    st.booleans(),
    st.integers(0, 40),
    st.lists(any_bin, max_size=4).map(tuple),
    any_number,
    st.integers(1, 9),  # so many times
)


@settings(max_examples=80, deadline=None, phases=set(Phase) - {Phase.explain})
@given(
    st.integers(0, 4),
    st.integers(1, 9),
    st.lists(any_step, max_size=12),
    st.builds(
        SchedulerSettings,
        max_window=st.integers(4, 9),
        max_drift=st.sampled_from([1e-9, 0.02, 10.0]),
        min_ess=st.sampled_from([1e-9, 0.8, 1 - 1e-9]),
        wait_tolerance=st.sampled_from([1e-9, 0.05]),
    ),
)
def test_bounds_hold_whatever_is_measured(
    window: int, groups: int, steps: list, limits: SchedulerSettings
) -> None:
    rule = AdaptiveRule(limits, groups, window=window)
    number = 0
    for *measured, times in steps:
        for _ in range(times):
            before = {"window": rule.window, "publish_every": rule.publish_every, "ahead": rule.ahead}
            for decision in rule.after_step(StepMeasurement(number, *measured)):
                assert decision.old == before[decision.setting] != decision.new
                assert all(x is None or math.isfinite(x) for x in decision.inputs.values())
                before[decision.setting] = decision.new
            assert before == {
                "window": rule.window,
                "publish_every": rule.publish_every,
                "ahead": rule.ahead,
            }
            assert 0 <= rule.window <= limits.max_window
            assert groups <= rule.ahead <= (rule.window + 1) * groups
            assert 1 <= rule.publish_every <= rule.window + 1
            number += 1
    json.dumps(rule.state(), allow_nan=False)

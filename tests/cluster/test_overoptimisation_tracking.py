"""What evaluations show of over-optimisation and what a run makes of it, with values worked out by hand."""

import asyncio
import functools
import json
import math
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from monitor_helpers import rows, settings

from actors.records import Completion, Group, Prompt, Trajectory
from cluster import heldout as heldout_module
from cluster.config_file import parse_config
from cluster.evaluation import Evaluation, summarise
from cluster.heldout import EVALUATION_AFTER, HeldOut
from cluster.monitor import Monitor
from cluster.overoptimisation import OverOptimisation, normalised_gap
from rewards.overoptimisation_settings import StopSettings
from rewards.settings import RewardSettings

REWARDS = [
    RewardSettings(kind="model", name="proxy", path="x"),
    RewardSettings(kind="model", name="judge", path="y", role="evaluate"),
    RewardSettings(kind="task", name="gold", role="evaluate"),
]
PROMPTS = ("a", "b", "c", "d")
SHAPE = (-1.0, -1.0, 1.0, 1.0)
SD = math.sqrt(4 / 3)  # of SHAPE: Σ(x − 0)² = 4 over n − 1 = 3


def evaluation(
    step: int, proxy: float, judge: float | None, *, gold: float = 0.5, kl: float = 4.0, std: float = 0.2
) -> Evaluation:
    """Means over prompts as given; every prompt differs from the mean by ±1."""

    def spread(mean: float) -> dict[str, float]:
        return {prompt: mean + off for prompt, off in zip(PROMPTS, SHAPE, strict=True)}

    components = {"proxy": spread(proxy), "proxy/std": dict.fromkeys(PROMPTS, std), "gold": spread(gold)}
    if judge is not None:
        components["judge"] = spread(judge)
    return Evaluation(step, spread(proxy), [], 0, kl, 7.0, components)


def test_a_row_has_the_axis_and_every_curve() -> None:
    tracker = OverOptimisation(REWARDS, StopSettings())
    first = tracker.observe(evaluation(0, 0.0, 0.0, kl=-0.1), candidate=False)
    assert first.row["overoptimisation/kl_sqrt"] == 0.0  # an estimate below 0
    assert not first.is_best
    row = tracker.observe(evaluation(5, 1.0, 0.25, gold=0.75, std=0.3), candidate=True).row
    half = 3.182446 * SD / 2  # t(.975, 3)·s/√4
    assert row == {
        "overoptimisation/kl_sqrt": 2.0,
        "overoptimisation/proxy": 1.0,
        "overoptimisation/heldout": 0.25,
        "overoptimisation/heldout_ci95": pytest.approx(half, abs=1e-5),
        "overoptimisation/gold": 0.75,
        "overoptimisation/gold_ci95": pytest.approx(half, abs=1e-5),
        "overoptimisation/disagreement": pytest.approx(0.3),
        "overoptimisation/gap": pytest.approx((1.0 - 0.25) / SD),  # both have the same scale
    }


def test_the_held_out_reward_is_the_mean_of_all_that_stand_by() -> None:
    second = RewardSettings(kind="model", name="other", path="z", role="evaluate")
    tracker = OverOptimisation([*REWARDS, second], StopSettings())
    one = evaluation(1, 0.0, 1.0)
    one.components["other"] = {"a": 3.0, "c": 5.0}  # two prompts it could not read
    row = tracker.observe(one, candidate=True).row
    # a: (0 + 3)/2, c: (2 + 5)/2, of the prompts that both have.
    assert row["overoptimisation/heldout"] == pytest.approx((1.5 + 3.5) / 2)


def test_a_run_without_such_rewards_has_no_such_row() -> None:
    tracker = OverOptimisation([RewardSettings(kind="exact")], StopSettings())
    seen = tracker.observe(Evaluation(0, {"a": 1.0, "b": 2.0}, [], 0, 1.0, 3.0), candidate=True)
    assert seen.row == {}
    assert seen.is_best
    assert tracker.best_facts()["by"] == "training reward on held-out prompts"


def test_the_best_is_by_the_held_out_reward_and_needs_to_be_better() -> None:
    tracker = OverOptimisation(REWARDS, StopSettings())
    tracker.observe(evaluation(0, 0.0, 9.0), candidate=False)
    judged = [(1, 1.0, 0.4), (2, 2.0, 0.6), (3, 3.0, 0.6), (4, 4.0, 0.1)]
    best = [tracker.observe(evaluation(*one, gold=0.9), candidate=True).is_best for one in judged]
    assert best == [True, True, False, False]
    assert tracker.best_facts() == {
        "step": 2,
        "by": "held-out reward",
        "reward": pytest.approx(0.6),
        "proxy": 2.0,
        "gold": pytest.approx(0.9),
    }


def test_a_gap_needs_a_level_and_common_prompts() -> None:
    first = {"proxy": {"a": 1.0, "b": 2.0}, "heldout": {"a": 0.0, "b": 0.0}, "scales": [2.0, 4.0]}
    state = {"first": {"normalised_gap": first}}
    # a: (3 − 1)/2 − (2 − 0)/4 = .5; b is not in this evaluation's held-out rewards.
    assert normalised_gap(state, {"a": 3.0, "b": 9.0}, {"a": 2.0}) == pytest.approx(0.5)
    assert normalised_gap(state, {"a": 3.0}, {}) is None
    assert normalised_gap({"first": {}}, {"a": 3.0}, {"a": 2.0}) is None


DECLINE = [(0, 0.0, 0.0), (5, 1.0, 2.0), (10, 2.0, 1.5), (15, 3.0, 1.0), (20, 4.0, 0.5)]
# All prompts move together, so paired intervals have no width: steps 10, 15 and 20 are below step 5's best.


def test_a_resumed_tracker_goes_on_where_it_was() -> None:
    whole = OverOptimisation(REWARDS, StopSettings(heldout_decline="stop"))
    seen = [whole.observe(evaluation(*one), candidate=True) for one in DECLINE]
    fired = [one.verdict.rule if one.verdict else None for one in seen]
    # The gap is (2 − 1.5)/SD = .43 at step 10 and (3 − 1)/SD = 1.73 at step 15, where its warning begins.
    assert fired == [None, None, None, "normalised_gap", "heldout_decline"]
    for cut in range(1, len(DECLINE)):
        before = OverOptimisation(REWARDS, StopSettings(heldout_decline="stop"))
        for one in DECLINE[:cut]:
            before.observe(evaluation(*one), candidate=True)
        state = json.loads(json.dumps(before.state()))
        after = OverOptimisation(REWARDS, StopSettings(heldout_decline="stop"), state)
        assert after.last_step == DECLINE[cut - 1][0]
        rest = [after.observe(evaluation(*one), candidate=True) for one in DECLINE[cut:]]
        assert rest == seen[cut:]
        assert after.state() == whole.state()


JOB = """
[run]
steps = 100
batch_size = 4
evaluate_every = 5
[model.scratch]
[task]
kind = "reversal"
[rollout]
group_size = 2
[[reward]]
kind = "model"
name = "proxy"
path = "x"
[[reward]]
kind = "model"
name = "judge"
path = "y"
role = "evaluate"
[[reward]]
kind = "task"
name = "gold"
role = "evaluate"
[stop]
heldout_decline = "stop"
normalised_gap = "off"
"""


def synchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test to its end."""

    @functools.wraps(test)
    def run(*args: Any, **named: Any) -> None:
        asyncio.run(test(*args, **named))

    return run


class Story:
    """A run's evaluations as they are made up, with the real monitor and tracker."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
        self.run_dir = run_dir
        self.config = parse_config(JOB, list(overrides))
        self.asked: list[int] = []
        self.values = {step: evaluation(step, proxy, judge) for step, proxy, judge in DECLINE}

        async def made_up(*_: Any, version: int, **__: Any) -> Evaluation:
            self.asked.append(version)
            return self.values[version]

        monkeypatch.setattr(heldout_module, "evaluate", made_up)

    def start(self, state: dict[str, Any] | None = None) -> tuple[HeldOut, Monitor]:
        class Prompts:
            class heldout:  # noqa: N801
                prompts: tuple[()] = ()

        monitor = Monitor(self.run_dir, settings(), {}, 100, resume_from=None if state is None else 5)
        held = HeldOut(self.config, Prompts, self.run_dir, state)  # type: ignore[arg-type]
        held.attach(monitor, None, None)  # type: ignore[arg-type]
        return held, monitor


@synchronous
async def test_a_rule_stops_a_run_and_says_why_and_what_it_cannot_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(tmp_path, monkeypatch)
    held, monitor = story.start()
    with monitor:
        await held.measure_before(0)
        for step in (5, 10, 15):
            outcome = await held.measure_during(step)
            assert outcome.is_best == (step == 5)
            assert held.stopped_by is None
        outcome = await held.measure_during(20)
        assert held.stopped_by is not None
        assert held.stopped_by.rule == "heldout_decline"
        assert outcome.row["heldout/judge"] == pytest.approx(0.5)
        assert outcome.row["heldout/reward/proxy"] == pytest.approx(4.0)
        last = await held.measure_after(20)
        assert last.row == {}  # the row of that step has it already
    assert story.asked == [0, 5, 10, 15, 20]  # the last evaluation is not made twice
    assert held.after == story.values[20]
    (decision,) = rows(tmp_path / "decisions.jsonl")
    assert (decision["learner_step"], decision["setting"], decision["action"]) == (20, "stop", "stop")
    assert "below its best" in decision["reason"]
    assert "held-out labels share" in decision["blind_spot"]
    assert "What it cannot see" in (tmp_path / "events.log").read_text()
    assert rows(tmp_path / "metrics.jsonl")[0]["overoptimisation/proxy"] == 0.0


@synchronous
async def test_a_resume_counts_the_declines_of_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(tmp_path, monkeypatch)
    held, monitor = story.start()
    with monitor:
        await held.measure_before(0)
        for step in (5, 10, 15):
            await held.measure_during(step)
    state = json.loads(json.dumps(held.state()))
    again, monitor = story.start(state)
    again.resume(15)
    with monitor:
        await again.measure_before(15)  # measured already
        await again.measure_during(20)
    assert again.before == story.values[0]
    assert story.asked == [0, 5, 10, 15, 20]
    assert again.stopped_by is not None


@synchronous
async def test_a_longer_run_takes_in_the_evaluation_at_the_end_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(tmp_path, monkeypatch, 'stop.heldout_decline="warn"')
    held, monitor = story.start()
    with monitor:
        await held.measure_before(0)
        for step in (5, 10):
            await held.measure_during(step)
        at_checkpoint = json.loads(json.dumps(held.state()))
        await held.measure_after(15)
    assert (tmp_path / EVALUATION_AFTER).exists()
    again, monitor = story.start(at_checkpoint)
    again.resume(15)
    assert again.tracker.last_step == 15
    assert again.state() == held.state()
    with monitor:
        await again.measure_during(20)
    assert again.stopped_by is None  # it only warns
    assert [one["rule"] for one in again.tracker.verdicts] == ["heldout_decline"]


def sampled(prompt: str, proxies: list[float], judges: list[float]) -> Group:
    trajectories = tuple(
        Trajectory(Completion((5,), (-1.0,), (0,), "", "stop"), proxy, {"judge": judge}, (-1.0,))
        for proxy, judge in zip(proxies, judges, strict=True)
    )
    return Group(1, Prompt(prompt, (1,), prompt), trajectories, "rollout-0", 0.1, 0.1)


@synchronous
async def test_more_samples_a_prompt_do_not_narrow_the_scale_of_the_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard deviations are those of single responses, not those of the means of four of them."""

    async def made_up(*_: Any, version: int, heldout_rewards: tuple[str, ...], **__: Any) -> Evaluation:
        risen = version / 5
        groups = [
            sampled(
                prompt,
                [mean + off + 2 * risen for off in (-3, -1, 1, 3)],
                [2 * (mean + off) + risen for off in (-3, -1, 1, 3)],
            )
            for prompt, mean in (("a", -0.5), ("b", 0.5))
        ]
        return summarise(groups, version, heldout_rewards=heldout_rewards)

    story = Story(tmp_path, monkeypatch, 'stop.normalised_gap="stop"')
    monkeypatch.setattr(heldout_module, "evaluate", made_up)
    held, monitor = story.start()
    with monitor:
        await held.measure_before(0)
        outcome = await held.measure_during(5)
    # Proxy at step 0: Σ(x − 0)² = 2·(9 + 1 + 1 + 9) + 8·.5² = 42 over 7, so its sd is √6; the judge's is 2√6.
    # It rises by 2, the judge by 1. The two prompts' means have sd √.5, which would make the gap 2.12.
    assert outcome.row["overoptimisation/gap"] == pytest.approx(2 / math.sqrt(6) - 1 / (2 * math.sqrt(6)))
    assert held.stopped_by is None


@synchronous
async def test_a_rule_that_cannot_judge_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(tmp_path, monkeypatch, 'stop.disagreement="stop"')
    for one in story.values.values():
        del one.components["proxy/std"]  # one member only
    held, monitor = story.start()
    with monitor:
        await held.measure_before(0)
        await held.measure_during(5)
    said = [line for line in (tmp_path / "events.log").read_text().splitlines() if "could not judge" in line]
    assert len(said) == 1
    assert "no ensemble" in said[0]


@synchronous
async def test_a_resume_takes_an_evaluation_that_ended_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 5 was saved before the evaluation of its weights ended, as training goes on."""
    story = Story(tmp_path, monkeypatch)
    held, monitor = story.start()
    with monitor:
        await held.measure_before(0)
        at_checkpoint = json.loads(json.dumps(held.state()))
        await held.measure_during(5, 12.5)
        after_five = held.state()
        await held.measure_during(10, 20.0)
    again, monitor = story.start(at_checkpoint)
    again.resume(5)
    with monitor:
        outcome = await again.measure_during(5, 12.5)
        assert outcome.is_best
        assert again.state() == json.loads(json.dumps(after_five))
        await again.measure_during(10, 21.0)
    assert story.asked == [0, 5, 10, 10]  # step 10 is taken anew, and so is its evaluation
    found = rows(tmp_path / "metrics.jsonl")
    assert [(row["learner_step"], row.get("time/training_s")) for row in found] == [
        *((0, None), (5, 12.5), (10, 21.0))
    ]
    assert Evaluation.load(tmp_path / "evaluations" / "step_000010.json") == story.values[10]

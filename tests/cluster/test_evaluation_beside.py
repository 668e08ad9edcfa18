"""Held-out evaluation beside training, on stand-ins: which weights, who waits for whom, what is saved."""

import asyncio
from collections import Counter

import pytest
from controller_helpers import World

from cluster.evaluation import EvaluationError, evaluate
from cluster.remote import LossError


async def open_gate_after(world: World, *entry: tuple[str, int]) -> None:
    """Let held-out samples come back once all of these are in the log, and nothing more could happen."""
    while not set(entry) <= set(world.log):
        await asyncio.sleep(0.001)
    for _ in range(50):  # whatever can go on without them goes on
        await asyncio.sleep(0.001)
    world.gate.set()


def gated(*overrides: str, window: int, actors: int = 2) -> World:
    """Twelve steps of two groups, an evaluation after the sixth, whose samples wait for the gate."""
    world = World("run.evaluate_every=6", "run.checkpoint_every=0", *overrides, window=window, actors=actors)
    world.sample_seconds = lambda _: 0.001
    world.gate.clear()
    return world


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("every", [1, 4])
def test_training_goes_on_for_as_long_as_the_window_allows(window: int, every: int) -> None:
    """Samples of version 6 may be trained on up to step 6 + S: so many steps begin during the evaluation."""
    world = gated(f"scheduler.publish_every={min(every, window + 1)}", window=window)
    world.run(open_gate_after(world, ("evaluate", 6), ("step", 6 + window)))
    assert world.during(6) == list(range(6, 7 + window))
    first, last = (world.log.index((kind, 6)) for kind in ("evaluate", "evaluated"))
    assert all(kind == "step" for kind, _ in world.log[first + 1 : last])  # and no weights went out
    assert [one.version for one in world.evaluations] == [6]
    assert len(world.evaluations[0].rewards) == len(world.heldout)
    assert [report.step for report in world.reports] == list(range(1, 13))
    assert max(report.row["lag/max"] for report in world.reports) <= window
    assert len(world.trained) == 24
    assert world.controller.totals.wait_by_cause["evaluation"] > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("window", "every", "evaluate_every"), [(0, 1, 1), (1, 2, 3), (3, 4, 2), (2, 1, 5)])
def test_every_evaluation_is_of_its_steps_weights_and_these_are_saved(
    seed: int, window: int, every: int, evaluate_every: int
) -> None:
    world = World(
        f"run.evaluate_every={evaluate_every}", f"scheduler.publish_every={every}", window=window, seed=seed
    )
    world.run()
    due = list(range(evaluate_every, 12, evaluate_every))
    assert [one.version for one in world.evaluations] == due  # `evaluate` refuses tokens of any other
    saved = sorted({*due, 5, 10})
    assert world.saved == [(step, step) for step in saved]  # before the next step began
    assert max(report.row["lag/max"] for report in world.reports) <= window
    assert Counter(world.trained).most_common(1)[0][1] == 1
    assert len(world.trained) == 24
    assert all(actor.slot.in_flight == 0 for actor in world.rollouts.actors)


def test_an_evaluation_takes_no_more_than_half_of_the_slots() -> None:
    world = gated("rollout.max_groups_in_flight=4", window=3)
    world.run(open_gate_after(world, ("evaluate", 6), ("step", 9)))
    assert len(world.evaluations[0].rewards) == len(world.heldout) == 12
    assert world.most_held_back == 4  # of 2 actors' 8 slots
    assert max(world.most_in_flight.values()) <= 4


@pytest.mark.parametrize("window", [0, 2])
def test_one_slot_for_training_and_evaluation_is_enough(window: int) -> None:
    world = World("run.evaluate_every=3", "rollout.max_groups_in_flight=1", actors=1, window=window)
    world.run()
    assert [one.version for one in world.evaluations] == [3, 6, 9]
    assert len(world.trained) == 24


def test_a_checkpoint_of_another_step_waits_for_the_evaluation() -> None:
    world = World("run.evaluate_every=4", "run.checkpoint_every=5", window=3)
    world.sample_seconds = lambda _: 0.001
    world.gate.clear()
    world.run(open_gate_after(world, ("evaluate", 4), ("step", 4)))
    assert world.during(4) == [4]  # the window would have allowed four
    assert world.saved == [(4, 4), (5, 5), (8, 8), (10, 10)]


def test_an_actor_that_is_lost_takes_no_prompt_with_it() -> None:
    world = World("run.evaluate_every=6", window=2, most_actors=2)
    world.gate.clear()

    async def lose_one() -> None:
        while ("evaluate", 6) not in world.log:
            await asyncio.sleep(0.001)
        world.lost.add("rollout-0")
        while "rollout-0" in world.rollouts.slots or len(world.rollouts.actors) < 2:
            world.gate.set()
            await asyncio.sleep(0.001)

    world.run(lose_one())
    assert [one.version for one in world.evaluations] == [6]
    assert len(world.evaluations[0].rewards) == len(world.heldout)
    assert len(world.trained) == 24
    assert world.rollouts.lost == 1


def test_an_actor_that_nobody_replaces_ends_the_run_during_an_evaluation_too() -> None:
    world = World("run.evaluate_every=6", window=2, actors=1)
    world.gate.clear()

    async def lose_it() -> None:
        while ("evaluate", 6) not in world.log:
            await asyncio.sleep(0.001)
        world.lost.add("rollout-0")
        world.gate.set()

    with pytest.raises(LossError, match="rollout-0 died"):
        world.run(lose_it())


def test_held_out_prompts_that_cannot_be_scored_end_the_run_with_the_reason() -> None:
    world = World("run.evaluate_every=6", window=1)
    world.unscorable = {prompt.id for prompt in world.heldout}
    with pytest.raises(EvaluationError, match=r"'gold' on prompt h\d+: raised"):
        world.run()
    assert world.controller.totals.groups_dropped == 0  # they are none of training's


def test_a_stop_that_an_evaluation_asks_for_ends_the_run_at_the_step_under_way() -> None:
    world = World("run.evaluate_every=4", window=3)
    evaluated = world.controller.hooks.on_evaluate

    async def stop(version: int, training_s: float) -> None:
        await evaluated(version, training_s)
        world.controller.request_stop()

    world.controller.hooks.on_evaluate = stop
    world.run()
    steps = [number for kind, number in world.log if kind == "step"]
    assert 4 <= len(steps) <= 8
    assert [one.version for one in world.evaluations] == [4]
    assert world.log[-1] == ("publish", len(steps))  # what is evaluated last is what was trained last
    assert len(world.reports) == len(steps)


def test_a_stop_by_the_user_waits_for_the_evaluation_under_way() -> None:
    world = gated(window=3)

    async def stop() -> None:
        while ("evaluate", 6) not in world.log:
            await asyncio.sleep(0.001)
        world.controller.request_stop()
        await asyncio.sleep(0.01)
        assert world.controller.running
        world.gate.set()

    world.run(stop())
    assert [one.version for one in world.evaluations] == [6]
    assert len(world.reports) < 12


@pytest.mark.parametrize(("evaluated", "found"), [(0, [4, 8]), (4, [8])])
def test_a_resumed_run_makes_up_for_an_evaluation(evaluated: int, found: list[int]) -> None:
    world = World("run.evaluate_every=4", window=2, step=4)
    world.controller.evaluated = evaluated
    world.run()
    assert [one.version for one in world.evaluations] == found
    assert [report.step for report in world.reports] == list(range(5, 13))
    assert (4, 4) not in world.saved  # the checkpoint that it goes on from


@pytest.mark.parametrize(("window", "every"), [(0, 1), (3, 3)])
def test_evaluations_that_pause_are_off_the_clock(window: int, every: int) -> None:
    world = World(
        *("run.evaluate_every=4", "run.evaluate_pauses=true", f"scheduler.publish_every={every}"),
        window=window,
    )
    world.sample_seconds = lambda prompt: 0.2 if prompt.startswith("h") else 0.001
    world.run()
    assert [one.version for one in world.evaluations] == [4, 8]
    assert [world.during(version) for version in (4, 8)] == [[], []]
    assert [report.step for report in world.reports] == list(range(1, 13))
    elapsed = [report.row["time/training_s"] for report in world.reports]
    assert elapsed == sorted(elapsed)
    took = sum(report.row["timing_s/step"] for report in world.reports)
    assert abs(elapsed[-1] - took) < 0.2  # the two evaluations of at least 0.2 s are in neither


def test_samples_of_other_weights_are_refused() -> None:
    world = World(actors=1)

    async def ask() -> None:
        scoring = asyncio.create_task(world.sampling.scoring.run())
        settings = world.controller.config.rollout
        try:
            with pytest.raises(EvaluationError, match=r"rollout-0 .* version 0, but version 1 is to be"):
                await evaluate(
                    world.heldout, world.rollouts, world.sampling.scoring, settings, samples=2, version=1
                )
        finally:
            scoring.cancel()

    asyncio.run(ask())


def test_held_out_prompts_come_to_their_turn_where_training_fills_every_slot() -> None:
    """One slot, and a window that lets training go on: it and the evaluation take turns."""
    world = World("run.evaluate_every=6", "rollout.max_groups_in_flight=1", actors=1, window=5)
    order: list[str] = []

    def sample_seconds(prompt: str) -> float:
        order.append(prompt[0])
        return 0.001

    world.sample_seconds = sample_seconds
    world.train_seconds = 0.0
    world.run()
    first = order.index("h")
    last = len(order) - order[::-1].index("h")
    during = "".join(order[first:last])
    assert during.count("h") == len(world.heldout)
    assert "pp" not in during
    assert during.startswith("hph")

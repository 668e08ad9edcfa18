"""Actors that are lost and that join, on stand-ins: no sample is lost or trained twice, lag is bounded."""

import asyncio
import random
from collections import Counter
from typing import Any, cast

import pytest
from controller_helpers import World

from actors.settings import ScoringSettings
from cluster import recruiting, scoring_pool
from cluster.controller import StepReport
from cluster.remote import LossError, Remote, WorkerFailedError, WorkerLostError
from cluster.scoring_pool import ScoringPool

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recruiting, "_PAUSE_S", 0.001)
    monkeypatch.setattr(recruiting, "_LOOK_EVERY_S", 0.002)
    monkeypatch.setattr(scoring_pool, "_PAUSE_S", 0.001)


def lose_at(world: World, losses: dict[int, str]) -> None:
    """Actors go when a step is reported; a name that ends with * is that of whoever holds the place then."""
    report = world.controller.hooks.on_step

    def on_step(done: StepReport) -> None:
        report(done)
        if (name := losses.get(done.step)) is not None:
            place = int(name.removeprefix("rollout-").rstrip("*"))
            holders = [a.remote.name for a in world.rollouts.actors if a.remote.place == place]
            world.lost.update(holders if name.endswith("*") else [name])

    world.controller.hooks.on_step = on_step


def check_complete(world: World, window: int) -> None:
    """Every step was taken, within the bound; every group was trained once, in the order of their prompts."""
    assert [report.step for report in world.reports] == list(range(1, 13))
    assert max(report.row["lag/max"] for report in world.reports) <= window
    assert max(Counter(world.group_ids).values()) == 1
    assert max(Counter(world.trained).values()) == 1
    dispatched = world.controller.totals.groups_dispatched
    assert len(world.trained) + len(world.sampling.pending_prompts()) == dispatched


@pytest.mark.parametrize("window", [0, 2, "adaptive"])
@pytest.mark.parametrize("seed", range(3))
def test_what_a_lost_actor_was_sampling_is_sampled_by_others(window: int | str, seed: int) -> None:
    world = World(actors=3, window=window, seed=seed, most_actors=3)
    world.start_seconds = 60  # no successor comes in time
    lose_at(world, {2: "rollout-1", 5: "rollout-2"})
    world.run()
    check_complete(world, 8 if window == "adaptive" else int(window))
    assert [actor.remote.name for actor in world.rollouts.actors] == ["rollout-0"]
    assert world.sampling.actors_lost == 2
    assert world.reports[-1].row["actors/rollout"] == 1
    assert any("rollout-1 died" in event for event in world.events)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_a_run_that_loses_its_only_actor_goes_on_with_a_successor(window: int) -> None:
    world = World(actors=1, window=window, most_actors=1)
    # At most window + 1 steps are sampled ahead, so a successor must have come before the steps 6 and 12.
    lose_at(world, {1: "rollout-0*", 7: "rollout-0*"})
    world.run()
    check_complete(world, window)
    assert world.recruiter is not None
    assert (world.sampling.actors_lost, world.recruiter.joined) == (2, 2)
    assert world.rollouts.actors[0].remote.name == "rollout-0.2"
    assert "rollout-0.1 joined in the place of rollout-0" in world.events


@pytest.mark.parametrize("seed", range(12))
def test_losses_at_random_moments_lose_no_sample(seed: int) -> None:
    rng = random.Random(seed)
    window = rng.randrange(4)
    world = World("rollout.max_attempts=99", actors=3, window=window, seed=seed, most_actors=3)

    async def lose_now_and_then() -> None:
        while True:
            await asyncio.sleep(rng.random() * 0.02)
            if world.rollouts.actors:
                world.lost.add(rng.choice(world.rollouts.actors).remote.name)

    world.run(lose_now_and_then())
    check_complete(world, window)
    assert world.sampling.actors_lost > 0


def test_an_actor_lost_while_it_loads_weights_delays_nobody() -> None:
    world = World(actors=2, window=2, most_actors=2)
    world.load_seconds = 0.02
    stand_in: Any = world.rollouts["rollout-1"].remote
    load = stand_in.load_weights

    async def die(update: Any) -> Any:
        if update.version == 3:
            world.lost.add("rollout-1")
        return await load(update)

    stand_in.load_weights = die
    world.run()
    check_complete(world, 2)
    assert world.sampling.actors_lost == 1


def test_a_successor_proves_the_newest_weights_before_it_gets_work() -> None:
    world = World(actors=1, window=1, most_actors=1)
    world.start_seconds = 0.02
    lose_at(world, {3: "rollout-0*"})
    world.run()
    # Sampled by the successor: with version 3 at least, which was out when it was lost.
    for report in world.reports[4:]:
        for group in report.groups:
            if group.actor != "rollout-0":
                assert min(min(t.completion.versions) for t in group.trajectories) >= 3


def test_without_a_successor_a_loss_ends_the_run_by_name() -> None:
    world = World(actors=2, window=2)
    lose_at(world, {2: "rollout-1"})
    with pytest.raises(LossError, match="rollout-1 died"):
        world.run()


def test_actors_are_added_up_to_the_most_wanted_where_there_is_room() -> None:
    world = World("run.steps=40", actors=1, window=2, most_actors=3)
    world.run()
    assert sorted(actor.remote.place for actor in world.rollouts.actors) == [0, 1, 2]
    assert {world.sampled_by[group][:9] for group in world.group_ids} == {
        "rollout-0",
        "rollout-1",
        "rollout-2",
    }
    assert max(report.row["lag/max"] for report in world.reports) <= 2


def test_no_actor_is_added_where_there_is_no_room() -> None:
    world = World("run.steps=40", actors=1, window=2, most_actors=3)
    world.has_room = False
    world.run()
    assert len(world.rollouts.actors) == 1


def test_a_lost_scoring_actor_has_a_successor_and_no_group_goes_unscored() -> None:
    world = World(window=2, most_actors=2)
    report = world.controller.hooks.on_step

    def on_step(done: StepReport) -> None:
        report(done)
        if done.step in (2, 6):
            world.lost.update(remote.name for remote in world.sampling.scoring.remotes)

    world.controller.hooks.on_step = on_step
    world.run()
    check_complete(world, 2)
    assert world.sampling.scoring.lost == 2
    assert "scoring-0.1 scores in the place of scoring-0" in world.events


def test_a_group_that_takes_three_scoring_actors_with_it_ends_the_run() -> None:
    world = World(window=2, most_actors=2)
    world.poisonous = "p5"
    with pytest.raises(LossError, match=r"3 scoring actors were lost .*prompt p"):
        world.run()


class Stubborn:
    """A scoring actor that starts only at the given attempt; it scores nothing and is lost when asked to."""

    attempts = 0

    def __init__(self, place: int, starts_at: int) -> None:
        Stubborn.attempts += 1
        self.name, self.place = f"scoring-{place}.{Stubborn.attempts}", place
        self._starts = Stubborn.attempts >= starts_at

    async def call(self, method: str, *_: Any, seconds: float) -> Any:
        if method == "start":
            if self._starts:
                return None
            raise WorkerFailedError(f"{self.name} failed to start")
        raise WorkerLostError(f"{self.name} died while it was asked to {method}")

    def kill(self) -> None:
        """Nothing to end."""


@pytest.mark.parametrize(("starts_at", "left"), [(3, True), (4, False)])
def test_the_only_scoring_actor_has_three_attempts_to_be_replaced(
    starts_at: int, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stubborn, "attempts", 0)
    first = Stubborn(0, starts_at=0)
    monkeypatch.setattr(Stubborn, "attempts", 0)
    events: list[str] = []
    pool = ScoringPool(
        [cast("Remote", first)],
        ScoringSettings(),
        create=lambda place: cast("Remote", Stubborn(place, starts_at)),
        on_event=events.append,
    )

    async def replace() -> Remote:
        return await pool._successor(pool.remotes[0], WorkerLostError("scoring-0 died"))

    if left:
        assert asyncio.run(replace()).name == "scoring-0.3"
        assert pool.remotes[0].name == "scoring-0.3"
        assert sum("could not start, trying again" in event for event in events) == 2
    else:
        with pytest.raises(LossError, match=r"no scoring actor is left after 3 attempts: scoring-0\.3"):
            asyncio.run(replace())

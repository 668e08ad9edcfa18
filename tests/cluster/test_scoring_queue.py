"""Groups of training go before those of an evaluation, which still ends."""

import asyncio
from dataclasses import replace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.records import Completion, Prompt, SampledGroup
from actors.settings import BATCH_GROUPS, ScoringSettings
from cluster.remote import Remote, WorkerLostError
from cluster.scoring_pool import ScoringPool
from cluster.scoring_queue import EVALUATION_SAMPLES, ScoringQueue, Waiting

EVALUATION_BATCH = 4  # groups, of as many samples as these tests give them


def waiting(number: int, *, evaluation: bool = False) -> Waiting:
    samples = (cast("Completion", None),) * (EVALUATION_SAMPLES // EVALUATION_BATCH)
    group = SampledGroup(number, cast("Prompt", None), samples, "rollout-0", 0.0, evaluation=evaluation)
    return Waiting(group, cast("asyncio.Future[object]", None))  # type: ignore[arg-type]


def numbers(batch: list[Waiting]) -> list[int]:
    return [one.group.group_id for one in batch]


def test_training_goes_first_and_kinds_do_not_share_a_batch() -> None:
    async def story() -> None:
        queue = ScoringQueue(overtakers=100)
        for number in range(EVALUATION_BATCH + 2):
            queue.put(waiting(-1 - number, evaluation=True))
        for number in range(BATCH_GROUPS + 3):
            queue.put(waiting(number))
        assert numbers(await queue.take()) == list(range(BATCH_GROUPS))
        assert numbers(await queue.take()) == [BATCH_GROUPS + number for number in range(3)]
        assert numbers(await queue.take()) == [-1 - number for number in range(EVALUATION_BATCH)]
        queue.put(waiting(1000))  # waits for no more than the call under way
        assert numbers(await queue.take()) == [1000]
        assert len(await queue.take()) == 2

    asyncio.run(asyncio.wait_for(story(), 5))


def test_an_evaluation_goes_first_while_the_next_step_has_its_groups() -> None:
    async def story() -> None:
        queue = ScoringQueue(overtakers=100)
        short = False
        queue.short = lambda: short
        for number in range(3):
            queue.put(waiting(number))
        for number in range(EVALUATION_BATCH + 1):
            queue.put(waiting(-1 - number, evaluation=True))
        assert numbers(await queue.take()) == [-1 - number for number in range(EVALUATION_BATCH)]
        short = True
        assert numbers(await queue.take()) == [0, 1, 2]
        short = False
        assert numbers(await queue.take()) == [-1 - EVALUATION_BATCH]

    asyncio.run(asyncio.wait_for(story(), 5))


@pytest.mark.parametrize(
    ("samples", "groups"), [(1, BATCH_GROUPS), (8, EVALUATION_SAMPLES // 8), (EVALUATION_SAMPLES + 1, 1)]
)
def test_a_batch_of_an_evaluation_is_bounded_in_groups_and_in_samples(samples: int, groups: int) -> None:
    async def story() -> None:
        queue = ScoringQueue(0)
        for number in range(BATCH_GROUPS + 1):
            one = waiting(number, evaluation=True)
            one.group = replace(one.group, completions=(cast("Completion", None),) * samples)
            queue.put(one)
        assert numbers(await queue.take()) == list(range(groups))

    asyncio.run(asyncio.wait_for(story(), 5))


@given(
    st.integers(0, 20),
    st.lists(st.sampled_from(["train", "evaluate", "take", "lose", "short", "enough"]), max_size=200),
)
def test_no_more_than_so_many_overtake_and_nothing_is_lost(overtakers: int, verbs: list[str]) -> None:
    """Whatever comes when: each group is taken, those of a kind in order, none overtaken too often."""

    async def story() -> None:
        queue = ScoringQueue(overtakers)
        short = True
        queue.short = lambda: short
        arrived: list[Waiting] = []
        taken: list[Waiting] = []

        async def take(*, lose: bool = False) -> None:
            batch = await queue.take()
            assert len({one.group.evaluation for one in batch}) == 1
            for one in batch:
                if lose:
                    queue.put_back(one)
                else:
                    taken.append(one)

        for number, verb in enumerate(verbs):
            if verb in ("train", "evaluate"):
                arrived.append(waiting(number, evaluation=verb == "evaluate"))
                queue.put(arrived[-1])
            elif verb in ("short", "enough"):
                short = verb == "short"
            elif len(taken) < len(arrived):
                await take(lose=verb == "lose")
        while len(taken) < len(arrived):
            await take()
        order = numbers(taken)
        assert sorted(order) == numbers(arrived)
        for evaluation in (False, True):
            of_kind = [one.group.group_id for one in taken if one.group.evaluation == evaluation]
            assert of_kind == sorted(of_kind)
        for place, one in enumerate(taken):
            before = [other for other in taken[:place] if other.group.group_id > one.group.group_id]
            if one.group.evaluation:
                assert len(before) <= overtakers
            else:  # only while the next step had its groups
                assert not before or "enough" in verbs

    asyncio.run(asyncio.wait_for(story(), 30))


def test_each_wake_lets_one_taker_go_on() -> None:
    async def story() -> None:
        queue = ScoringQueue(4)
        takers = [asyncio.create_task(queue.take()) for _ in range(3)]
        await asyncio.sleep(0)
        queue.wake()
        queue.wake()
        done, waits = await asyncio.wait(takers, timeout=0.05)
        assert [task.result() for task in done] == [[], []]
        queue.put(waiting(5))
        assert [numbers(await task) for task in waits] == [[5]]

    asyncio.run(asyncio.wait_for(story(), 5))


class Slow:
    """An actor that scores one call after the other and dies in the call named."""

    def __init__(self, name: str, calls: list[list[int]], dies_in: int = -1) -> None:
        self.name, self.place, self._calls, self._dies_in = name, 0, calls, dies_in

    async def call(self, method: str, *args: list[SampledGroup], seconds: float) -> list[object] | None:
        if method == "start":
            return None
        self._calls.append([group.group_id for group in args[0]])
        await asyncio.sleep(0.01)
        if len(self._calls) - 1 == self._dies_in:
            raise WorkerLostError(f"{self.name} died")
        return list(args[0])

    def kill(self) -> None:
        """Nothing to end."""


@pytest.mark.parametrize("dies_in", [-1, 0])
def test_a_pool_scores_training_before_the_rest_of_an_evaluation(dies_in: int) -> None:
    """Also where the actor is lost over the evaluation's first groups: these wait again where they were."""
    calls: list[list[int]] = []
    pool = ScoringPool(
        [cast("Remote", Slow("a", calls, dies_in))],
        ScoringSettings(),
        step_groups=8,
        create=lambda _: cast("Remote", Slow("b", calls)),
        on_event=lambda _: None,
    )

    async def story() -> None:
        serving = asyncio.create_task(pool.run())
        held_out = [asyncio.create_task(pool.score(waiting(-n, evaluation=True).group)) for n in range(1, 13)]
        while not calls:  # the first call is under way
            await asyncio.sleep(0.001)
        trained = [asyncio.create_task(pool.score(waiting(n).group)) for n in range(1, 11)]
        await asyncio.gather(*held_out, *trained)
        serving.cancel()

    asyncio.run(asyncio.wait_for(story(), 10))
    first = [-n for n in range(1, EVALUATION_BATCH + 1)]
    rest = [[-5, -6, -7, -8], [-9, -10, -11, -12]]
    again = [first] if dies_in == 0 else []
    # Eight, a step's groups, overtake; the evaluation's next are as old as the ninth.
    assert calls == [first, [1, 2, 3, 4, 5, 6, 7, 8], *again, *rest, [9, 10]]

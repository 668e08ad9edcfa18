"""Samples for an iteration: prompts ─► rollout actors ─► scoring actors, where rewards are to choose.

A group is scored as soon as it is sampled. Everything ends before anything is trained, so no token has any
lag: all of an iteration's samples come from the weights with which it began.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from actors.records import Group, Prompt, RewardFailure, SampledGroup, SampleRequest
from actors.settings import RolloutSettings
from cluster.rollout_pool import RolloutPool
from cluster.scoring_pool import ScoringPool

_Answer = TypeVar("_Answer")


class RewardsFailedError(RuntimeError):
    """Too many groups of an iteration could not be scored."""


async def sample(
    pool: RolloutPool, prompts: Sequence[Prompt], rollout: RolloutSettings, first_id: int
) -> list[SampledGroup]:
    """`rollout.group_size` samples of each prompt, in the order of the prompts; ids count from `first_id`."""

    async def as_it_is(group: SampledGroup) -> SampledGroup:
        return group

    return await _sample_and(as_it_is, pool, prompts, rollout, first_id)


async def sample_and_score(
    pool: RolloutPool,
    scoring: ScoringPool,
    prompts: Sequence[Prompt],
    rollout: RolloutSettings,
    first_id: int,
) -> list[Group | RewardFailure]:
    """The same with rewards."""
    return await _sample_and(scoring.score, pool, prompts, rollout, first_id)


async def _sample_and(
    then: Callable[[SampledGroup], Awaitable[_Answer]],
    pool: RolloutPool,
    prompts: Sequence[Prompt],
    rollout: RolloutSettings,
    first_id: int,
) -> list[_Answer]:
    """Sample as many groups at once as the actors take, and do something with each that is ready."""
    slots = asyncio.Semaphore(rollout.max_groups_in_flight * max(1, len(pool.actors)))

    async def one(number: int, prompt: Prompt) -> _Answer:
        request = SampleRequest(
            first_id + number, prompt, rollout.group_size, rollout.max_new_tokens, rollout.temperature
        )
        async with slots:
            sampled = await pool.sample_anywhere(request)
        return await then(sampled)

    async with asyncio.TaskGroup() as tasks:
        under_way = [tasks.create_task(one(number, prompt)) for number, prompt in enumerate(prompts)]
    return [task.result() for task in under_way]


def scored_groups(answers: Sequence[Group | RewardFailure], most_failed: float) -> list[Group]:
    """The groups whose rewards could be had. RewardsFailedError where more than this share could not."""
    groups = [answer for answer in answers if isinstance(answer, Group)]
    failures = [answer for answer in answers if isinstance(answer, RewardFailure)]
    if failures and (not groups or len(failures) > most_failed * len(answers)):
        first = failures[0]
        raise RewardsFailedError(
            f"{len(failures)} of {len(answers)} groups could not be scored, more than "
            f"scoring.max_error_fraction = {most_failed:g} allows; the first was prompt {first.prompt_id}, "
            f"reward {first.reward!r}: {first.reason}"
        )
    return groups

"""A controller on stand-ins for its actors, for the tests of its loops."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from actors.records import Prompt, RewardFailure
from cluster.accounts import Totals
from cluster.adaptation import Adaptation
from cluster.config import JobConfig
from cluster.controller import Controller, Hooks
from cluster.prompt_cursor import PromptCursor
from cluster.rollout_pool import RolloutPool
from cluster.sampling import Sampling
from cluster.scheduler import Scheduler
from cluster.scoring_pool import ScoringPool


def build_controller(
    config: JobConfig,
    *,
    rollouts: Sequence[Any],
    scorers: Sequence[Any],
    learner: Any,
    prompts: list[Prompt],
    hooks: Hooks,
    on_reward_error: Callable[[RewardFailure], None],
) -> Controller:
    """All that stands between stand-ins is the real thing. Every actor holds version 0."""
    pool = RolloutPool(list(rollouts), config.rollout, config.sync)
    for actor in pool.actors:
        pool.slots.set_version(actor.remote.name, 0)
    scheduler = Scheduler(
        groups_per_step=config.groups_per_step,
        window=config.scheduler.first_window,
        total_steps=config.run.steps,
    )
    totals = Totals()
    sampling = Sampling(
        config=config,
        scheduler=scheduler,
        cursor=PromptCursor(prompts, 0),
        rollouts=pool,
        scoring=ScoringPool(list(scorers), config.scoring),
        totals=totals,
        on_reward_error=on_reward_error,
    )
    adaptation = Adaptation(config.scheduler, scheduler, groups_per_step=config.groups_per_step)
    return Controller(config, sampling, learner, adaptation, hooks, totals)


def run_controller(controller: Controller, seconds: float) -> None:
    """Train to the end; TimeoutError if that takes longer."""

    async def all_of_it() -> None:
        serving = asyncio.create_task(controller.sampling.scoring.run())
        try:
            await asyncio.wait_for(controller.run(), seconds)
        finally:
            serving.cancel()

    asyncio.run(all_of_it())

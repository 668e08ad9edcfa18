"""Groups of samples from a policy's folder by rollout actors: no learner.

prompts ─► a slot of an actor (vLLM, Ray) ─► SampledGroup ─► what the caller does with it, prompt by prompt
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray

from actors.decoding.settings import Guidance, GuideSpec
from actors.decoding.worker import GuidedWorker
from actors.records import Prompt, SampledGroup, SampleRequest
from actors.rollout import RolloutWorker
from cluster.config import JobConfig
from cluster.crew import shipped
from cluster.generation.policy import Policy
from cluster.placement import ray_session, role_resource, sampler_seed, sync_backend, usable_gpus
from cluster.remote import Remote
from cluster.rollout_pool import RolloutPool
from cluster.workers import stop_all

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Guided:
    """What guides the samples, and how strongly."""

    spec: GuideSpec
    guidance: Guidance


@dataclass(frozen=True, slots=True)
class Plan:
    """How many samples of each prompt, and how they are drawn.

    `temperature` 0 takes the likeliest token; `start` tells the seeds of a run that goes on from those of
    the one before.
    """

    samples: int
    temperature: float
    guided: Guided | None = None
    start: int = 0


def sample_all(
    config: JobConfig,
    policy: Policy,
    prompts: Sequence[tuple[int, Prompt]],
    plan: Plan,
    use: Callable[[int, SampledGroup], Awaitable[T]],
) -> list[T]:
    """Sample every numbered prompt and hand its group to `use`, many side by side; what `use` gave, in order.

    Raises PlacementError where Ray has no room, and an ExceptionGroup with LossError or what `Remote.call`
    raises where sampling fails.
    """
    with (
        tempfile.TemporaryDirectory(prefix="headrace-generate-") as folder,
        ray_session(config, Path(folder)) as cuda,
    ):
        return asyncio.run(_sample_all(config, policy, prompts, plan, use, cuda=cuda))


async def _sample_all(
    config: JobConfig,
    policy: Policy,
    prompts: Sequence[tuple[int, Prompt]],
    plan: Plan,
    use: Callable[[int, SampledGroup], Awaitable[T]],
    *,
    cuda: bool,
) -> list[T]:
    """Start the actors, give each as many prompts as it takes, stop them."""
    rollout = config.rollout
    remotes = [_actor(config, policy, number, plan, cuda=cuda) for number in range(rollout.actors)]
    try:
        model = await asyncio.to_thread(shipped, config, policy.path)
        pool = RolloutPool(remotes, rollout, config.sync, model=model)
        await pool.start()
        slots = asyncio.Semaphore(rollout.max_groups_in_flight * rollout.actors)

        async def one(number: int, prompt: Prompt) -> T:
            request = SampleRequest(number, prompt, plan.samples, rollout.max_new_tokens, plan.temperature)
            async with slots:
                group = await pool.sample_anywhere(request)
            return await use(number, group)

        async with asyncio.TaskGroup() as tasks:
            under_way = [tasks.create_task(one(number, prompt)) for number, prompt in prompts]
        return [task.result() for task in under_way]
    finally:
        await stop_all(remotes)


def _actor(config: JobConfig, policy: Policy, number: int, plan: Plan, *, cuda: bool) -> Remote:
    """A rollout actor, on any host with room."""
    rollout = config.rollout
    backend = sync_backend(config, usable_gpus(cuda))
    worker: type[RolloutWorker] = RolloutWorker if plan.guided is None else GuidedWorker
    guide: dict[str, Any] = (
        {} if plan.guided is None else {"guide": plan.guided.spec, "guidance": plan.guided.guidance}
    )
    handle = (
        ray.remote(worker)
        .options(
            num_cpus=rollout.cores,
            num_gpus=rollout.tensor_parallel if cuda else 0,
            resources=role_resource("rollout"),
            scheduling_strategy="SPREAD",
            max_restarts=0,
            max_concurrency=4 * rollout.max_groups_in_flight,
        )
        .remote(
            f"rollout-{number}",
            str(policy.path),
            rollout,
            config.sync.model_copy(update={"backend": backend}),
            dtype=config.learner.precision,
            max_length=policy.max_length,
            seed=sampler_seed(config.run.seed, number, plan.start),
            device="cuda" if cuda else "cpu",
            **guide,
        )
    )
    return Remote(f"rollout-{number}", handle, number)

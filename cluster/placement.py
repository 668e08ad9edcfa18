"""Starts Ray and the actors of a job, each where its resources are.

The only file of this package that starts Ray. On one machine a private Ray is used: loopback only, no
dashboard, gone with the run.
"""

import asyncio
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.rollout import RolloutWorker
from actors.scoring import ScoringWorker
from cluster.config import JobConfig
from cluster.prepare import Prepared
from cluster.remote import Remote
from learner.publish import resolve_backend
from learner.worker import LearnerJob, LearnerWorker

_GIB = 1024**3
_STOP_DEADLINE_S = 10.0
_SHARED_GPU = 0.45  # of one GPU, for the learner and for the actor where they share it


class PlacementError(RuntimeError):
    """The cluster lacks what the job asks for."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a job asks Ray for in all."""

    cores: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Workers:
    """The actors of a job; `colocated`: the one learner rank and the one rollout actor share a GPU."""

    learners: list[Remote]
    rollouts: list[Remote]
    scorers: list[Remote]
    colocated: bool

    async def stop(self) -> None:
        """Ask every actor to clean up, briefly, then end its process whatever it is doing."""
        workers = (*self.rollouts, *self.scorers, *self.learners)
        await asyncio.gather(
            *(worker.call("stop", seconds=_STOP_DEADLINE_S) for worker in workers), return_exceptions=True
        )
        for worker in workers:
            worker.kill()


def colocated(config: JobConfig, gpus: float) -> bool:
    """Whether the learner and the rollout actor share a GPU, of a cluster with so many that the job may use.

    They can if each is one process, and do if `sync.backend` is `ipc`, or `auto` where there is one GPU only.
    """
    single = config.learner.ranks == config.rollout.actors == config.rollout.tensor_parallel == 1
    backend = config.sync.backend
    return single and ((backend == "ipc" and gpus >= 1) or (backend == "auto" and gpus == 1))


def needed_resources(config: JobConfig, *, gpus: float) -> Resources:
    """Cores and GPUs that the job's actors ask for together, where it may use so many GPUs (0: on CPUs)."""
    learner, rollout, scoring = config.learner, config.rollout, config.scoring
    cores = learner.ranks * learner.cores + rollout.actors * rollout.cores + scoring.actors * scoring.cores
    if not gpus:
        return Resources(cores, 0)
    computing: float = learner.ranks + rollout.actors * rollout.tensor_parallel
    if colocated(config, gpus):
        computing = 2 * _SHARED_GPU
    return Resources(cores, computing + scoring.actors * scoring.gpus)


def sync_backend(config: JobConfig, gpus: float) -> str:
    """The backend that `sync.backend` means where the job may use so many GPUs (0: on CPUs).

    Raises PlacementError if it cannot work there.
    """
    together = colocated(config, gpus)
    if config.sync.backend == "ipc" and not together:
        raise PlacementError(
            'sync.backend = "ipc" needs a GPU that one learner rank and one rollout actor share, but '
            f"learner.ranks = {config.learner.ranks}, rollout.actors = {config.rollout.actors}, "
            f"rollout.tensor_parallel = {config.rollout.tensor_parallel} and the job can use {gpus:g} GPUs; "
            'set the three to 1 and give it a GPU, or set sync.backend to "auto"'
        )
    try:
        return resolve_backend(config.sync, "cuda" if gpus else "cpu", together)
    except ValueError as error:
        raise PlacementError(str(error)) from error


def sampler_seed(seed: int, actor: int, step: int) -> int:
    """The seed of an engine: its own for each `run.seed`, actor, and learner step that it starts at.

    A resumed run thus draws other samples than the run did before, and `run.seed` = 1 others than the second
    actor of `run.seed` = 0.
    """
    return int(np.random.SeedSequence([seed, actor, step]).generate_state(1)[0])


@contextmanager
def ray_session(config: JobConfig, run_dir: Path) -> Iterator[bool]:
    """Connect to Ray for a block of code; yields whether learner and rollouts are on CUDA.

    Raises PlacementError, before any actor starts, if the cluster is too small.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.cluster.address
    if address:
        ray.init(address=address, namespace="headrace", log_to_driver=False, logging_level=logging.ERROR)
    else:
        # A private Ray may promise more cores than there are: the actors then share them.
        asked = needed_resources(config, gpus=0).cores
        ray.init(
            address="local",
            _node_ip_address="127.0.0.1",  # Ray's own ports stay on loopback
            num_cpus=max(os.cpu_count() or 1, math.ceil(asked)),
            object_store_memory=int(config.cluster.object_store_gib * _GIB),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="headrace",
        )
    try:
        _link_logs(run_dir)
        cuda = _use_cuda(config)
        gpus = _usable_gpus(cuda)
        sync_backend(config, gpus)  # refuses here what cannot work
        _check_resources(needed_resources(config, gpus=gpus))
        yield cuda
    finally:
        ray.shutdown()


def create_workers(
    config: JobConfig, job: LearnerJob, *, reference_path: Path, cuda: bool, step: int = 0
) -> Workers:
    """Ask Ray for every actor of the job. Returns at once: `start` on each tells when it is there.

    `step` is the number of learner steps that the run has taken: a resumed run samples with other seeds.
    """
    device = "cuda" if cuda else "cpu"
    gpus = _usable_gpus(cuda)
    together = colocated(config, gpus)
    sync = config.sync.model_copy(update={"backend": sync_backend(config, gpus)})
    placing = _one_gpu(config) if together else {}
    share = _SHARED_GPU if together else 1
    learners = [
        _actor(
            LearnerWorker,
            f"learner-{rank}",
            {"num_cpus": config.learner.cores, "num_gpus": share if cuda else 0, **placing},
            rank,
            config.learner.ranks,
            job,
        )
        for rank in range(config.learner.ranks)
    ]
    rollouts = [
        _actor(
            RolloutWorker,
            name := f"rollout-{index}",
            {
                "num_cpus": config.rollout.cores,
                "num_gpus": share * config.rollout.tensor_parallel if cuda else 0,
                "max_concurrency": 4 * config.rollout.max_groups_in_flight,
                **placing,
            },
            name,
            job.model_path,
            config.rollout,
            sync,
            dtype=config.learner.precision,
            max_length=job.max_length,
            seed=sampler_seed(config.run.seed, index, step),
            device=device,
        )
        for index in range(config.rollout.actors)
    ]
    scorers = [
        _actor(
            ScoringWorker,
            name := f"scoring-{index}",
            {"num_cpus": config.scoring.cores, "num_gpus": config.scoring.gpus if cuda else 0},
            name,
            str(reference_path),
            config.reward,
            config.task,
            config.scoring,
            dtype=config.learner.precision,
            attention=config.model.attention,
            temperature=config.rollout.temperature,
            micro_batch_tokens=config.learner.micro_batch_tokens,
            chunk_tokens=config.learner.logprob_chunk_tokens,
            device="cuda" if cuda and config.scoring.gpus > 0 else "cpu",
            directory=str(Path.cwd()),
        )
        for index in range(config.scoring.actors)
    ]
    return Workers(learners, rollouts, scorers, together)


def learner_job(config: JobConfig, prepared: Prepared) -> LearnerJob:
    """What every learner rank is told of the job."""
    return LearnerJob(
        model_path=str(prepared.model_path),
        model=config.model.model_copy(update={"critic": str(prepared.critic_path or "")}),
        learner=config.learner,
        optimizer=config.optimizer,
        ppo=config.ppo,
        correction=config.correction,
        warmup=config.warmup,
        temperature=config.rollout.temperature,
        seed=config.run.seed,
        total_updates=config.total_updates,
        max_length=prepared.max_length,
    )


def _actor(worker_class: type, name: str, options: dict[str, Any], *args: Any, **kwargs: Any) -> Remote:
    handle = ray.remote(worker_class).options(max_restarts=0, **options).remote(*args, **kwargs)
    return Remote(name, handle)


def _one_gpu(config: JobConfig) -> dict[str, Any]:
    """Options of two actors that are to share a GPU: one bundle, whose part of a GPU lies on one device."""
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = {"CPU": config.learner.cores + config.rollout.cores, "GPU": 2 * _SHARED_GPU}
    group = placement_group([bundle])  # gone with the job
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)}


def _usable_gpus(cuda: bool) -> float:
    return float(ray.cluster_resources().get("GPU", 0)) if cuda else 0.0


def _use_cuda(config: JobConfig) -> bool:
    available = ray.cluster_resources().get("GPU", 0) > 0
    if config.learner.device == "cuda" and not available:
        raise PlacementError(
            'learner.device = "cuda", but Ray sees no GPU; set it to "cpu" or "auto", or add GPU hosts'
        )
    return available and config.learner.device != "cpu"


def _check_resources(needed: Resources) -> None:
    have = ray.cluster_resources()
    for what, asked in (("CPU", needed.cores), ("GPU", needed.gpus)):
        if asked > have.get(what, 0):
            raise PlacementError(
                f"the job asks for {asked:g} {what}s, but the cluster has {have.get(what, 0):g}; lower "
                "rollout.actors, scoring.actors or learner.ranks (or their cores), or add hosts"
            )


def _link_logs(run_dir: Path) -> None:
    """Leave a link to Ray's own logs, the first place to look when an actor died."""
    link = run_dir / "ray-logs"
    link.unlink(missing_ok=True)
    session_dir = ray._private.worker._global_node.get_session_dir_path() if ray.is_initialized() else None
    if session_dir:
        link.symlink_to(Path(session_dir) / "logs")

"""What a job asks of the cluster, and Ray's start.

The only file of this package that starts Ray. On one machine a private Ray is used: loopback only, no
dashboard, gone with the run.
"""

import logging
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants

from cluster.config import ClusterSettings, JobConfig
from cluster.joining import PlacementError, wait_for_hosts
from cluster.preference_job.online import ONLINE_DPO
from cluster.prepare import Prepared
from cluster.redact import secret_variables
from learner.publish import resolve_backend
from learner.settings import LearnerSettings
from learner.worker import LearnerJob

_GIB = 1024**3
_SLIVER = 0.001  # of a host's role resource: it says where an actor may go, not how many fit
SHARED_GPU = 0.45  # of one GPU, for the learner and for the actor where they share it


@dataclass(frozen=True, slots=True)
class Resources:
    """What a job asks Ray for in all."""

    cores: float
    gpus: float


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
        computing = 2 * SHARED_GPU
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
    cores = needed_resources(config, gpus=0).cores
    with _connected(config.cluster, run_dir, cores=cores, keep=config.scoring.reward_env):
        cuda = _use_cuda(config.learner)
        gpus = usable_gpus(cuda)
        sync_backend(config, gpus)  # refuses here what cannot work
        _check_resources(needed_resources(config, gpus=gpus))
        yield cuda


@contextmanager
def learner_session(learner: LearnerSettings, cluster: ClusterSettings, run_dir: Path) -> Iterator[bool]:
    """The same for a job of learner ranks alone."""
    cores = learner.ranks * learner.cores
    with _connected(cluster, run_dir, cores=cores):
        cuda = _use_cuda(learner)
        _check_resources(Resources(cores, learner.ranks if cuda else 0))
        yield cuda


@contextmanager
def _connected(
    settings: ClusterSettings, run_dir: Path, *, cores: float, keep: Sequence[str] = ()
) -> Iterator[None]:
    """Ray, the cluster's or a private one that promises so many cores; actors see the secrets in `keep`."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = settings.address
    if address:
        if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
            raise PlacementError(
                f"RAY_AUTH_MODE = {os.environ['RAY_AUTH_MODE']}: whoever reaches such a cluster can run "
                "programs on it. Start it, and this job, with RAY_AUTH_MODE=token (docs/cluster.md)"
            )
        ray.init(address=address, namespace="headrace", log_to_driver=False, logging_level=logging.ERROR)
        wait_for_hosts(settings, cores)
    else:
        _start_private_ray(settings, cores, keep)
    try:
        _link_logs(run_dir)
        yield
    finally:
        ray.shutdown()


def _start_private_ray(settings: ClusterSettings, cores: float, keep: Sequence[str]) -> None:
    """A Ray of this job's own, which nobody on another machine, or of another user, can reach."""
    base = Path(get_default_ray_temp_dir()).parent
    with _loopback_only(), _private_files(), _without_secrets(keep):
        ray.init(
            address="local",
            # A private Ray may promise more cores than there are: the actors then share them.
            num_cpus=max(os.cpu_count() or 1, math.ceil(cores)),
            object_store_memory=int(settings.object_store_gib * _GIB),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="headrace",
            _temp_dir=str(private_folder(base) / "ray"),
        )


def private_folder(base: Path) -> Path:
    """A folder in `base` that only this user can enter, for Ray's sockets and logs.

    Ray makes its own folders such that everybody can write there: anyone on the machine could put a link in a
    log's place, and Ray, as root perhaps, would write to where it leads.
    """
    folder = base / f"headrace-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    known = folder.lstat()
    if not stat.S_ISDIR(known.st_mode) or known.st_uid != os.getuid():
        raise PlacementError(
            f"{folder}: is no folder of this user's, where Ray's sockets and logs are to lie; remove it, or "
            "set RAY_TMPDIR to a folder of your own"
        )
    folder.chmod(0o700)
    return folder


def _session_folder() -> Path | None:
    """Where the running Ray has its sockets and logs."""
    if not ray.is_initialized():
        return None
    return Path(ray._private.worker._global_node.get_session_dir_path())


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Within it Ray starts on 127.0.0.1, as it does on systems where it knows no clusters.

    Its own parameter for that, `_node_ip_address`, replaces a loopback address by a reachable one.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _without_secrets(keep: Sequence[str]) -> Iterator[None]:
    """Within it the environment has no secrets, so that processes which start inherit none.

    Ray's own variables stay: its processes know each other by a token. Those in `keep` do too.
    """
    hidden = {name: os.environ[name] for name in secret_variables(keep) if not name.startswith("RAY_")}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _private_files() -> Iterator[None]:
    """Within it new files are this user's alone, Ray's token too, which Ray leaves readable for all."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if token.is_file() and token.stat().st_uid == os.getuid() and token.stat().st_mode & 0o077:
        token.chmod(0o600)
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


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
        max_new_tokens=config.rollout.max_new_tokens,
        online_dpo=config.online_dpo if config.objective == ONLINE_DPO else None,
    )


def role_resource(role: str) -> dict[str, float]:
    """A sliver of the role's own resource, where the cluster's hosts are told apart by one."""
    name = f"headrace_{role}"
    return {name: _SLIVER} if ray.cluster_resources().get(name, 0) else {}


def usable_gpus(cuda: bool) -> float:
    """GPUs of the cluster that the job may use."""
    return float(ray.cluster_resources().get("GPU", 0)) if cuda else 0.0


def _use_cuda(learner: LearnerSettings) -> bool:
    available = ray.cluster_resources().get("GPU", 0) > 0
    if learner.device == "cuda" and not available:
        raise PlacementError(
            'learner.device = "cuda", but Ray sees no GPU; set it to "cpu" or "auto", or add GPU hosts'
        )
    return available and learner.device != "cpu"


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
    if link.is_dir() and not link.is_symlink():
        return  # the folder was copied with what the link led to: nothing that is there is deleted
    link.unlink(missing_ok=True)
    session = _session_folder()
    if session is not None:
        link.symlink_to(session / "logs")

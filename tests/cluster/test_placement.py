"""Who shares a GPU, what a job asks Ray for, and the seeds of its engines. No Ray is started."""

from pathlib import Path
from typing import Any

import pytest

from cluster.config import JobConfig
from cluster.config_file import parse_config
from cluster.joining import PlacementError
from cluster.placement import colocated, needed_resources, private_folder, sampler_seed, sync_backend

GOOD = """
[model.scratch]
[task]
kind = "reversal"
[[reward]]
kind = "task"
"""


def job(*overrides: str) -> JobConfig:
    return parse_config(GOOD, ["learner.cores=1", "rollout.cores=0.5", "scoring.cores=0.25", *overrides])


@pytest.mark.parametrize(
    ("overrides", "gpus", "shared"),
    [
        ([], 1, True),
        ([], 2, False),
        ([], 0, False),
        (["sync.backend=ipc"], 1, True),
        (["sync.backend=ipc"], 8, True),
        (["sync.backend=ipc"], 0, False),
        (["sync.backend=ipc", "learner.ranks=2"], 8, False),
        (["sync.backend=ipc", "rollout.actors=2"], 8, False),
        (["sync.backend=ipc", "rollout.tensor_parallel=2"], 8, False),
        (["rollout.actors=2"], 1, False),
        (["sync.backend=shared"], 1, False),
        (["sync.backend=nccl"], 1, False),
    ],
)
def test_who_shares_a_gpu(overrides: list[str], gpus: float, shared: bool) -> None:
    assert colocated(job(*overrides), gpus) is shared


@pytest.mark.parametrize(
    ("overrides", "gpus", "cores", "asked"),
    [
        ([], 0, 1.75, 0),
        ([], 1, 1.75, 0.9),  # 2 × 0.45
        (["scoring.gpus=0.1"], 1, 1.75, 1.0),
        ([], 4, 1.75, 2),
        (["sync.backend=ipc"], 4, 1.75, 0.9),
        # 2 ranks, 3 engines of 2 GPUs and 2 scorers of half a GPU: 2 + 6 + 1; cores 2·1 + 3·0.5 + 2·0.25.
        (
            [
                "learner.ranks=2",
                "rollout.actors=3",
                "rollout.tensor_parallel=2",
                "scoring.actors=2",
                "scoring.gpus=0.5",
            ],
            16,
            4.0,
            9,
        ),
    ],
)
def test_what_a_job_asks_for(overrides: list[str], gpus: float, cores: float, asked: float) -> None:
    needed = needed_resources(job(*overrides), gpus=gpus)
    assert (needed.cores, needed.gpus) == (pytest.approx(cores), pytest.approx(asked))


@pytest.mark.parametrize(
    ("overrides", "gpus", "backend"),
    [
        ([], 0, "shared"),
        ([], 1, "ipc"),
        ([], 2, "nccl"),
        (["sync.backend=shared"], 2, "shared"),
        (["sync.backend=ipc"], 2, "ipc"),
    ],
)
def test_the_backend_follows_from_the_placement(overrides: list[str], gpus: float, backend: str) -> None:
    assert sync_backend(job(*overrides), gpus) == backend


@pytest.mark.parametrize(
    ("overrides", "gpus", "said"),
    [
        (
            ["sync.backend=ipc", "rollout.actors=2"],
            4,
            'sync.backend = "ipc".*rollout.actors = 2.*4 GPUs.*"auto"',
        ),
        (["sync.backend=ipc"], 0, 'sync.backend = "ipc".*0 GPUs.*give it a GPU'),
        (["sync.backend=nccl"], 0, 'sync.backend = "nccl" needs CUDA.*use "shared" or "auto"'),
    ],
)
def test_a_backend_that_cannot_work_is_refused(overrides: list[str], gpus: float, said: Any) -> None:
    with pytest.raises(PlacementError, match=said):
        sync_backend(job(*overrides), gpus)


def test_engines_have_seeds_of_their_own() -> None:
    """With `seed + actor` the second actor of seed 0 would draw what the first of seed 1 draws."""
    seeds = {sampler_seed(seed, actor, step) for seed in range(5) for actor in range(5) for step in range(5)}
    assert len(seeds) == 5**3
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert sampler_seed(3, 1, 20) == sampler_seed(3, 1, 20)


def test_the_folder_of_rays_sockets_and_logs_is_this_users_alone(tmp_path: Path) -> None:
    folder = private_folder(tmp_path)
    folder.chmod(0o777)
    assert private_folder(tmp_path).stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to("elsewhere")
    with pytest.raises(PlacementError, match=r"is no folder of this user's.*RAY_TMPDIR"):
        private_folder(tmp_path)

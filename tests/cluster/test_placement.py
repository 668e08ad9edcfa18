"""Who shares a GPU, what a job asks Ray for, and the seeds of its engines. No Ray is started."""

from typing import Any

import pytest

from cluster import placement
from cluster.config import ClusterSettings, JobConfig
from cluster.config_file import parse_config
from cluster.placement import PlacementError, colocated, needed_resources, sampler_seed, sync_backend

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


def _cluster(monkeypatch: pytest.MonkeyPatch, hosts: list[int], cores: float) -> list[int]:
    """A cluster that has so many hosts, of so many cores, at each look; gives what each look saw."""
    seen: list[int] = []

    def nodes() -> list[dict[str, bool]]:
        seen.append(hosts[min(len(seen), len(hosts) - 1)])
        return [{"Alive": True}] * seen[-1] + [{"Alive": False}]

    monkeypatch.setattr(placement, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(placement.ray, "nodes", nodes)
    monkeypatch.setattr(placement.ray, "cluster_resources", lambda: {"CPU": cores * seen[-1]})
    return seen


@pytest.mark.parametrize(
    ("cores", "hosts", "looks"), [(3.65, 1, [1, 1, 2]), (0.5, 3, [1, 1, 2, 3]), (2.0, 1, [1])]
)
def test_hosts_that_join_after_the_head_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cores: float,
    hosts: int,
    looks: list[int],
) -> None:
    """For their cores, or because so many are asked for; it goes on at once when they are there."""
    seen = _cluster(monkeypatch, [1, 1, 2, 3], cores=2.0)
    placement.wait_for_hosts(ClusterSettings(address="auto", hosts=hosts, start_timeout_s=60), cores)
    assert seen == looks
    words = f"asks for {cores:g} CPUs and cluster.hosts = {hosts}, the cluster has 2 CPUs on 1 host(s) so far"
    assert capsys.readouterr().out.count(words) == (len(looks) > 1)


def test_hosts_that_never_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, [2], cores=2.0)
    with pytest.raises(PlacementError, match=r"cluster.hosts = 3, but the cluster has 2 host.*lower it"):
        placement.wait_for_hosts(ClusterSettings(address="auto", hosts=3, start_timeout_s=0.01), 1)
    # Of cores alone, who asked is told by what follows.
    placement.wait_for_hosts(ClusterSettings(address="auto", start_timeout_s=0.01), 100)

"""Hosts that join after a job has begun to look: how many are waited for, and what is said. No Ray."""

import json
from pathlib import Path

import pytest

from cluster import joining
from cluster.config import ClusterSettings
from cluster.joining import PlacementError, promised_hosts, roles_without_host, wait_for_hosts


@pytest.fixture(autouse=True)
def _no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "BOOTSTRAP", tmp_path / "bootstrap")


def cluster(monkeypatch: pytest.MonkeyPatch, hosts: list[int], cores: float) -> list[int]:
    """A cluster that has so many hosts, of so many cores, at each look; gives what each look saw."""
    seen: list[int] = []

    def nodes() -> list[dict[str, bool]]:
        seen.append(hosts[min(len(seen), len(hosts) - 1)])
        return [{"Alive": True}] * seen[-1] + [{"Alive": False}]

    monkeypatch.setattr(joining, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(joining.ray, "nodes", nodes)
    monkeypatch.setattr(joining.ray, "cluster_resources", lambda: {"CPU": cores * seen[-1]})
    return seen


def promise(*least: int) -> None:
    kinds = {f"kind-{number}": {"min_workers": count} for number, count in enumerate(least)} | {"head": {}}
    joining.BOOTSTRAP.write_text(json.dumps({"available_node_types": kinds}))


@pytest.mark.parametrize(
    ("cores", "hosts", "looks"), [(3.65, 1, [1, 1, 2]), (0.5, 3, [1, 1, 2, 3]), (2.0, 1, [1])]
)
def test_hosts_are_waited_for_by_number_and_by_cores(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cores: float,
    hosts: int,
    looks: list[int],
) -> None:
    """It goes on at once when they are there."""
    seen = cluster(monkeypatch, [1, 1, 2, 3], cores=2.0)
    wait_for_hosts(ClusterSettings(address="auto", hosts=hosts, start_timeout_s=60), cores)
    assert seen == looks
    words = f"waiting for hosts: 1 of {hosts} with 2 CPUs so far; the job asks for {cores:g} CPUs"
    assert capsys.readouterr().out.count(words) == (len(looks) > 1)


def test_what_ray_up_promised_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the head alone has cores enough: other hosts have the roles."""
    promise(1, 1)
    seen = cluster(monkeypatch, [1, 2, 3], cores=64.0)
    wait_for_hosts(ClusterSettings(address="auto"), 1)
    assert seen == [1, 2, 3]


def test_hosts_that_never_come_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster(monkeypatch, [2], cores=2.0)
    with pytest.raises(PlacementError, match=r"cluster.hosts = 3: the cluster has 2 of 3 hosts .*lower it"):
        wait_for_hosts(ClusterSettings(address="auto", hosts=3, start_timeout_s=0.01), 1)
    capsys.readouterr()
    promise(2)
    wait_for_hosts(ClusterSettings(address="auto", start_timeout_s=0.01), 1)
    assert "warning: the cluster has 2 of 3 hosts" in capsys.readouterr().out


def test_cores_that_never_come_are_left_to_who_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, [2], cores=2.0)
    wait_for_hosts(ClusterSettings(address="auto", start_timeout_s=0.01), 100)


@pytest.mark.parametrize("text", ["{", "[]", '{"available_node_types": 3}', "{}"])
def test_a_file_that_says_nothing_promises_the_head_alone(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert promised_hosts(joining.BOOTSTRAP) == 1
    joining.BOOTSTRAP.write_text(text)
    assert promised_hosts(joining.BOOTSTRAP) == 1
    assert "cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("resources", "without"),
    [
        ({"CPU": 4.0}, []),
        ({"headrace_learner": 1.0, "headrace_rollout": 2.0}, ["scoring"]),
        ({"headrace_learner": 1.0, "headrace_rollout": 2.0, "headrace_scoring": 1.0}, []),
    ],
)
def test_roles_without_a_host_are_told(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], without: list[str]
) -> None:
    monkeypatch.setattr(joining.ray, "cluster_resources", lambda: resources)
    assert roles_without_host() == without

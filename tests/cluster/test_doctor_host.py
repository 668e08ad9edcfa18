"""Doctor's checks of one host: what is wrong, how bad it is, and that a remedy stands beside it."""

from typing import Any

import pytest
from doctor_helpers import facts, needs, token

from cluster.doctor_host import (
    cores_check,
    environment_check,
    folder_check,
    gpu_check,
    host_checks,
    listeners_check,
    loopback_check,
    memory_check,
    peers_check,
    shared_memory_check,
    token_check,
)
from cluster.doctor_needs import GIB, needed_memory
from cluster.doctor_records import Check, Folder, Gpu, Listener


def test_a_healthy_host_has_nothing_but_ok() -> None:
    folder = Folder("/runs/x", "/runs", writable=True, free_bytes=9 * GIB)
    healthy = facts(folders=(folder,))
    for cluster in (False, True):
        checks = list(host_checks("h", healthy, needs(), cluster=cluster))
        assert {one.status for one in checks} == {"ok"}
        assert {one.host for one in checks} == {"h"}
        assert len({one.name for one in checks}) == len(checks)


def test_a_finding_cannot_be_without_a_remedy() -> None:
    with pytest.raises(AssertionError, match="remedy"):
        Check("memory", "h", "fail", "too small")


# Models 1 + 2 + 0.5, weights 0.25, object store 0.5, four processes of 1: 8.25 GiB; with models on GPUs 4.75.
@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "ok"),
        ({"memory_available": int(8.3 * GIB)}, "ok"),
        ({"memory_available": int(8.2 * GIB)}, "warn"),
        ({"memory_total": int(8.6 * GIB)}, "fail"),  # Ray ends workers at 95 %: 8.17
        ({"memory_limit": int(8.6 * GIB)}, "fail"),
        ({"memory_limit": int(8.8 * GIB)}, "ok"),  # 95 % are 8.36
        ({"memory_total": 200 * GIB}, "warn"),  # less than a tenth of it is free
    ],
)
def test_memory_of_one_machine(changes: dict[str, Any], status: str) -> None:
    assert needed_memory(needs(), on_gpu=False) == 8.25
    assert needed_memory(needs(), on_gpu=True) == 4.75
    check = memory_check("h", facts(**changes), needs(), cluster=False)
    assert check.status == status, check
    assert "8.2 GiB" in check.found


def test_memory_without_the_models_size_is_not_judged() -> None:
    check = memory_check("h", facts(), needs(memory=None), cluster=False)
    assert (check.status, check.remedy) == ("skipped", "")


def test_weights_on_gpus_are_not_the_hosts_memory() -> None:
    packages = {"torch": "2.13.0+cu130", "vllm": "0.32.0"}
    small = {"memory_total": 6 * GIB, "memory_available": 5 * GIB, "packages": packages}
    gpu = (Gpu("H200", 141_000),)
    assert memory_check("h", facts(**small, gpus=gpu), needs(), cluster=False).status == "ok"
    assert memory_check("h", facts(**small), needs(), cluster=False).status == "fail"


def test_shared_memory() -> None:
    # Old and new weights, 2 · 0.25, and for a private Ray its object store, 0.5.
    for free, cluster, status in (
        (1.01, False, "ok"),
        (0.99, False, "fail"),
        (0.51, True, "ok"),
        (0.49, True, "fail"),
    ):
        check = shared_memory_check("h", facts(shm_free=int(free * GIB)), needs(), cluster=cluster)
        assert check.status == status, (free, cluster)
    assert shared_memory_check("h", facts(shm_free=64 * 2**20), None, cluster=False).status == "fail"


def test_cores() -> None:
    assert cores_check("h", facts(cores=2.0), 2.0).status == "ok"
    assert cores_check("h", facts(cores=1.5), 2.0).status == "warn"


@pytest.mark.parametrize(
    ("changes", "device", "status", "says"),
    [
        ({}, "auto", "ok", "none"),
        ({}, "cuda", "warn", 'learner.device = "cuda"'),
        ({"gpu_problem": "nvidia-smi failed"}, "auto", "fail", "nvidia-smi failed"),
        ({"gpus": (Gpu("A", 24576),)}, "auto", "warn", "A (24 GiB), but torch is a CPU build"),
        ({"gpus": (Gpu("A", 24576),)}, "cuda", "fail", "torch is a CPU build"),
        ({"gpus": (Gpu("A", 24576),), "packages": {"torch": "2.13.0"}}, "cuda", "ok", "A (24 GiB)"),
    ],
)
def test_gpus(changes: dict[str, Any], device: str, status: str, says: str) -> None:
    check = gpu_check("h", facts(**changes), needs(device=device))
    assert check.status == status
    assert says in check.found


# Three checkpoints of 0.5 GiB.
@pytest.mark.parametrize(
    ("path", "writable", "free_gib", "status"),
    [
        ("/runs/x", True, 1.6, "ok"),
        ("/runs/x", True, 1.4, "fail"),
        ("/runs/x", False, 99.0, "fail"),
        ("/tmp", True, 1.1, "ok"),
        ("/tmp", True, 0.9, "warn"),
    ],
)
def test_folders(path: str, writable: bool, free_gib: float, status: str) -> None:
    folder = Folder(path, "/", writable=writable, free_bytes=int(free_gib * GIB))
    assert folder_check("h", path, facts(folders=(folder,)), needs()).status == status


def test_network() -> None:
    assert loopback_check("h", facts(loopback_problem="no route")).status == "fail"
    silent = facts(unreachable={"10.0.0.2:1234": "timed out"})
    check = peers_check("h", silent)
    assert check.status == "fail"
    assert "10.0.0.2:1234 (timed out)" in check.found


@pytest.mark.parametrize(
    ("changes", "cluster", "status", "says"),
    [
        ({}, True, "ok", "mode 0600"),
        ({"mode": "disabled"}, False, "fail", "RAY_AUTH_MODE=disabled"),
        ({"mode": ""}, True, "fail", "RAY_AUTH_MODE is not set"),
        ({"mode": ""}, False, "ok", "mode 0600"),
        ({"in_environment": True}, True, "warn", "RAY_AUTH_TOKEN"),
        ({"problem": "does not exist"}, True, "fail", "does not exist"),
        ({"problem": "does not exist"}, False, "ok", "a private Ray makes one"),
        ({"problem": "is empty"}, True, "fail", "is empty"),
        ({"permissions": 0o640}, True, "fail", "mode 0640"),
        ({"permissions": 0o604}, False, "warn", "mode 0604"),
        ({"permissions": 0o400}, True, "ok", "mode 0400"),
    ],
)
def test_the_token(changes: dict[str, Any], cluster: bool, status: str, says: str) -> None:
    check = token_check("h", facts(token=token(**changes)), cluster=cluster)
    assert check.status == status
    assert says in check.found


def test_ports_that_ask_for_no_token() -> None:
    guarded = Listener("gcs_server", "::", 6379, "token")
    bare = Listener("raylet", "0.0.0.0", 40000, "")
    disabled = Listener("raylet", "0.0.0.0", 40001, "disabled")
    assert listeners_check("h", facts()).status == "ok"
    assert listeners_check("h", facts(listeners=(guarded,))).found == (
        "1 reachable from other machines, all with a token"
    )
    for one in (bare, disabled):
        check = listeners_check("h", facts(listeners=(guarded, one)))
        assert check.status == "fail"
        assert f"raylet on 0.0.0.0:{one.port}" in check.found
        assert "gcs_server" not in check.found
    assert listeners_check("h", facts(listeners=(guarded,), hidden_processes=2)).status == "warn"


@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({"VLLM_SERVER_DEV_MODE": "1"}, "fail"),
        ({"VLLM_SERVER_DEV_MODE": "0"}, "ok"),
        ({"VLLM_ALLOW_INSECURE_SERIALIZATION": "true"}, "fail"),
        ({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "yes"}, "fail"),
        ({"VLLM_PLUGINS": "other"}, "fail"),
        ({"VLLM_PLUGINS": "other,headrace_weight_transfer"}, "ok"),
        ({"RAY_AUTH_MODE": "token"}, "ok"),
    ],
)
def test_environment(variables: dict[str, str], status: str) -> None:
    check = environment_check("h", facts(environment=variables))
    assert check.status == status
    if status == "fail":
        assert next(iter(variables)) in check.found + check.remedy

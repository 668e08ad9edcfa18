"""Doctor on a cluster: judgements by hand-made facts, facts by value, and a real Ray."""

import json
import os
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doctor_helpers import facts, needs

from cluster.config import JobConfig
from cluster.config_file import parse_config
from cluster.doctor_cluster import (
    Node,
    Skew,
    Survey,
    alive_nodes,
    check_address,
    clock_check,
    input_check,
    inputs_for,
    peers_of,
    skew,
    spread_check,
    total_checks,
)
from cluster.doctor_needs import GIB

JOB = """
[model.scratch]
[task]
kind = "reversal"
[[reward]]
kind = "task"
[rollout]
actors = 4
max_new_tokens = 12
cores = 1
[learner]
ranks = 3
"""


def job(*overrides: str) -> JobConfig:
    return parse_config(JOB, overrides)


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A host as ray.nodes() tells of it."""
    host = {
        "NodeID": f"{number:040x}",
        "Alive": True,
        "NodeManagerHostname": f"host-{number}",
        "NodeManagerAddress": f"10.0.0.{number}",
        "NodeManagerPort": 1000 + number,
        "ObjectManagerPort": 2000 + number,
        "Resources": {"CPU": 4.0, "node:10.0.0.1": 1.0},
    }
    return host | changes


def node(number: int, *roles: str) -> Node:
    (one,) = alive_nodes([row(number, Resources=dict.fromkeys(roles, 1.0))])
    return one


@pytest.mark.parametrize("address", ["", "head", "head:", ":6379", "head:http", "ray://head:10001"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match=r"--address .*: give host:port"):
        check_address(address)


def test_hosts_have_names_of_their_own() -> None:
    twins = [row(2, NodeManagerHostname="a", NodeManagerAddress="10.0.0.9") for _ in range(2)]
    nodes = alive_nodes([row(1), *twins, row(3, Alive=False)])
    assert [one.label for one in nodes[2:]] == ["host-1 (10.0.0.1)"]
    assert all(one.label.startswith("a (10.0.0.9) 0000") for one in nodes[:2])
    first, second = node(1), node(2)
    assert peers_of(first, [first, second]) == [("10.0.0.2", 1002), ("10.0.0.2", 2002)]
    assert peers_of(first, [first]) == []


def test_clocks() -> None:
    # Asked at 100, answered at 102: the middle is 101, and it may have been any time between.
    assert skew(100.0, 104.5, 102.0) == Skew(3.5, 1.0)
    assert clock_check("h", Skew(3.5, 1.0)).status == "warn"
    assert clock_check("h", Skew(-3.5, 1.0)).status == "warn"
    assert clock_check("h", Skew(1.9, 1.0)).status == "ok"  # it may be as little as 0.9
    assert clock_check("h", None).status == "skipped"


def test_files_must_be_on_the_hosts_that_read_them_and_models_are_brought() -> None:
    job_needs = needs(inputs=("/m", "/grade.py"))
    scoring, rollout, plain = node(1, "headrace_scoring"), node(2, "headrace_rollout"), node(3)
    assert inputs_for(rollout, [scoring, rollout], job_needs) == ["/m"]
    assert inputs_for(scoring, [scoring, rollout], job_needs) == ["/m", "/grade.py"]
    assert inputs_for(plain, [plain], job_needs) == ["/m", "/grade.py"]
    driver = facts(inputs={"/m": "1", "/grade.py": "1"})
    for there, file_status in (("1", "ok"), ("2", "fail"), ("", "fail")):
        host = facts(inputs={"/m": there, "/grade.py": there})
        assert input_check("h", "/grade.py", host, driver).status == file_status
        folder = input_check("h", "/m", host, driver)
        assert folder.status == "ok"
        assert ("the start brings it there" in folder.found) == (there != "1")
    gone = facts(inputs={})
    assert input_check("h", "/m", gone, gone).status == "fail"  # nobody could send it


def test_ranks_that_want_hosts_of_their_own() -> None:
    nodes = [node(1, "headrace_learner"), node(2, "headrace_learner"), node(3)]
    strict = "learner.placement=strict_spread"
    assert spread_check(job(strict), nodes).status == "fail"  # 3 ranks, 2 hosts for them
    assert spread_check(job("learner.placement=spread"), nodes).status == "ok"
    assert spread_check(job(strict), [node(n) for n in (1, 2, 3)]).status == "ok"


def test_the_cluster_as_a_whole() -> None:
    def statuses(config: JobConfig, memory_gib: float, **resources: float) -> dict[str, str]:
        hosts = {str(n): facts(memory_total=int(memory_gib * GIB)) for n in range(3)}
        survey = Survey(tuple(node(n) for n in range(3)), hosts, {}, {}, resources)
        return {one.name: one.status for one in total_checks(config, needs(), survey)}

    # 3 ranks of 1 core, 4 actors of 1, 1 scoring actor of 0.25: 7.25 cores. Memory 8.25 GiB, as in needs().
    assert set(statuses(job(), 2.8, CPU=8).values()) == {"ok"}
    assert statuses(job(), 2.8, CPU=7)["cores"] == "fail"
    assert statuses(job(), 2.7, CPU=8)["memory"] == "fail"
    assert statuses(job("learner.device=cuda"), 2.8, CPU=8)["learner.device"] == "fail"
    # 3 ranks and 4 actors want a GPU each.
    assert statuses(job(), 2.8, CPU=8, GPU=6)["GPUs"] == "fail"
    assert statuses(job("learner.device=cpu"), 2.8, CPU=8, GPU=6)["GPUs"] == "ok"


# A Python that sees the installed packages, but not headrace: -S leaves out .pth files, -I the folder.
_ELSEWHERE = """
import sys, importlib.util
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("cluster") is None, "headrace must not be importable here"
from ray import cloudpickle
gather, clock = cloudpickle.loads(sys.stdin.buffer.read())
import json
print(json.dumps(gather(["/tmp"], ["/nowhere"], [])), clock())
"""


def test_facts_can_be_gathered_where_headrace_is_not_installed() -> None:
    from ray import cloudpickle

    from cluster import doctor_facts, doctor_sockets

    for module in (doctor_facts, doctor_sockets):
        cloudpickle.register_pickle_by_value(module)
    try:
        sent = cloudpickle.dumps((doctor_facts.gather, doctor_facts.clock))
    finally:
        for module in (doctor_facts, doctor_sockets):
            cloudpickle.unregister_pickle_by_value(module)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _ELSEWHERE, sysconfig.get_path("purelib")],
        input=sent, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert b'"/nowhere": ""' in done.stdout


# ---- a real Ray -------------------------------------------------------------------------------------------

_RAY = """
import sys, ray
context = ray.init(address="local", _node_ip_address="127.0.0.1", num_cpus=2, include_dashboard=False,
                   object_store_memory=100 * 2**20, log_to_driver=False)
print("ADDRESS", context.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def cluster_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A home of its own with a token in it."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    token = home / ".ray" / "auth_token"
    token.write_text("canary" + "5" * 58)
    token.chmod(0o600)
    dropped = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def address(cluster_environment: dict[str, str]) -> Iterator[str]:
    ray = subprocess.Popen(
        [sys.executable, "-c", _RAY],
        env=cluster_environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert ray.stdout is not None
        lines = iter(ray.stdout.readline, "")
        yield next(line.split()[1] for line in lines if line.startswith("ADDRESS"))
    finally:
        ray.communicate(timeout=30)


def doctor(environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "doctor", *arguments],
        env=environment, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert "canary" not in done.stdout + done.stderr
    return done.returncode, done.stdout


@pytest.mark.integration
def test_every_host_of_a_running_cluster(
    address: str, cluster_environment: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "job.toml"
    config.write_text(JOB)
    status, text = doctor(cluster_environment, str(config), "--address", address, "--json", "--timeout", "60")
    checks = {(one["host"], one["name"]): one for one in json.loads(text)}
    hosts = {host for host, _ in checks} - {"job"}
    assert len(hosts) == 1
    (host,) = hosts
    assert host.startswith(f"{socket.gethostname()} (")
    assert checks["job", "Ray cluster"]["status"] == "ok"
    assert checks[host, "packages as the driver's"]["status"] == "ok"
    assert checks[host, "clock"]["status"] == "ok"
    assert checks[host, "Ray token"]["status"] == "ok"
    # 3 learner ranks, 4 actors and 1 scoring actor ask for 7.25 cores; Ray was given 2.
    assert checks["job", "cores"]["status"] == "fail"
    assert status == 1


@pytest.mark.integration
def test_without_the_token_the_cluster_does_not_answer(
    address: str, cluster_environment: dict[str, str], tmp_path: Path
) -> None:
    other = tmp_path / ".ray"
    other.mkdir()
    (other / "auth_token").write_text("another-canary" + "6" * 50)
    (other / "auth_token").chmod(0o600)
    status, text = doctor(cluster_environment | {"HOME": str(tmp_path)}, "--address", address, "--json")
    checks = json.loads(text)
    assert status == 1
    assert checks[0]["name"] == "Ray cluster"
    assert checks[0]["status"] == "fail"

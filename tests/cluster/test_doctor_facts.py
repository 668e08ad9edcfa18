"""What doctor sees of a host: real files, processes and sockets, and control groups of both versions."""

import http.server
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.doctor_facts import (
    fingerprint,
    folder_facts,
    gather,
    installed_packages,
    memory_limit,
    ray_token,
    unreachable,
    usable_cores,
)
from cluster.doctor_records import HostFacts
from cluster.doctor_sockets import gives_pages, ray_listeners

# Titled like one of Ray's processes; listens on every interface and on loopback.
_SERVER = """
import socket, sys
wide, narrow = socket.create_server(("0.0.0.0", 0)), socket.create_server(("127.0.0.1", 0))
print(wide.getsockname()[1], narrow.getsockname()[1], flush=True)
sys.stdin.read()
"""


def test_facts_of_this_machine_travel_as_plain_values(tmp_path: Path) -> None:
    plain = gather([str(tmp_path / "new" / "run")], [str(tmp_path)], [])
    facts = HostFacts.of(json.loads(json.dumps(plain)))
    assert facts.python == sys.version.split()[0]
    assert facts.packages["ray"] == installed_packages()["ray"]
    assert 0 < facts.memory_available <= facts.memory_total
    assert 0 < facts.cores <= len(os.sched_getaffinity(0))
    assert facts.loopback_problem == ""
    (folder,) = facts.folders
    assert (folder.existing, folder.writable) == (str(tmp_path), True)
    assert not (tmp_path / "new").exists()


# ---- control groups ----------------------------------------------------------------------------------------


def files(root: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def test_limits_of_version_2_hold_on_every_level(tmp_path: Path) -> None:
    proc, mount = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text("0::/slice/job\n")
    files(
        mount,
        {"slice/memory.max": "4000", "slice/job/memory.max": "max", "slice/job/cpu.max": "50000 100000"},
    )
    assert memory_limit(str(proc), str(mount)) == 4000
    assert usable_cores(str(proc), str(mount)) == 0.5
    files(mount, {"slice/job/memory.max": "3000", "slice/job/cpu.max": "max 100000"})
    assert memory_limit(str(proc), str(mount)) == 3000
    assert usable_cores(str(proc), str(mount)) == len(os.sched_getaffinity(0))


def test_limits_of_version_1(tmp_path: Path) -> None:
    proc, mount = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text("4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n")
    files(
        mount,
        {
            "memory/memory.limit_in_bytes": str(2**63 - 4096),  # how it writes "none"
            "memory/job/memory.limit_in_bytes": "5000",
            "cpu,cpuacct/job/cpu.cfs_quota_us": "25000",
            "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
        },
    )
    assert memory_limit(str(proc), str(mount)) == 5000
    assert usable_cores(str(proc), str(mount)) == 0.25
    files(
        mount,
        {"memory/job/memory.limit_in_bytes": str(2**63 - 4096), "cpu,cpuacct/job/cpu.cfs_quota_us": "-1"},
    )
    assert memory_limit(str(proc), str(mount)) is None
    assert usable_cores(str(proc), str(mount)) == len(os.sched_getaffinity(0))


# ---- ports -------------------------------------------------------------------------------------------------


@pytest.fixture
def ray_like(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """A process that Ray's could be: its port on all interfaces, and the one on loopback."""
    environment = {
        name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"
    } | request.param
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, "raylet"],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        wide, narrow = map(int, server.stdout.readline().split())
        yield wide, narrow
    finally:
        server.communicate(timeout=10)


@pytest.mark.parametrize(
    ("ray_like", "auth"),
    [({"RAY_AUTH_MODE": "token"}, "token"), ({"RAY_AUTH_MODE": "Disabled"}, "disabled"), ({}, "")],
    indirect=["ray_like"],
)
def test_ports_that_others_can_reach(
    ray_like: tuple[int, int], auth: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    listeners, _ = ray_listeners()
    found = {one["port"]: one for one in listeners}
    wide, narrow = ray_like
    assert narrow not in found
    assert found[wide]["address"] == "0.0.0.0"
    # Where the process says nothing its parents are asked: were the tests started with the variable?
    inherited = b"RAY_AUTH_MODE=" in Path("/proc/self/environ").read_bytes()
    assert found[wide]["auth"] == auth or (auth == "" and inherited)


class _Pages(http.server.BaseHTTPRequestHandler):
    """Refuses with 401, but gives its metrics to anyone if it is told to."""

    open_to_all = False

    def do_GET(self) -> None:
        self.send_response(200 if self.open_to_all and self.path == "/metrics" else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.parametrize("open_to_all", [True, False])
def test_a_port_that_gives_pages_to_anyone_is_found(
    open_to_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Pages, "open_to_all", open_to_all)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert gives_pages("0.0.0.0", server.server_address[1]) == open_to_all
        server.shutdown()


def test_a_port_that_speaks_something_else_gives_no_pages(unused_port: int) -> None:
    assert not gives_pages("127.0.0.1", unused_port)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, and never says anything
        assert not gives_pages("127.0.0.1", mute.getsockname()[1])


def test_addresses_as_the_kernel_writes_them(tmp_path: Path) -> None:
    """127.0.0.1 is 7F000001, of which a little-endian word shows 0100007F; ::1 ends in such a word of 1."""
    line = " 0: {}:1F90 00000000:0000 {} 0:0 0:0 0 0 0 {} 1"
    rows = {
        "tcp": [("0100007F", "0A", 1), ("00000000", "0A", 2), ("0300020A", "0A", 3), ("00000000", "01", 4)],
        "tcp6": [
            ("00000000000000000000000001000000", "0A", 5),
            ("00000000000000000000000000000000", "0A", 6),
            ("0000000000000000FFFF00000100007F", "0A", 7),  # ::ffff:127.0.0.1
        ],
    }
    (tmp_path / "net").mkdir()
    for name, entries in rows.items():
        text = ["header", *(line.format(*entry) for entry in entries)]
        (tmp_path / "net" / name).write_text("\n".join(text) + "\n")
    process = tmp_path / "17"
    (process / "fd").mkdir(parents=True)
    (process / "cmdline").write_bytes(b"/x/gcs_server\0--port=1\0")
    (process / "status").write_text("Name:\tx\nPPid:\t16\n")
    (process / "environ").write_bytes(b"A=1\0")
    for inode in range(1, 8):
        (process / "fd" / str(inode)).symlink_to(f"socket:[{inode}]")
    parent = tmp_path / "16"
    parent.mkdir()
    (parent / "cmdline").write_bytes(b"ray\0start\0")
    (parent / "status").write_text("PPid:\t1\n")
    (parent / "environ").write_bytes(b"RAY_AUTH_MODE=token\0")
    listeners, hidden = ray_listeners(str(tmp_path))
    assert hidden == 0
    assert [(one["process"], one["address"], one["port"], one["auth"]) for one in listeners] == [
        ("gcs_server", address, 8080, "token") for address in ("0.0.0.0", "10.2.0.3", "::")
    ]


def test_a_peer_that_does_not_answer_is_named(unused_port: int) -> None:
    answer = unreachable([("127.0.0.1", unused_port)])
    assert list(answer) == [f"127.0.0.1:{unused_port}"]
    assert "refused" in answer[f"127.0.0.1:{unused_port}"]
    assert unreachable([]) == {}


@pytest.fixture
def unused_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# ---- token and files ---------------------------------------------------------------------------------------


def test_the_token_is_described_and_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.setenv("RAY_AUTH_MODE", "Token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert ray_token()["problem"] == "does not exist"
    path.write_text(" \n")
    assert ray_token()["problem"] == "is empty"
    path.write_text("canary-6d1f")
    path.chmod(0o640)
    found = ray_token()
    assert (found["problem"], found["permissions"], found["mode"]) == ("", 0o640, "token")
    assert "canary" not in str(found)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary-77aa")
    found = ray_token()
    assert found["in_environment"]
    assert "canary" not in str(found)


def test_a_folder_on_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert not folder_facts(str(tmp_path / "file" / "run"))["writable"]
    assert stat.S_ISREG((tmp_path / "file").stat().st_mode)


def test_fingerprints_tell_copies_from_others(tmp_path: Path) -> None:
    for name, config, size in (("a", "{}", 8), ("same", "{}", 8), ("config", "{1}", 8), ("size", "{}", 9)):
        files(tmp_path / name, {"config.json": config})
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
    prints = {name: fingerprint(str(tmp_path / name)) for name in ("a", "same", "config", "size", "absent")}
    assert prints["a"] == prints["same"]
    assert len(set(prints.values())) == 4
    assert prints["absent"] == ""
    (tmp_path / "grade.py").write_text("x = 1")
    before = fingerprint(str(tmp_path / "grade.py"))
    (tmp_path / "grade.py").write_text("x = 2")
    assert fingerprint(str(tmp_path / "grade.py")) != before


def test_gpus_by_the_drivers_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool of that name stands in for the driver's: what it says, and that its failure is a finding."""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    tool.write_text("#!/bin/sh\necho 'NVIDIA X, PCIe, 24576'\necho 'NVIDIA Y, [N/A]'\n")
    tool.chmod(0o700)
    assert gather([], [], [])["gpus"] == [
        {"name": "NVIDIA X, PCIe", "memory_mib": 24576},
        {"name": "NVIDIA Y", "memory_mib": 0},
    ]
    tool.write_text("#!/bin/sh\nexit 9\n")
    plain = gather([], [], [])
    assert plain["gpus"] == []
    assert "nvidia-smi failed" in plain["gpu_problem"]

"""Secrets of the environment are planted as canaries and looked for everywhere after, and during, a run."""

import base64
import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import tarfile
import time
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from canary_search import forms, found_in, search_commands, search_tree

ROOT = Path(__file__).resolve().parents[2]
SECRET = "kanarienvogel-0123456789-gelb?+/ä"
ONE = {"canary": SECRET}


# --- the search itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["", "a", "ab", "abc", "abcd"])
@pytest.mark.parametrize("after", ["", "z", "zy", "zyx"])
def test_base64_is_found_wherever_the_secret_stands_in_it(before: str, after: str) -> None:
    text = (before + SECRET + after).encode()
    assert found_in(b"x" + base64.b64encode(text), ONE) == {"canary"}
    assert found_in(base64.urlsafe_b64encode(text), ONE) == {"canary"}


def packed(content: bytes) -> dict[str, bytes]:
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("other", b"nothing")
        archive.writestr("data.pkl", content)
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        member = tarfile.TarInfo("data")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return {
        "plain": content,
        "utf-16": content.decode().encode("utf-16-le"),
        "hex": content.hex().encode(),
        "zip, as torch.save writes it": zipped.getvalue(),
        "tar": tarred.getvalue(),
        "gzip": gzip.compress(content),
        "tar.gz": gzip.compress(tarred.getvalue()),
        "bz2": bz2.compress(content),
        "xz": lzma.compress(content),
        "zlib": zlib.compress(content),
    }


@pytest.mark.parametrize("kind", packed(b"x"))
def test_a_planted_secret_is_found_in_files_of_every_kind(kind: str, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "clean").write_bytes(packed(b"no secret here" * 9)[kind])
    planted = tmp_path / "deep" / "planted"
    planted.write_bytes(packed(f"… = {SECRET} ".encode() * 3)[kind])
    assert search_tree(tmp_path, ONE) == ({str(planted): {"canary"}}, 2)


def test_a_secret_in_a_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "kanarienvogel-1").write_text("")
    assert search_tree(tmp_path, {"canary": "kanarienvogel-1"})[0] != {}


def test_a_secret_in_a_real_wandb_file_is_found(tmp_path: Path) -> None:
    import wandb

    options = wandb.Settings(silent=True, console="off", x_disable_meta=True, x_disable_stats=True)
    with wandb.init(dir=str(tmp_path), mode="offline", settings=options) as run:
        run.log({"filler": "x" * 50_000, "later": SECRET})
    wandb.teardown()
    hits, count = search_tree(tmp_path / "wandb", ONE)
    assert [Path(name).suffix for name in hits] == [".wandb"]
    assert count >= 3
    assert search_tree(tmp_path, {"canary": "another-canary-that-is-nowhere"})[0] == {}


def test_a_secret_that_a_wandb_file_cuts_in_two_is_found(tmp_path: Path) -> None:
    # 7 bytes of the file's header, 7 of the first chunk's, and filler up to 10 bytes before the block's end:
    # there begins the secret, and goes on behind the second chunk's header.
    data = b"x" * (32768 - 7 - 7 - 10) + SECRET.encode()
    room = 32768 - 7 - 7
    chunks = ((2, data[:room]), (4, data[room:]))  # first and last
    content = b"\0" * 7 + b"".join(struct.pack("<IHB", 0, len(part), kind) + part for kind, part in chunks)
    (tmp_path / "run-1.wandb").write_bytes(content)
    (tmp_path / "run-1.other").write_bytes(content)
    assert list(search_tree(tmp_path, ONE)[0]) == [str(tmp_path / "run-1.wandb")]


def test_a_secret_among_arguments_is_found() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()", f"--key={SECRET}"], stdin=subprocess.PIPE)
    try:
        assert list(search_commands([psutil.Process(process.pid)], ONE).values()) == [{"canary"}]
        assert search_commands([psutil.Process()], ONE) == {}
    finally:
        process.communicate(b"\n")


def test_forms_are_long_enough_not_to_be_found_by_chance() -> None:
    assert min(map(len, forms("x" * 20))) >= 20


# --- a whole run -------------------------------------------------------------------------------------------

JOB = """
[run]
name = "canary"
steps = 2
batch_size = 16
evaluate_prompts = 8
[model.scratch]
hidden_size = 64
layers = 2
heads = 2
max_length = 32
[task]
kind = "reversal"
length = 4
train_size = 64
heldout_size = 8
demonstrations = 64
[warmup]
steps = 2
batch_size = 16
[[reward]]
kind = "function"
function = "grade.py:grade"
[scoring]
reward_env = ["MY_JUDGE"]
max_error_fraction = 1.0
[rollout]
group_size = 4
max_new_tokens = 8
[monitor]
samples_every = 1
hosts_every_s = 1
wandb = "offline"
"""
# The reward has its secret, and an API that refuses a key likes to repeat it in what it says.
GRADE = """
import os, zlib
def grade(prompt, completion, row):
    assert len(os.environ["MY_JUDGE"]) > 20
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        assert name not in os.environ, name
    print("asking the judge")
    if zlib.crc32(str(prompt).encode()) % 5 == 0:
        raise ValueError("401: bad key " + os.environ["MY_JUDGE"])
    return len(set(completion)) / 8
"""
NAMES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_JUDGE")


@pytest.fixture
def canaries() -> dict[str, str]:
    return {name: f"canary{uuid.uuid4().hex}{uuid.uuid4().hex}"[:40] for name in NAMES}


# What Ray's control store tells whoever may ask it: jobs, actors with their runtime environments, workers,
# nodes, placement groups, and all keys and values that it keeps.
LISTINGS = """
import sys, ray
from ray._private import ray_constants
ray_constants.ENABLE_RAY_CLUSTER = False  # else a loopback address is replaced
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
from ray._private.state import state
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list
store = state._connect_and_get_accessor()
tables = [
    *store.get_actor_table(None, None), *store.get_job_table(), *store.get_worker_table(),
    *store.get_placement_group_table(), repr(ray.nodes()).encode(),
]
for space in (None, b"fun", b"job", b"cluster", b"session", b"dashboard", b"serve"):
    for key in _internal_kv_list(b"", namespace=space):
        tables += [key, _internal_kv_get(key, namespace=space) or b""]
open(sys.argv[2], "wb").write(b"\\n".join(tables))
"""


def listings(session: Path, target: Path) -> bytes:
    """Ask the private Ray of a running job, from a process without the secrets."""
    address, variables = control_store(session)
    done = subprocess.run(
        [sys.executable, "-c", LISTINGS, address, str(target)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | variables,
        cwd=target.parent,
    )
    assert done.returncode == 0, done.stderr
    return target.read_bytes()


def control_store(session: Path) -> tuple[str, dict[str, str]]:
    """Where the control store of a Ray session listens, and the variables that say how to be let in."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            options = dict(part[2:].split("=", 1) for part in process.cmdline()[1:] if "=" in part)
            if "gcs_server" in process.name() and options.get("session-dir") == str(session):
                variables = {k: v for k, v in process.environ().items() if k.startswith("RAY_AUTH")}
                (port,) = {
                    c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN
                }
                return f"{options['node-ip-address']}:{port}", variables
    raise AssertionError(f"no control store of {session} is running")


def family(pid: int) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        yield psutil.Process(pid)
        yield from psutil.Process(pid).children(recursive=True)


def of_ray(members: list[psutil.Process]) -> list[psutil.Process]:
    """Those of a command's processes that are Ray's, or descend from them."""
    found: list[psutil.Process] = []
    for member in members:
        with contextlib.suppress(psutil.Error):
            if member.name() in ("raylet", "gcs_server"):
                found += [member, *member.children(recursive=True)]
    return found


def environments(processes: list[psutil.Process], secrets: dict[str, str]) -> set[str]:
    """Which secrets are in the environment that any of these processes was started with."""
    found: set[str] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= found_in("\0".join(process.environ().values()).encode(), secrets)
    return found


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_no_secret_of_the_environment_is_left_or_shown_anywhere(
    tmp_path: Path, canaries: dict[str, str]
) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "grade.py").write_text(GRADE)
    run_dir = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"} | canaries
    output = tmp_path / "output.txt"
    shown: dict[str, bytes] = {}
    commands: set[str] = set()
    session: Path | None = None
    looked_at = 0
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "train", "job.toml", "--run-dir", str(run_dir)],
            cwd=tmp_path,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 300
            while process.poll() is None:
                assert time.monotonic() < deadline, output.read_text()
                members = list(family(process.pid))
                assert search_commands(members, canaries) == {}
                rays = of_ray(members)
                looked_at = max(looked_at, len(rays))
                # A private Ray's processes have only what `reward_env` names; the command's own has them all.
                # W&B's service acts for the command: it needs the key.
                assert environments(rays, canaries) <= {"MY_JUDGE"}
                for member in members:
                    with contextlib.suppress(psutil.Error):
                        commands.add(" ".join(member.cmdline()[:1]))
                link = run_dir / "ray-logs"
                if link.is_symlink() and link.exists():
                    session = link.resolve().parent
                metrics = run_dir / "metrics.jsonl"
                if session and "listings" not in shown and metrics.exists() and metrics.stat().st_size:
                    # Ray lets everybody write in its own folders: nobody else must get there.
                    assert session.parents[1].stat().st_mode & 0o777 == 0o700
                    shown["listings"] = listings(session, tmp_path / "listings")
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0, output.read_text()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "completed"
    events = (run_dir / "events.log").read_text()
    if summary["groups_dropped"]:
        assert "bad key [redacted]" in events
    # What was searched is what was meant: the actors ran, and Ray was asked while they did.
    assert looked_at >= 5
    assert any("raylet" in command for command in commands), commands
    assert b"RolloutWorker" in shown["listings"]
    assert found_in(shown["listings"], canaries) == set()
    assert found_in(output.read_bytes(), canaries) == set()
    hits, count = search_tree(run_dir, canaries)
    assert hits == {}
    assert count > 20
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert list(run_dir.glob("checkpoints/*/policy/*.safetensors"))
    assert session is not None
    hits, count = search_tree(session, canaries)
    assert hits == {}
    assert count > 5

"""The submit stub: copied alone to a head, it becomes the installed headrace."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "cluster" / "submit.py"
# Stands where the installed command line stands, and tells what it was given.
ECHO = """
import json, os, signal, sys, time
names = ("PYTHONPATH", "RAY_AUTH_MODE", "OMP_NUM_THREADS")
seen = {name: os.environ.get(name) for name in names}
print(json.dumps({"words": sys.argv[1:], "cwd": os.getcwd()} | seen), flush=True)
if "wait" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    print("waiting", flush=True)
    time.sleep(60)
sys.exit(3 if "fail" in sys.argv else 0)
"""


class Head:
    """The home folder of a cluster's head, with the stub copied into it alone, as `ray submit` does."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "headrace"
        (self.folder / "cluster").mkdir(parents=True)
        (self.folder / "cluster" / "__init__.py").touch()
        (self.folder / "cluster" / "cli.py").write_text(ECHO)
        (self.folder / ".venv" / "bin").mkdir(parents=True)
        (self.folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("f00d")
        shutil.copy(STUB, home / "submit.py")
        inherited = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        # Ray's SSH commands set this before they run the stub.
        self.environment = inherited | {"HOME": str(home), "OMP_NUM_THREADS": "1"}

    def start(self, *words: str, **more: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "submit.py", *words],
            cwd=self.home,
            env=self.environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, **more: str) -> tuple[int, str, str]:
        process = self.start(*words, **more)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    def told(self, *words: str, **more: str) -> dict[str, Any]:
        status, output, errors = self.run(*words, **more)
        assert status == 0, errors
        found: dict[str, Any] = json.loads(output)
        return found


@pytest.fixture
def head(tmp_path: Path) -> Head:
    return Head(tmp_path)


def test_it_needs_the_standard_library_only() -> None:
    tree = ast.parse(STUB.read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names


def test_a_job_runs_in_the_installed_folder_on_the_running_cluster(head: Head) -> None:
    told = head.told("train", "examples/x.toml", "--set", "run.steps=3")
    assert told["words"] == [
        *("train", "examples/x.toml", "--set", "run.steps=3"),
        *("--set", "cluster.address=auto"),
    ]
    assert told["cwd"] == told["PYTHONPATH"] == str(head.folder)
    assert told["RAY_AUTH_MODE"] == "token"
    assert told["OMP_NUM_THREADS"] is None


@pytest.mark.parametrize(
    "words",
    [
        ["train", "x.toml", "--set", "cluster.address=10.0.0.1:6379"],
        ["train", "x.toml", "--set=cluster.address = ''"],
        ["report", "runs/x"],
        ["train", "--help"],
        ["--version"],
        [],
    ],
)
def test_an_address_is_not_added_where_one_is_given_or_none_is_wanted(head: Head, words: list[str]) -> None:
    assert head.told(*words)["words"] == words


def test_the_exit_status_is_headraces_own(head: Head) -> None:
    assert head.run("report", "fail")[0] == 3


def test_a_signal_reaches_headrace_itself(head: Head) -> None:
    process = head.start("report", "wait")
    assert process.stdout is not None
    process.stdout.readline()
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 7


def test_another_folder_and_another_python_can_be_named(head: Head, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    head.folder.rename(moved)
    (moved / ".venv" / "bin" / "python").unlink()
    told = head.told("report", HEADRACE_HOME=str(moved), HEADRACE_PYTHON=sys.executable)
    assert told["cwd"] == str(moved)


def _no_folder(head: Head) -> None:
    shutil.rmtree(head.folder)


def _no_python(head: Head) -> None:
    (head.folder / ".venv" / "bin" / "python").unlink()


def _empty_token(head: Head) -> None:
    (head.home / ".ray" / "auth_token").write_text("")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_no_folder, ["not installed", "HEADRACE_HOME"]),
        (_no_python, ["no such Python", "HEADRACE_PYTHON"]),
        (_empty_token, ["no token", "ray get-auth-token --generate", "file_mounts"]),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(
    head: Head, harm: Callable[[Head], None], said: list[str]
) -> None:
    harm(head)
    status, _, errors = head.run("train", "x.toml")
    assert status == 2
    assert errors.count("\n") == 1
    for part in said:
        assert part in errors


def test_a_token_by_environment_is_one_too(head: Head, tmp_path: Path) -> None:
    _empty_token(head)
    assert head.told("report", RAY_AUTH_TOKEN="f00d")
    (tmp_path / "secret").write_text("f00d")
    assert head.told("report", RAY_AUTH_TOKEN_PATH=str(tmp_path / "secret"))


def test_it_finds_the_real_command_line(head: Head) -> None:
    status, _, errors = head.run(
        "train", "absent.toml", HEADRACE_HOME=str(ROOT), HEADRACE_PYTHON=sys.executable
    )
    assert status == 2
    assert "absent.toml: there is no such file" in errors


# ---- from the machine that launches ------------------------------------------------------------------------

# `ray exec FILE COMMAND` as far as it matters here: a shell runs the command, and any failure becomes 1.
RAY = """#!/bin/bash
[ "$1" = exec ] && [ -f "$2" ] || exit 64
bash -c "$3" || exit 1
"""


@pytest.fixture
def launch(head: Head, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "ray").write_text(RAY)
    (binaries / "ray").chmod(0o755)
    (binaries / "python").symlink_to(sys.executable)
    shutil.copy(STUB, head.folder / "cluster" / "submit.py")
    (tmp_path / "c.yaml").touch()

    def run(*words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [binaries / "python", STUB, "--cluster", *words],
            check=False,
            cwd=tmp_path,
            env=head.environment | {"PATH": f"{binaries}:{head.environment['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_words_arrive_whole_and_the_status_is_exact(launch: Callable[..., tuple[int, str, str]]) -> None:
    words = ["train", "a b.toml", "--set", 'run.name="it\'s $HOME; exit 9"']
    status, output, _ = launch("c.yaml", "--", *words)
    assert status == 0
    assert json.loads(output.splitlines()[0])["words"] == [*words, "--set", "cluster.address=auto"]
    assert launch("c.yaml", "--", "report", "fail")[0] == 3


def test_a_lost_connection_is_a_failure(launch: Callable[..., tuple[int, str, str]], head: Head) -> None:
    (head.home / "bin" / "ray").write_text("#!/bin/bash\nexit 0\n")  # nothing came back
    assert launch("c.yaml", "--", "train", "x.toml")[0] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["c.yaml", "train", "x.toml"], "must look like"),
        (["c.yaml", "--"], "must look like"),
        (["absent.yaml", "--", "train", "x.toml"], "absent.yaml"),
    ],
)
def test_mistakes_at_launch_are_named(
    launch: Callable[..., tuple[int, str, str]], words: list[str], said: str
) -> None:
    status, _, errors = launch(*words)
    assert status == 2
    assert said in errors

"""The command `headrace doctor`: exit status, records, table, and that it changes nothing."""

import io
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.cli import main
from cluster.doctor import show
from cluster.doctor_records import Check

JOB = """
[model.scratch]
hidden_size = 64
heads = 2
layers = 1
max_length = 32
[data]
train = "{folder}/rows.jsonl"
[[reward]]
kind = "exact"
[rollout]
max_new_tokens = 8
[monitor]
wandb = "offline"
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small job that could be started, with a token for Ray that only its owner reads."""
    token = tmp_path / "token"
    token.write_text("canary-9e2b41")
    token.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "VLLM_SERVER_DEV_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "canary-00ff")
    rows = [json.dumps({"prompt": prompt, "answer": "1"}) for prompt in ("ab", "abc", "xy")]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(folder=tmp_path))
    return path


def tree(folder: Path) -> dict[str, Any]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def records(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    out = capsys.readouterr().out
    assert "canary" not in out
    return {one["name"]: one for one in json.loads(out)}


def test_a_job_that_can_be_started(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    main(["doctor", str(config), "--json"])
    checks = records(capsys)
    assert tree(tmp_path) == before
    for name in ("Python", "torch and vLLM", "loopback", "Ray token", "environment", "run folder"):
        assert checks[name]["status"] == "ok", checks[name]
        assert checks[name]["host"] == socket.gethostname()
    for name in ("model", "rewards", "data", "W&B"):
        assert checks[name]["status"] == "ok", checks[name]
        assert checks[name]["host"] == "job"
    assert all(set(one) == {"name", "host", "status", "found", "remedy"} for one in checks.values())


def test_a_failure_is_exit_status_1(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    assert main(["doctor", "--json"]) == 1
    check = records(capsys)["environment"]
    assert check["status"] == "fail"
    assert "unset VLLM_SERVER_DEV_MODE" in check["remedy"]


def test_overrides_hold(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(config), "--json", "--set", "data.train=/none.jsonl"]) == 1
    assert "data.train = '/none.jsonl': no such file" in records(capsys)["data"]["found"]


def test_a_key_in_a_message_is_taken_out(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "canary-in-a-path")
    assert main(["doctor", str(config), "--json", "--set", "data.train=/x/canary-in-a-path.jsonl"]) == 1
    assert "no such file" in records(capsys)["data"]["found"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "run.steps=1"], "needs CONFIG.toml"),
        (["/no/such.toml"], "no such file"),
        (["--address", "ray://head:10001"], "give host:port"),
        (["--timeout", "0"], "--timeout 0: must be above 0"),
    ],
)
def test_mistakes_are_exit_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


def test_a_wrong_setting_is_exit_status_2(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(config), "--set", "run.stepz=1"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err


@pytest.mark.parametrize("from_configuration", [True, False])
def test_a_cluster_that_is_not_there(
    from_configuration: bool, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"  # bound, but nobody listens
        chosen = ["--set", f"cluster.address={address}"] if from_configuration else ["--address", address]
        assert main(["doctor", str(config), "--json", *chosen]) == 1
    checks = records(capsys)
    assert checks["Ray cluster"]["status"] == "fail"
    assert address in checks["Ray cluster"]["found"]
    assert checks["data"]["status"] == "ok"  # the rest is checked all the same
    assert "Python" in checks


def test_local_overrides_the_configured_cluster(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", str(config), "--json", "--set", "cluster.address=10.255.0.1:1", "--address", "local"])
    assert "Ray cluster" not in records(capsys)


def test_the_table_has_marks_hosts_and_remedies() -> None:
    checks = [
        Check("memory", "host-1", "ok", "16 GiB"),
        Check("clock", "host-1", "warn", "+3 s", "set it"),
        Check("Ray token", "host-2", "fail", "is [bold]empty\x1b[2J", "copy it"),
        Check("data", "job", "skipped", "not read"),
    ]
    out = io.StringIO()
    show(checks, Console(file=out, width=100, no_color=True))
    lines = out.getvalue().splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [
        ["✓", "memory", "16 GiB"],
        ["!", "clock", "+3 s"],
        ["✗", "Ray token", "is [bold]empty·[2J"],  # neither markup nor a terminal's orders
        ["–", "data", "not read"],
    ]
    assert [line.strip() for line in lines if line.strip() in ("host-1", "host-2", "job")] == [
        "host-1",
        "host-2",
        "job",
    ]
    assert lines[-3:] == [
        "! host-1, clock: set it",
        "✗ host-2, Ray token: copy it",
        "1 ok, 1 warnings, 1 failed, 1 not checked",
    ]

"""The copy of a run in W&B, read back from the files of real offline runs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from monitor_helpers import rows, settings
from wandb_files import logged

from cluster.monitor import Monitor
from cluster.wandb_copy import stored_id, wandb_mode

pytestmark = pytest.mark.alone

CANARY_ENV = "canary-of-the-environment-42"
CANARY_CONFIG = "canary-of-the-configuration-43"
CONFIG = {
    "model": {"path": "somewhere", "hub_token": CANARY_CONFIG},
    "rollout": {"max_new_tokens": 64},
    "reward": [{"name": "judge", "api_key": CANARY_CONFIG, "function": f"f.py:{CANARY_ENV}"}],
}
VARIABLES = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DATA_DIR", "WANDB_SERVICE")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("MY_JUDGE_API_KEY", CANARY_ENV)
    yield
    wandb.teardown()  # it remembers the server and the login that it began with
    assert "WANDB_DATA_DIR" not in os.environ
    assert "WANDB_SERVICE" not in os.environ


@pytest.mark.parametrize("host", ["api.wandb.ai", "api.forge.coreweave.com"])  # an older and a newer login
def test_the_mode_follows_keys_logins_and_settings(
    host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    auto = settings(wandb="auto")
    assert wandb_mode(auto) == "offline"
    login = tmp_path / "netrc"
    login.write_text(f"machine {host}\n  login user\n  password x\n")
    monkeypatch.setenv("NETRC", str(login))
    assert wandb_mode(auto) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    assert wandb_mode(auto) == "offline"
    login.write_text("machine localhost:8080\n  login user\n  password x\n")
    assert wandb_mode(auto) == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:8080")
    assert wandb_mode(auto) == "online"
    login.unlink()
    assert wandb_mode(auto) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode(auto) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(auto) == "disabled"
    assert wandb_mode(settings(wandb="offline")) == "offline"


def test_the_id_is_made_once_for_a_run_folder(tmp_path: Path) -> None:
    first = stored_id(tmp_path)
    assert stored_id(tmp_path) == first
    (tmp_path / "other").mkdir()
    assert stored_id(tmp_path / "other") != first


def test_an_offline_run_has_all_that_was_said_and_no_secret(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    known = settings(
        wandb="auto", group="sweep", job_type="ablation", tags=["a", "b"], notes=f"why: {CANARY_ENV}"
    )
    with Monitor(run_dir, known, CONFIG, 3, strict=True) as monitor:
        monitor.warmup({"warmup/step": 1, "warmup/loss": 2.0})
        for step in range(1, 4):
            monitor.step({"learner_step": step, "reward/mean": step / 4, "kl/token": None})
        monitor.event(f"a reward said: bad key {CANARY_ENV}")
        monitor.alert("failure", f"the judge said: bad key {CANARY_ENV}")
        monitor.summary({"status": "finished", "judge_token": CANARY_CONFIG})
        monitor.close(1)
        assert (monitor.wandb_mode, monitor.wandb_errors) == ("offline", 0)
    (start,) = logged(run_dir)
    assert (start.run.project, start.run.run_group, start.run.job_type) == ("headrace", "sweep", "ablation")
    assert (list(start.run.tags), start.run.notes) == (["a", "b"], "why: [redacted]")
    assert (start.run.run_id, start.run.display_name) == (stored_id(run_dir), "run")
    assert not start.run.HasField("git")
    config = {item.key: json.loads(item.value_json) for item in start.run.config.update}
    assert config["rollout"] == {"max_new_tokens": 64}
    assert config["model"] == {"path": "somewhere", "hub_token": "[redacted]"}
    assert start.values("reward/mean") == [0.25, 0.5, 0.75]
    assert [row["learner_step"] for row in start.history if "reward/mean" in row] == [1, 2, 3]
    assert start.values("warmup/loss") == [2.0]
    assert start.values("kl/token") == []
    assert start.summary["reward/mean"] == {"max": 0.75, "last": 0.75}
    assert start.summary["status"] == "finished"
    assert start.alerts == [("failed: run", "the judge said: bad key [redacted]", "ERROR")]
    assert start.exit_code == 1
    for path in (path for path in run_dir.rglob("*") if path.is_file()):
        found = path.read_bytes()
        assert CANARY_ENV.encode() not in found, path
        assert CANARY_CONFIG.encode() not in found, path


def test_every_metric_has_one_axis(tmp_path: Path) -> None:
    with Monitor(tmp_path, settings(wandb="auto"), {}, 1) as monitor:
        monitor.step({"learner_step": 1})
    (start,) = logged(tmp_path)
    axis = {one.glob_name or one.name: one.step_metric for one in start.metrics}
    assert axis["heldout/*"] == axis["reward/*"] == axis["host/*"] == axis["epoch"] == "learner_step"
    assert axis["warmup/*"] == "warmup/step"
    hidden = {one.name for one in start.metrics if one.options.hidden}
    assert hidden == {"learner_step", "warmup/step"}
    best = {one.name: (one.summary.max, one.summary.min, one.summary.last) for one in start.metrics}
    assert best["heldout/reward"] == (True, False, True)
    assert best["mismatch/ess"] == (False, True, True)


def test_the_table_of_samples_grows_and_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    def sample(text: str) -> dict[str, object]:
        shown = {"phase": "train", "prompt_id": 7, "prompt": "p", "completion": text}
        return {**shown, "reward": 1, "extra": [1]}

    with Monitor(tmp_path, settings(wandb="auto"), {}, 9) as monitor:
        for step in (1, 2, 3):
            monitor.step({"learner_step": step, "reward/mean": step / 10})
            monitor.samples(step, [sample(f"c{step}")])
    with Monitor(tmp_path, settings(wandb="auto"), {}, 9, resume_from=2) as monitor:
        monitor.step({"learner_step": 3, "reward/mean": 0.5})
        monitor.samples(3, [sample("again")])
        monitor.samples(4, [sample("c4")])
    first, second = logged(tmp_path)
    assert first.run.run_id == second.run.run_id

    def tables(folder: Path) -> list[list[list[object]]]:
        files = folder.glob("files/media/table/samples_*.table.json")  # samples_ROW_CHECKSUM
        ordered = sorted(files, key=lambda file: int(file.name.split("_")[1]))
        return [json.loads(file.read_text())["data"] for file in ordered]

    before, after = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert tables(before) == [
        [[step, "train", "7", "p", f"c{step}", 1.0, None, "extra: [1]"]] for step in (1, 2, 3)
    ]
    # wandb forgets when it is offline, so the first table has what the run kept of its earlier start.
    assert [[row[4] for row in table] for table in tables(after)] == [["c1", "c2", "again"], ["c4"]]
    assert first.values("samples/increment_num") == [0, 1, 2]
    # Numbers of rows never repeat, so that `wandb sync` of both starts puts one after the other.
    assert first.values("_step") == list(range(6))
    assert min(second.values("_step")) >= 6
    assert second.values("_step") == sorted(set(second.values("_step")))


def test_the_report_is_a_panel_and_an_artifact_that_stays_with_the_run(tmp_path: Path) -> None:
    page = "<!doctype html><html><body>the report</body></html>"
    (tmp_path / "report.html").write_text(page)
    with Monitor(tmp_path, settings(wandb="auto"), {}, 1) as monitor:
        monitor.report(tmp_path / "report.html")
    (start,) = logged(tmp_path)
    (artifact,) = start.artifacts
    assert (artifact.type, artifact.name) == ("report", f"report-{stored_id(tmp_path)}")
    (entry,) = artifact.manifest.contents
    assert entry.path == "report.html"
    assert Path(entry.local_path).is_relative_to(tmp_path / "wandb")  # `wandb sync` will look for it there
    assert Path(entry.local_path).read_text() == page
    (panel,) = tmp_path.glob("wandb/offline-run-*/files/media/html/report_*.html")
    assert panel.read_text() == page
    assert start.values("report/_type") == ["html-file"]


def test_the_end_says_how_to_sync(tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"
    with Monitor(run_dir, settings(wandb="auto"), {}, 1) as monitor:
        monitor.step({"learner_step": 1})
    said = (run_dir / "events.log").read_text()
    assert f"wandb sync '{run_dir}/wandb'/offline-run-*" in said
    with Monitor(tmp_path / "none", settings(), {}, 1):
        pass
    assert "wandb sync" not in (tmp_path / "none" / "events.log").read_text()


def test_uploads_that_take_too_long_at_the_end_are_left_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(self: object, *_: object, **__: object) -> None:
        raise TimeoutError("timed out after 30 seconds")

    with Monitor(tmp_path, settings(wandb="offline"), {}, 1) as monitor:
        deadline = time.monotonic() + 30
        while monitor._wandb._run is None:
            assert time.monotonic() < deadline, "W&B did not start"
            time.sleep(0.01)
        monkeypatch.setattr(wandb.Run, "finish", late)
        monitor._wandb.mode = "online"  # there is no server here to be slow
        monitor.close()
        assert monitor.wandb_errors == 1
    monkeypatch.undo()
    wandb.teardown()
    events = (tmp_path / "events.log").read_text()
    assert f"wandb sync --include-online {tmp_path}/wandb/run-*" in events


def test_a_server_that_cannot_be_reached_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    run_dir = tmp_path / "run"
    quick = settings(wandb="auto", start_timeout_s=4.0, finish_timeout_s=2.0)
    with Monitor(run_dir, quick, {}, 1) as monitor:
        monitor.step({"learner_step": 1, "reward/mean": 0.5})
        monitor.close()
        assert (monitor.wandb_mode, monitor.wandb_errors) == ("offline", 1)
    assert rows(run_dir / "metrics.jsonl")[0]["reward/mean"] == 0.5
    (start,) = logged(run_dir)
    assert start.history[0]["reward/mean"] == 0.5
    events = (run_dir / "events.log").read_text()
    assert "W&B could not start online" in events
    assert "wandb sync" in events
    assert not any(b"k" * 40 in path.read_bytes() for path in run_dir.rglob("*") if path.is_file())


def test_failures_of_wandb_are_counted_and_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, *_: object, **__: object) -> None:
        raise RuntimeError("the service is gone")

    monkeypatch.setattr(wandb.Run, "log", broken)
    monkeypatch.setattr(wandb.Run, "alert", broken)
    with Monitor(tmp_path, settings(wandb="auto"), {}, 3) as monitor:
        for step in range(1, 4):
            monitor.step({"learner_step": step})
        monitor.samples(3, [{"prompt": "p"}])
        monitor.alert("stop", "stopped by the user")
        monitor.close()
        assert monitor.wandb_errors == 5
    assert (tmp_path / "events.log").read_text().count("the service is gone") == 1
    assert len(rows(tmp_path / "metrics.jsonl")) == 3


HANGING = """
import os, psutil, signal, sys, time
from pathlib import Path
from cluster.monitor import Monitor
from cluster.monitor_settings import MonitorSettings
settings = MonitorSettings(wandb="offline", console="off", finish_timeout_s=1.0, start_timeout_s=20.0)
monitor = Monitor(Path(sys.argv[1]), settings, {}, 9000)
monitor.step({"learner_step": 0})
while True:  # until wandb's process is there and has taken the row
    services = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
    if services and monitor._wandb._run is not None and not monitor._wandb._background.waiting:
        break
    time.sleep(0.05)
services[0].send_signal(signal.SIGSTOP)
for step in range(1, 6001):
    monitor.step({"learner_step": step, "reward/mean": 0.5})
monitor.close()
print("errors", monitor.wandb_errors)
"""


def test_a_wandb_that_hangs_neither_slows_the_run_nor_keeps_it_from_ending(tmp_path: Path) -> None:
    # 6,000 rows are more than fit into the pipe to wandb's stopped process and into the list before it, so a
    # monitor that waited for wandb would never come to the end, and neither would Python's own exit.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path / "run")],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 6001
    assert int(done.stdout.split()[-1]) > 1000  # all that found no room, and the end
    events = (tmp_path / "run" / "events.log").read_text()
    assert events.count("W&B could not") == 1

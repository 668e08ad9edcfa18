"""The monitor's files, its copy in W&B, the terminal, and what must never be written down."""

import io
import json
import math
import os
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console as RichConsole

from cluster import metrics
from cluster.console import LiveConsole, PlainConsole, clock, make_console, number, sparkline
from cluster.monitor import Monitor, UnknownMetricError, read_rows, write_atomically
from cluster.monitor_settings import MonitorSettings
from cluster.redact import redact, scrub
from cluster.wandb_copy import stored_id, wandb_mode

CANARY_ENV = "canary-of-the-environment-42"
CANARY_CONFIG = "canary-of-the-configuration-43"
CONFIG = {
    "model": {"path": "somewhere", "hub_token": CANARY_CONFIG},
    "rollout": {"max_new_tokens": 64},
    "reward": [{"name": "judge", "api_key": CANARY_CONFIG, "function": f"f.py:{CANARY_ENV}"}],
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("MY_JUDGE_API_KEY", CANARY_ENV)


def settings(**values: Any) -> MonitorSettings:
    return MonitorSettings.model_validate({"wandb": "disabled", "console": "off", **values})


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- files ---------------------------------------------------------------------------------------------


def test_a_row_is_one_line_that_can_be_read_at_once(tmp_path: Path) -> None:
    with Monitor(tmp_path, settings(), {}, 2, strict=True) as monitor:
        monitor.step({"learner_step": 1, "reward/mean": 0.5, "heldout/reward": None})
        assert rows(tmp_path / "metrics.jsonl") == [
            {
                "learner_step": 1,
                "reward/mean": 0.5,
                "heldout/reward": None,
                "monitor/nonfinite_values": 0,
                "monitor/unknown_metrics": 0,
                "monitor/wandb_errors": 0,
            }
        ]


def test_numbers_that_json_does_not_have_are_null_and_counted(tmp_path: Path) -> None:
    with Monitor(tmp_path, settings(), {}, 2) as monitor:
        monitor.step(
            {"learner_step": 1, "reward/mean": math.nan, "kl/sequence": math.inf, "lag/max": np.int64(2)}
        )
        monitor.step({"learner_step": 2, "reward/mean": math.nan, "loss/policy": np.float32(0.5)})
    first, second = rows(tmp_path / "metrics.jsonl")
    assert (first["reward/mean"], first["kl/sequence"], first["lag/max"]) == (None, None, 2)
    assert (first["monitor/nonfinite_values"], second["monitor/nonfinite_values"]) == (2, 3)
    assert second["loss/policy"] == 0.5
    events = (tmp_path / "events.log").read_text()
    assert events.count("'reward/mean' is nan") == 1  # said once
    assert events.count("'kl/sequence' is inf") == 1


def test_an_unknown_metric_is_written_and_is_an_error_where_asked(tmp_path: Path) -> None:
    row = {"learner_step": 1, "no_such/metric": 1.0}
    with Monitor(tmp_path / "a", settings(), {}, 1) as monitor:
        monitor.step(row)
        monitor.step(row)
    assert [r["monitor/unknown_metrics"] for r in rows(tmp_path / "a" / "metrics.jsonl")] == [1, 1]
    assert (tmp_path / "a" / "events.log").read_text().count("no_such/metric") == 1
    with Monitor(tmp_path / "b", settings(), {}, 1, strict=True) as monitor:
        with pytest.raises(UnknownMetricError, match="no_such/metric"):
            monitor.step(row)
        assert rows(tmp_path / "b" / "metrics.jsonl")[0]["no_such/metric"] == 1.0


def test_a_row_needs_its_axis(tmp_path: Path) -> None:
    with Monitor(tmp_path, settings(), {}, 1) as monitor:
        with pytest.raises(ValueError, match="learner_step"):
            monitor.step({"reward/mean": 1.0})
        with pytest.raises(ValueError, match="warmup/step"):
            monitor.warmup({"warmup/loss": 1.0})


def test_the_summary_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Monitor(tmp_path, settings(), {}, 1) as monitor:
        monitor.summary(
            {"status": "running", "kl_final": math.nan, "hub_token": "abc", "versions": {"a": (1, 2)}}
        )
        before = (tmp_path / "summary.json").read_text()
        assert json.loads(before) == {
            "status": "running",
            "kl_final": None,
            "hub_token": "[redacted]",
            "versions": {"a": [1, 2]},
        }

        def fail(_: int) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space"):
            write_atomically(tmp_path / "summary.json", "half")
        assert (tmp_path / "summary.json").read_text() == before
        assert not list(tmp_path.glob(".summary*"))


def test_a_resumed_run_goes_on_after_its_checkpoint(tmp_path: Path) -> None:
    with Monitor(tmp_path, settings(), {}, 9) as monitor:
        for step in range(1, 6):
            monitor.step({"learner_step": step, "reward/mean": step / 10})
            monitor.samples(step, [{"prompt": "p", "completion": str(step), "reward": 1.0}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"learner_step": 6, "rew')  # killed here
    with Monitor(tmp_path, settings(), {}, 9, resume_from=3) as monitor:
        monitor.step({"learner_step": 4, "reward/mean": 0.9})
    found = [(row["learner_step"], row["reward/mean"]) for row in rows(tmp_path / "metrics.jsonl")]
    assert found == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.9)]
    superseded = [row["learner_step"] for row in rows(tmp_path / "metrics.superseded.jsonl")]
    assert superseded == [4, 5]
    assert [row["completion"] for row in rows(tmp_path / "samples.jsonl")] == ["1", "2", "3"]


def test_decisions_and_times_go_to_files_of_their_own_and_are_rewound_with_the_rest(tmp_path: Path) -> None:
    decision = {
        "setting": "window",
        "old": 1,
        "new": 2,
        "reason": "the learner waited",
        "inputs": {"a": None},
    }
    with Monitor(tmp_path, settings(), {}, 9) as monitor:
        for step in (1, 2, 3):
            monitor.decision(step, decision, f"scheduler: window 1 → 2 at {step}")
            monitor.trace(
                [{"learner_step": step, "group": step}, {"learner_step": step, "train_from_s": 0.5}]
            )
    assert rows(tmp_path / "decisions.jsonl")[0] == {"learner_step": 1} | decision
    assert "scheduler: window 1 → 2 at 3" in (tmp_path / "events.log").read_text()
    with Monitor(tmp_path, settings(), {}, 9, resume_from=2):
        pass
    assert [row["learner_step"] for row in rows(tmp_path / "decisions.jsonl")] == [1, 2]
    assert [row["learner_step"] for row in rows(tmp_path / "rollouts.jsonl")] == [1, 1, 2, 2]
    assert [row["learner_step"] for row in rows(tmp_path / "decisions.superseded.jsonl")] == [3]


def test_lines_that_are_no_rows_are_left_out_when_read(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b'{"a": 1}\n[1]\n\xff\n{"a": 2}\n{"a"')
    assert list(read_rows(tmp_path / "m.jsonl")) == [{"a": 1}, {"a": 2}]
    assert list(read_rows(tmp_path / "none.jsonl")) == []


# --- secrets -------------------------------------------------------------------------------------------


def test_texts_under_telling_names_are_redacted_at_any_depth() -> None:
    assert redact(
        {
            "max_new_tokens": 64,
            "tokenizer": "kept",
            "API_KEY": "a",
            "password": "",
            "nested": [{"client_secret": "b", "name": "kept"}],
            "token": {"value": "c", "days": 3},
            "keys": ["d", "e"],
        }
    ) == {
        "max_new_tokens": 64,
        "tokenizer": "kept",
        "API_KEY": "[redacted]",
        "password": "",
        "nested": [{"client_secret": "[redacted]", "name": "kept"}],
        "token": {"value": "[redacted]", "days": 3},
        "keys": ["[redacted]", "[redacted]"],
    }


def test_values_of_secret_variables_are_scrubbed_from_texts() -> None:
    assert scrub(f"401 for key {CANARY_ENV}!") == "401 for key [redacted]!"


# --- W&B -----------------------------------------------------------------------------------------------


def test_the_mode_follows_keys_logins_and_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    auto = settings(wandb="auto")
    assert wandb_mode(auto) == "offline"
    login = tmp_path / "netrc"
    login.write_text("machine api.wandb.ai\n  login user\n  password x\n")
    monkeypatch.setenv("NETRC", str(login))
    assert wandb_mode(auto) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
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


def records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, a LevelDB log: 7 bytes of header, then blocks of 32 KiB with chunks.

    A chunk is checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last) and its data; a
    block's last bytes are padding where no chunk's header fits.
    """
    place, parts = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def logged(run_dir: Path) -> tuple[list[dict[str, Any]], list[str], bytes]:
    """History rows, metric definitions and all bytes of the offline run's own file."""
    import wandb
    from wandb.proto import wandb_internal_pb2 as pb

    wandb.teardown()  # its service writes the file out a moment after `finish`; this waits for that
    (file,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    history, definitions = [], []
    for data in records(file.read_bytes()):
        record = pb.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        elif record.WhichOneof("record_type") == "metric":
            definitions.append(record.metric.glob_name or record.metric.name)
    return history, definitions, file.read_bytes()


def test_an_offline_run_has_the_rows_and_the_samples_and_no_secret(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Monitor(run_dir, settings(wandb="auto"), CONFIG, 3, strict=True) as monitor:
        assert monitor.wandb_mode == "offline"
        monitor.warmup({"warmup/step": 1, "warmup/loss": 2.0})
        for step in range(1, 4):
            monitor.step({"learner_step": step, "reward/mean": step / 4, "kl/token": None})
        monitor.samples(3, [{"prompt": "p", "completion": "c", "reward": 1.0, "extra": [1]}])
        monitor.event(f"a reward said: bad key {CANARY_ENV}")
        monitor.summary({"status": "finished", "judge_token": CANARY_CONFIG})
        assert monitor.wandb_errors == 0
    history, definitions, content = logged(run_dir)
    assert [row["reward/mean"] for row in history if "reward/mean" in row] == [0.25, 0.5, 0.75]
    assert [row["learner_step"] for row in history if "reward/mean" in row] == [1, 2, 3]
    assert [row["warmup/loss"] for row in history if "warmup/loss" in row] == [2.0]
    assert not any("kl/token" in row for row in history)
    assert {"learner_step", "warmup/step", "warmup/*", "*"} <= set(definitions)
    (table,) = (run_dir / "wandb").glob("offline-run-*/files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [["p", "c", 1.0, "[1]"]]
    assert b"max_new_tokens" in content
    for path in (p for p in run_dir.rglob("*") if p.is_file()):
        found = path.read_bytes()
        assert CANARY_ENV.encode() not in found, path
        assert CANARY_CONFIG.encode() not in found, path


def test_a_server_that_cannot_be_reached_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    run_dir = tmp_path / "run"
    quick = settings(wandb="auto", start_timeout_s=4.0, finish_timeout_s=2.0)
    with Monitor(run_dir, quick, {}, 1) as monitor:
        assert (monitor.wandb_mode, monitor.wandb_errors) == ("offline", 1)
        monitor.step({"learner_step": 1, "reward/mean": 0.5})
    assert rows(run_dir / "metrics.jsonl")[0]["monitor/wandb_errors"] == 1
    history, _, _ = logged(run_dir)
    assert history[0]["reward/mean"] == 0.5
    assert "W&B could not start" in (run_dir / "events.log").read_text()
    assert not any(b"k" * 40 in path.read_bytes() for path in run_dir.rglob("*") if path.is_file())


def test_failures_of_wandb_are_counted_and_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"the service is gone ({name})")

    with Monitor(tmp_path, settings(), {}, 3) as monitor:
        monkeypatch.setattr(monitor._wandb, "_run", Broken())
        for step in range(1, 4):
            monitor.step({"learner_step": step})
        monitor.samples(3, [{"prompt": "p"}])
        monitor.summary({"status": "finished"})
        assert monitor.wandb_errors == 5
    assert [row["monitor/wandb_errors"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert (tmp_path / "events.log").read_text().count("the service is gone") == 1


# --- the terminal --------------------------------------------------------------------------------------

ROW = {
    "learner_step": 12,
    "reward/mean": 0.8123,
    "heldout/reward": 0.7512,
    "heldout/reward_ci95": 0.0321,
    "kl/sequence": 2.34,
    "lag/mean": 1.25,
    "lag/max": 2,
    "scheduler/window": 2,
    "perf/tokens_per_s": 5432.1,
    "wait/learner_s": 0.5,
    "timing_s/step": 2.0,
    "timing_s/sync": 0.1234,
}


def test_without_a_terminal_each_step_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    console = make_console("auto", "demo", 60)
    assert isinstance(console, PlainConsole)
    console.row(ROW)
    console.event("something happened")
    assert capsys.readouterr().out == (
        "step 12/60  reward 0.812  held-out 0.751  KL 2.34  lag 1.25  tokens/s 5,432  learner-wait 25 %  "
        "sync 123 ms\nsomething happened\n"
    )


@pytest.mark.parametrize(
    ("mode", "tty", "variables", "expected"),
    [
        ("auto", True, {"TERM": "xterm"}, LiveConsole),
        ("auto", True, {"TERM": "dumb"}, PlainConsole),
        ("auto", True, {"TERM": "xterm", "CI": "true"}, PlainConsole),
        ("auto", True, {"TERM": "xterm", "CI": "false"}, LiveConsole),
        ("auto", False, {"TERM": "xterm"}, PlainConsole),
        ("plain", True, {"TERM": "xterm"}, PlainConsole),
    ],
)
def test_which_display(
    mode: str, tty: bool, variables: dict[str, str], expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    console = make_console(mode, "demo", 60)
    console.stop()
    assert isinstance(console, expected)


def screen(width: int, **options: Any) -> str:
    out = io.StringIO()
    rich = RichConsole(file=out, width=width, height=40, force_terminal=True, **options)
    console = LiveConsole("demo", 60, rich)
    for step in range(1, 13):
        console.row({**ROW, "learner_step": step, "reward/mean": step / 12})
    rich.print(console)
    console.stop()
    return out.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_the_live_display_fits_any_width(width: int) -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen(width))
    assert all(len(line) <= width for line in text.splitlines())
    assert "step 12/60" in text
    assert "reward" in text
    if width >= 60:
        for words in (
            "0.751 ± 0.032",
            "2.34 nats/seq",
            "1.25 mean, 2 max of 2",
            "5,432 tokens/s",
            "25 %",
            "123 ms",
        ):
            assert words in text, words


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = r"\x1b\[[0-9;]*3[0-9]m"
    assert re.search(coloured, screen(80))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(coloured, screen(80))


def test_sparkline_and_numbers() -> None:
    assert sparkline([0.0, 1.0, 2.0], 8) == "▁▅█"  # (x − 0)/2 · 7 + .5 rounds down to 0, 4, 7
    assert sparkline([5.0, 5.0], 8) == "▄▄"
    assert sparkline(list(map(float, range(100))), 4)[-1] == "█"
    assert len(sparkline(list(map(float, range(100))), 4)) == 4
    assert sparkline([], 4) == ""
    shown = [number(x) for x in (None, 0, 0.01234, 0.000123, 1.234, 12.34, 12345.6, 3, -0.5)]
    assert shown == ["–", "0", "0.012", "0.00012", "1.23", "12.3", "12,346", "3", "-0.500"]
    assert [clock(x) for x in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]


# --- the registry of metrics ---------------------------------------------------------------------------


def test_the_page_of_metrics_is_the_generated_one() -> None:
    page = Path(metrics.__file__).parent.parent / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == metrics.document(), "run: python -m cluster.metrics"


def test_names_are_found_exactly_or_by_family() -> None:
    names = [metric.name for section in metrics.SECTIONS.values() for metric in section]
    assert len(names) == len(set(names))

    def found(name: str) -> str | None:
        metric = metrics.lookup(name)
        return None if metric is None else metric.name

    assert found("reward/mean") == "reward/mean"
    assert found("reward/exact match") == "reward/<label>"
    assert found("reward/a/b") == "reward/<label>/<key>"
    assert found("reward/a/b/c") is None
    assert found("rewards/mean") is None
    assert found("timing_s/step") == "timing_s/step"
    assert found("timing_s/backward") == "timing_s/<stage>"

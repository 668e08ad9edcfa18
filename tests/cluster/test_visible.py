"""Words from outside on the terminal, in logs and in the report: they steer nothing and break nothing."""

import json
from pathlib import Path

import pytest
from monitor_helpers import settings

from cluster import cli
from cluster.generation import progress
from cluster.monitor import Monitor
from cluster.report import write_report
from cluster.visible import entry

# Clears the screen, names the window, and forges an entry; a direction mark; half a surrogate pair.
HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\n2030-01-01T00:00:00Z completed\u202e\ud800"
UNSAFE = "\x1b\x07\u202e\ud800"


def test_a_message_is_one_entry() -> None:
    shown = entry(HOSTILE)
    assert not set(UNSAFE) & set(shown)
    assert shown.splitlines()[1:] == ["    2030-01-01T00:00:00Z completed<U+202E><U+D800>"]
    assert entry("plain: √KL ± 0.1\n") == "plain: √KL ± 0.1"


def test_events_steer_no_terminal_and_forge_no_entry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Monitor(tmp_path, settings(console="plain"), {}, 1) as monitor:
        monitor.event(f"reward 'x' raised {HOSTILE}")
        monitor.alert("reward", HOSTILE)
    log, out = (tmp_path / "events.log").read_text(encoding="utf-8"), capsys.readouterr().out
    for text in (log, out):
        assert "reward 'x' raised <U+001B>[2J" in text
        assert not set(UNSAFE) & set(text)
        assert not any(line.startswith("2030") for line in text.splitlines())


def test_a_report_has_no_unsafe_characters(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"status": "failed", "error": HOSTILE}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "&lt;U+001B&gt;[2J" in page
    assert not set(UNSAFE) & set(page)


def test_a_refusal_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "\x1b[2Jno-run"
    assert cli.main(["report", str(folder)]) == cli.EXIT_USER
    said = capsys.readouterr().err
    assert "<U+001B>[2Jno-run: there is no such folder" in said
    assert "\x1b" not in said


def test_names_with_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    name = "run[/old]"
    rate = {"raw": 0.5, "raw_ci95": (0.4, 0.6), "length_controlled": None, "length_coefficient": 0.0}
    reward = {"mean": 0.5, "ci95": 0.1}
    progress.print_evaluation(
        {
            "prompts": 1,
            "samples": 1,
            "policy": name,
            "reward": reward,
            "response_tokens": {"mean": 1.0},
            "best_of_n": [
                {
                    "n": 1,
                    "reliable": True,
                    "kl": reward,
                    "kl_bound": 0.0,
                    "win_rate": reward,
                    "reward": reward,
                }
                | {"judged": {}}
            ],
            "pass_at_k": None,
            "against": {"policy": name, "win_rates": {name: rate}},
        },
        Path(name),
    )
    assert capsys.readouterr().out.count(name) == 4

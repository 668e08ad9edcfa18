"""What a run shows on the terminal."""

import io
import re
import sys
from typing import Any

import pytest
from rich.console import Console as RichConsole

from cluster.console import LiveConsole, PlainConsole, clock, make_console, number, sparkline


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)


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


def test_over_optimisation_shows_where_a_run_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "overoptimisation/heldout": 0.4,
        "overoptimisation/heldout_ci95": 0.05,
        "overoptimisation/gold": 1.25,
        "overoptimisation/gap": 0.5,
        "overoptimisation/kl_sqrt": 2.0,
        "overoptimisation/disagreement": 0.3,
        "heldout/response_tokens": 12.25,
        "heldout/finished_fraction": 0.875,
    }
    make_console("plain", "demo", 60).row({"learner_step": 5, "heldout/reward": 0.7, **row})
    assert capsys.readouterr().out == (
        "step 5/60  held-out 0.700  judge 0.400 ± 0.050  gold 1.25  gap 0.500  √KL 2.00  disagreement 0.300  "
        "eval length 12.2  EOS rate 88 %\n"
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

"""What a person sees while a run goes on: a live display on a terminal, a line a step elsewhere."""

import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Value = float | int | None
Row = Mapping[str, Value]

_BARS = "▁▂▃▄▅▆▇█"
_HISTORY = 240
_RECENT_STEPS = 10  # over which the time left is estimated
_WARMUP_EVERY = 10
_NARROW = 40  # columns below which there is no bar
_WIDE = 72  # columns from which two values stand side by side


class Console(Protocol):
    """Shows rows and events as they come."""

    def row(self, row: Row) -> None: ...
    def event(self, text: str) -> None: ...
    def stop(self) -> None: ...


def make_console(mode: str, title: str, total_steps: int) -> Console:
    """`auto`: live where stdout is a terminal that can be redrawn and CI is not set; plain elsewhere."""
    if mode == "off":
        return SilentConsole()
    can_redraw = sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "")
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    if mode == "live" or (mode == "auto" and can_redraw and not in_ci):
        return LiveConsole(title, total_steps)
    return PlainConsole(total_steps)


class SilentConsole:
    """Shows nothing."""

    def row(self, row: Row) -> None:
        """Nothing."""

    def event(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class PlainConsole:
    """One line a step, without colour or redrawing: for logs."""

    def __init__(self, total_steps: int) -> None:
        self._progress = Progress(total_steps)

    def row(self, row: Row) -> None:
        """Print the step's line; of the warm-up every tenth."""
        self._progress.add(row)
        if self._progress.warming and self._progress.warmup_step % _WARMUP_EVERY:
            return
        sys.stdout.write(self._progress.line(row) + "\n")
        sys.stdout.flush()

    def event(self, text: str) -> None:
        """Print the text."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def stop(self) -> None:
        """Nothing to end."""


class LiveConsole:
    """A panel that is redrawn in place; events scroll above it. rich leaves colours out under NO_COLOR."""

    def __init__(self, title: str, total_steps: int, console: RichConsole | None = None) -> None:
        self._title = title
        self._progress = Progress(total_steps)
        self._row: dict[str, Value] = {}
        self._live = Live(self, console=console or RichConsole(), refresh_per_second=4, transient=False)
        self._live.start()

    def row(self, row: Row) -> None:
        """Show the newest values; those that a row does not have stay."""
        self._progress.add(row)
        self._row.update({name: value for name, value in row.items() if value is not None})

    def event(self, text: str) -> None:
        """Print above the panel."""
        self._live.console.print(Text(text))

    def stop(self) -> None:
        """Leave the last picture standing."""
        self._live.stop()

    def __rich__(self) -> RenderableType:
        width = self._live.console.width
        return Panel(
            Group(self._bar(width), Text(""), self._table(width)),
            title=Text(f"headrace · {self._title}", style="bold"),
            title_align="left",
            border_style="cyan",
            padding=(0, 1),
            width=min(width, 100),
        )

    def _bar(self, width: int) -> RenderableType:
        progress = self._progress
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(justify="right", no_wrap=True)
        bar = ProgressBar(total=max(progress.total, 1), completed=progress.done, complete_style="cyan")
        left = progress.time_left()
        if width < _NARROW:
            return Text(progress.label(), style="bold")
        grid.add_row(progress.label(), bar, f"{clock(left)} left" if left else "")
        return grid

    def _table(self, width: int) -> RenderableType:
        cells = self._cells(width)
        columns = 2 if width >= _WIDE else 1
        grid = Table.grid(padding=(0, 1), expand=True)
        for _ in range(columns):
            grid.add_column(style="dim", no_wrap=True, max_width=13)
            grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for start in range(0, len(cells), columns):
            pairs = [*cells[start : start + columns], ("", Text(""))][:columns]
            grid.add_row(*(part for pair in pairs for part in pair))
        return grid

    def _cells(self, width: int) -> list[tuple[str, Text]]:
        row, spark = self._row, max(6, min(20, width // 2 - 24))
        warm = self._progress.warming
        reward = Text(number(row.get("reward/mean")), style="bold green")
        reward.append(f"  {sparkline(self._progress.rewards, spark)}", style="green")
        heldout = Text(with_interval(row.get("heldout/reward"), row.get("heldout/reward_ci95")))
        lag = f"{number(row.get('lag/mean'))} mean, {number(row.get('lag/max'))} max"
        window = row.get("scheduler/window")
        cells = [
            ("reward", reward),
            ("held out", heldout),
            ("KL", Text(f"{number(row.get('kl/sequence'))} nats/seq")),
            ("entropy", Text(f"{number(row.get('policy/entropy'))} nats/token")),
            ("lag", Text(lag + ("" if window is None else f" of {window}"))),
            ("length", Text(f"{number(row.get('length/mean'))} tokens")),
            ("speed", Text(f"{number(row.get('perf/tokens_per_s'))} tokens/s")),
            ("learner waits", Text(percent(wait_fraction(row)))),
            ("sync", Text(milliseconds(row.get("timing_s/sync")))),
            ("proof", Text(f"{number(row.get('sync/probe_max_abs_diff'))} nats apart")),
            *((name, Text(text)) for name, text in overoptimisation(row)),
        ]
        if warm:
            cells = [("warm-up loss", Text(number(row.get("warmup/loss")), style="bold"))]
        elif "preference/accuracy" in row:
            cells = [
                ("loss", Text(number(_loss(row)), style="bold")),
                ("accuracy", Text(percent(row.get("preference/accuracy")))),
                ("held out", Text(percent(row.get("preference/heldout_accuracy")))),
            ]
        elif _loss(row) is not None:
            cells = [
                ("loss", Text(number(_loss(row)), style="bold")),
                ("held out", Text(number(row.get("supervised/heldout_loss")))),
            ]
        return cells


def _loss(row: Row) -> Value:
    """What a job of the learner alone, or a warm-up, brings down."""
    names = ("warmup/loss", "supervised/loss", "loss/preference")
    return next((row[name] for name in names if name in row), None)


class Progress:
    """How far a run is, and how long it will still take."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.at = 0  # the step of the last row
        self.warming = False
        self.warmup_step = 0
        self.rewards: deque[float] = deque(maxlen=_HISTORY)
        self._times: deque[tuple[int, float]] = deque(maxlen=_RECENT_STEPS + 1)

    def add(self, row: Row) -> None:
        """Take note of a row."""
        self.warming = "warmup/step" in row
        if self.warming:
            self.warmup_step = int(row["warmup/step"] or 0)
            return
        self.at = int(row.get("learner_step") or 0)
        if self.at < self.done:  # an evaluation that ended steps later
            return
        self.done = self.at
        self._times.append((self.done, time.monotonic()))
        reward = row.get("reward/mean")
        if reward is not None:
            self.rewards.append(float(reward))

    def label(self, step: int | None = None) -> str:
        """For example `step 12/60`: how far the run is, or the step that is given."""
        if self.warming:
            return f"warm-up {self.warmup_step}"
        return f"step {self.done if step is None else step}/{self.total}"

    def time_left(self) -> float | None:
        """Seconds, from the pace of the last steps; None while that is unknown."""
        if len(self._times) < 2 or self.warming:
            return None
        (first, start), (last, end) = self._times[0], self._times[-1]
        return (end - start) / (last - first) * (self.total - self.done) if last > first else None

    def line(self, row: Row) -> str:
        """The row as one plain line; values that it does not have are left out."""
        left = self.time_left()
        wait = wait_fraction(row)
        shown: Sequence[tuple[str, str | None]] = (
            ("reward", _if(row.get("reward/mean"))),
            ("held-out", _if(row.get("heldout/reward"))),
            *overoptimisation(row),
            ("KL", _if(row.get("kl/sequence"))),
            ("lag", _if(row.get("lag/mean"))),
            ("tokens/s", _if(row.get("perf/tokens_per_s"))),
            ("learner-wait", None if wait is None else percent(wait)),
            ("sync", None if row.get("timing_s/sync") is None else milliseconds(row["timing_s/sync"])),
            ("loss", _if(_loss(row))),
            ("held-out loss", _if(row.get("supervised/heldout_loss"))),
            ("accuracy", _if(row.get("preference/accuracy"))),
            ("held-out accuracy", _if(row.get("preference/heldout_accuracy"))),
            ("left", clock(left) if left else None),
        )
        return "  ".join(
            [self.label(self.at), *(f"{name} {text}" for name, text in shown if text is not None)]
        )


def overoptimisation(row: Row) -> list[tuple[str, str]]:
    """What a run shows of over-optimisation, as far as its row has it: names and values in words."""
    root = "overoptimisation/"
    shown = [
        (name, with_interval(row.get(root + key), row.get(f"{root}{key}_ci95")))
        for name, key in (("judge", "heldout"), ("gold", "gold"), ("gap", "gap"))
        if row.get(root + key) is not None
    ]
    if shown:
        shown.append(("√KL", number(row.get(f"{root}kl_sqrt"))))
    if row.get(f"{root}disagreement") is not None:
        shown.append(("disagreement", number(row[f"{root}disagreement"])))
    if shown:
        shown += [
            (name, text(row[f"heldout/{key}"]))
            for name, key, text in (
                ("eval length", "response_tokens", number),
                ("EOS rate", "finished_fraction", percent),
            )
            if row.get(f"heldout/{key}") is not None
        ]
    return shown


def wait_fraction(row: Row) -> float | None:
    """Share of the step that the learner waited; from the times where the share itself is not given."""
    given = row.get("perf/learner_wait_fraction")
    waited, step = row.get("wait/learner_s"), row.get("timing_s/step")
    if given is not None:
        return given
    return None if waited is None or not step else waited / step


def sparkline(values: Sequence[float] | deque[float], width: int) -> str:
    """The last `width` values as bars from their smallest to their largest: [0, 1, 2] → ▁▅█."""
    shown = list(values)[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    if high == low:
        return _BARS[3] * len(shown)
    return "".join(_BARS[int((value - low) / (high - low) * (len(_BARS) - 1) + 0.5)] for value in shown)


def number(value: Value) -> str:
    """Three significant digits: 0.0123, 1.23, 12,300."""
    if value is None:
        return NONE
    if value == 0 or isinstance(value, int):
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e7 else f"{value:.3g}"
    if size >= 1:
        return f"{value:.{2 if size < 10 else 1}f}"
    return f"{value:.3f}" if size >= 0.01 else f"{value:.2g}"


NONE = "–"


def _if(value: Value) -> str | None:
    return None if value is None else number(value)


def with_interval(value: Value, half: Value) -> str:
    """For example 0.612 ± 0.021."""
    return number(value) + ("" if value is None or half is None else f" ± {number(half)}")


def percent(value: Value) -> str:
    """A share as whole percent."""
    return NONE if value is None else f"{100 * value:.0f} %"


def milliseconds(seconds: Value) -> str:
    """A short time."""
    return NONE if seconds is None else f"{1000 * seconds:,.0f} ms"


def clock(seconds: float | None) -> str:
    """For example 1:02:03 or 4:05."""
    if seconds is None:
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

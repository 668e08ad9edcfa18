"""The report's pictures: each function draws one from a run's data as SVG, or answers None without data."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from cluster.console import wait_fraction
from cluster.report_data import Points, RunData

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8a94a0"
INK = "#26323d"
_MOST_POINTS = 800

_STYLE: Any = {
    "axes.edgecolor": "#b8c0c8",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "grid.color": "#e6eaee",
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "headrace",
    "text.color": INK,
    "xtick.color": "#55616c",
    "ytick.color": "#55616c",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn figure with the words that go with it."""

    key: str
    title: str
    caption: str
    svg: bytes


Draw = Callable[[RunData, Axes], bool]


def draw_all(run: RunData) -> list[Picture]:
    """Every picture that the run has data for, in the order of reading."""
    pictures = []
    for key, title, caption, draw in _PICTURES:
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=(6.2, 3.3))
            figure.subplots_adjust(left=0.135, right=0.98, bottom=0.15, top=0.97)
            axes = figure.add_subplot()
            axes.set_xlabel("learner step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            if not draw(run, axes):
                continue
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        pictures.append(Picture(key, title, caption, buffer.getvalue()))
    return pictures


def _reward(run: RunData, axes: Axes) -> bool:
    heldout = run.heldout()
    drawn = _trend(axes, run.points("reward/mean"), BLUE, "training samples")
    if heldout:
        xs, ys, halves = ([point[i] for point in heldout] for i in range(3))
        label = "held out, 95 % interval" if any(halves) else "held out"
        errors = halves if any(halves) else None
        axes.errorbar(xs, ys, errors, color=RED, fmt="o--", ms=5, lw=1.1, capsize=4, label=label, zorder=5)
    axes.set_ylabel("mean reward")
    _legend(axes, "lower right")
    return drawn or bool(heldout)


def _kl(run: RunData, axes: Axes) -> bool:
    axes.set_ylabel("KL to the reference\n(nats a sequence)")
    return _trend(axes, run.points("kl/sequence"), BLUE)


def _length(run: RunData, axes: Axes) -> bool:
    drawn = _trend(axes, run.points("length/mean"), BLUE, "mean")
    limit = run.setting("rollout.max_new_tokens")
    if drawn and limit and max(run.points("length/mean")[1]) > limit / 2:
        axes.axhline(limit, color=RED, ls="--", lw=1.2, label=f"limit, {limit}")
        _legend(axes, "lower right")
    if drawn:
        axes.set_ylim(bottom=0)
        axes.margins(y=0.15)
    axes.set_ylabel("response length (tokens)")
    return drawn


def _entropy(run: RunData, axes: Axes) -> bool:
    axes.set_ylabel("entropy (nats a token)")
    drawn = _trend(axes, run.points("policy/entropy"), BLUE)
    if drawn:
        axes.set_ylim(bottom=0)
    return drawn


def _lag(run: RunData, axes: Axes) -> bool:
    steps, largest = _thin(run.points("lag/max"), max)
    mean = _thin(run.points("lag/mean"))
    if not steps and not mean[0]:
        return False
    axes.plot(steps, largest, color=ORANGE, lw=3.2, drawstyle="steps-mid", label="largest")
    axes.plot(*mean, color=BLUE, label="mean")
    bound = _thin(run.points("scheduler/window"), max)
    if not bound[0] and (window := run.setting("scheduler.window")) is not None:
        xs = steps or mean[0]
        bound = ([min(xs), max(xs)], [float(window)] * 2)
    if bound[0]:
        axes.plot(*bound, color=INK, ls="--", lw=1.4, drawstyle="steps-mid", label="bound")
    axes.set_ylabel("lag of trained tokens\n(learner steps)")
    axes.set_ylim(-0.1, max([*largest, *mean[1], *bound[1], 1.0]) * 1.35)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes, "upper right", columns=3)
    return True


def _timing(run: RunData, axes: Axes) -> bool:
    rows = [row for row in run.metrics if row.get("timing_s/step") is not None]
    if not rows:
        return False
    xs = [float(row["learner_step"]) for row in rows]
    waits = [float(row.get("wait/learner_s") or 0.0) for row in rows]
    syncs = [float(row.get("timing_s/sync") or 0.0) for row in rows]
    trains = [
        float(row.get("timing_s/learner_step") or max(0.0, float(row["timing_s/step"]) - wait - sync))
        for row, wait, sync in zip(rows, waits, syncs, strict=True)
    ]
    parts = [_thin((xs, part)) for part in (trains, waits, syncs)]
    labels = ("training", "waiting for samples", "weight sync and proof")
    axes.stackplot(
        parts[0][0],
        [part[1] for part in parts],
        labels=labels,
        colors=[BLUE, ORANGE, GREEN],
        alpha=0.85,
        lw=0,
    )
    totals = sorted(a + b + c for a, b, c in zip(*(part[1] for part in parts), strict=True))
    # The first step compiles and warms up; it should not flatten the rest.
    axes.set_ylim(0, 1.45 * totals[min(len(totals) - 1, int(0.97 * len(totals)))] or 1.0)
    axes.margins(x=0)
    axes.set_ylabel("time of a step (s)")
    _legend(axes, "upper right")
    return True


def _waits(run: RunData, axes: Axes) -> bool:
    learner = run.points("perf/learner_wait_fraction")
    if not learner[0]:
        shares = [(row.get("learner_step"), wait_fraction(row)) for row in run.metrics]
        known = [(float(x), y) for x, y in shares if x is not None and y is not None]
        learner = [x for x, _ in known], [y for _, y in known]
    drawn = _trend(axes, learner, BLUE, "learner, for samples")
    drawn = (
        _trend(axes, run.points("perf/rollout_wait_fraction"), ORANGE, "rollout actors, for room") or drawn
    )
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("share of the time waiting")
    _legend(axes, "upper right")
    return drawn


def _proof(run: RunData, axes: Axes) -> bool:
    xs, ys = _thin(run.points("sync/probe_max_abs_diff"), max)
    if not xs:
        return False
    # Exactly equal is a value that a logarithm cannot show: it stands at the bottom.
    floor = 1e-9
    ys = [max(y, floor) for y in ys]
    axes.plot(xs, ys, color=BLUE, marker="o", ms=2.5, lw=1, label="measured")
    axes.axhline(run.tolerance, color=RED, ls="--", lw=1.4, label=f"tolerance, {run.tolerance:g}")
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(min(ys) / 5, run.tolerance * 30)
    axes.set_ylabel("largest |Δ log-probability|\n(nats)")
    _legend(axes, "upper right", columns=2)
    return True


def _mismatch(run: RunData, axes: Axes) -> bool:
    axes.set_ylabel("effective share of samples")
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return _trend(axes, run.points("mismatch/ess"), BLUE)


def _warmup(run: RunData, axes: Axes) -> bool:
    axes.set_xlabel("warm-up update")
    axes.set_ylabel("loss (nats a token)")
    drawn = _trend(axes, run.points("warmup/loss", "warmup/step"), BLUE)
    if drawn:
        axes.set_ylim(bottom=0)
    return drawn


_PICTURES: tuple[tuple[str, str, str, Draw], ...] = (
    ("reward", "Reward", "Should rise, on held-out prompts too.", _reward),
    ("kl", "Distance to the reference", "Rises slowly; a run-away means reward hacking.", _kl),
    ("length", "Response length", "Growth without reward is padding.", _length),
    ("entropy", "Entropy of the policy", "Falls slowly; at 0 exploration has ended.", _entropy),
    ("lag", "Lag", "How old the weights were that sampled the trained tokens; never above the bound.", _lag),
    (
        "timing",
        "Where the time goes",
        "Stages of one learner step; a sync may overlap the next step.",
        _timing,
    ),
    ("waits", "Who waits", "Both low is best; the learner high: more actors or a wider window.", _waits),
    ("proof", "Proof of weight sync", "Actors against learner on a probe batch after each sync.", _proof),
    ("mismatch", "Effective sample size", "Near 100 %: samples are still on-policy.", _mismatch),
    ("warmup", "Supervised warm-up", "Loss on demonstrations before reinforcement learning.", _warmup),
)


def _trend(axes: Axes, points: Points, color: str, label: str | None = None) -> bool:
    """The values, and over them their moving mean where there are enough to need one."""
    xs, ys = _thin(points)
    if not xs:
        return False
    window = len(xs) // 12
    if window < 2:
        axes.plot(xs, ys, color=color, label=label, marker="o" if len(xs) < 3 else None)
        return True
    axes.plot(xs, ys, color=color, alpha=0.3, lw=1.0)
    axes.plot(xs, moving_mean(ys, window), color=color, label=label)
    return True


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over `window` values to each side, fewer at the ends: ([0, 3, 6], 1) → [1.5, 3, 4.5]."""
    means = []
    for i in range(len(values)):
        near = values[max(0, i - window) : i + window + 1]
        means.append(sum(near) / len(near))
    return means


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _thin(points: Points, combine: Callable[[Sequence[float]], float] = _mean) -> Points:
    """At most `_MOST_POINTS` points: neighbours are put together by `combine`, so no peak need be lost."""
    xs, ys = points
    size = -(-len(xs) // _MOST_POINTS)
    if size <= 1:
        return xs, ys
    starts = range(0, len(xs), size)
    return [_mean(xs[i : i + size]) for i in starts], [combine(ys[i : i + size]) for i in starts]


Place = Literal["best", "lower right", "upper right"]


def _legend(axes: Axes, place: Place, columns: int = 1) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc=place, ncols=columns)

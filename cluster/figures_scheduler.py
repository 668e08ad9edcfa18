"""The report's pictures of the scheduler: where lag comes from, what was waited for, drift, decisions."""

import math
import re

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cluster.drawing import BLUE, GREEN, GREY, INK, ORANGE, RED, legend, mean, thin
from cluster.report_data import RunData

_CAUSES = {
    "window": (ORANGE, "window full"),
    "deadline": (RED, "a slow group is due"),
    "ahead": (GREY, "no more wanted"),
    "sampling": (BLUE, "all slots busy"),
    "sync": (GREEN, "weights loading"),
    "evaluation": (INK, "an evaluation under way"),
}
_BY_LAG = re.compile(r"mismatch/kl_by_lag/(\d+)")


def draw_lag_split(run: RunData, axes: Axes) -> bool:
    """Mean lag a step, stacked: in flight and in queue."""
    xs, flight = thin(run.points("lag/in_flight_mean"))
    _, queue = thin(run.points("lag/in_queue_mean"))
    if not xs or len(flight) != len(queue):
        return False
    labels = ("in flight: being sampled or scored", "in queue: ready, not yet trained")
    axes.stackplot(xs, flight, queue, labels=labels, colors=[BLUE, ORANGE], alpha=0.85, lw=0)
    axes.set_ylabel("mean lag (learner steps)")
    axes.set_ylim(0, 1.35 * max(1e-9, *(a + b for a, b in zip(flight, queue, strict=True))))
    legend(axes, "upper right")
    return True


def draw_lengths(run: RunData, axes: Axes) -> bool:
    """Share of responses by length: all that were sampled, and those that were trained on."""
    found = run.summary.get("length_histogram")
    if not isinstance(found, dict) or not sum(found.get("trained") or [0]):
        return False
    edges = [float(edge) for edge in found["edges"]]
    for name, color, fill in (("sampled", ORANGE, True), ("trained", BLUE, False)):
        counts = [float(count) for count in found[name]]
        shares = [count / sum(counts) for count in counts]
        axes.stairs(shares, edges, color=color, fill=fill, alpha=0.6 if fill else 1.0, lw=2, label=name)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("length of a response (tokens)")
    axes.set_ylabel("share of responses")
    legend(axes, "upper right")
    return True


def draw_wait_causes(run: RunData, axes: Axes) -> bool:
    """The learner's wait as a share of the step, stacked by cause; causes that never were are left out."""
    rows = [row for row in run.metrics if row.get("timing_s/step") and "wait/by_cause/window" in row]
    if not rows:
        return False
    xs = [float(row["learner_step"]) for row in rows]
    shares = {
        cause: [float(row.get(f"wait/by_cause/{cause}") or 0.0) / float(row["timing_s/step"]) for row in rows]
        for cause in _CAUSES
    }
    seen = [cause for cause, values in shares.items() if max(values) > 0.001]
    if not seen:
        axes.text(0.5, 0.5, "the learner never waited", transform=axes.transAxes, ha="center", color=INK)
    parts = [thin((xs, shares[cause])) for cause in seen]
    if parts:
        colors, labels = zip(*(_CAUSES[cause] for cause in seen), strict=True)
        axes.stackplot(parts[0][0], [ys for _, ys in parts], labels=labels, colors=colors, alpha=0.85, lw=0)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("learner waiting, share of a step")
    legend(axes, "upper right", columns=2)
    return True


def draw_drift(run: RunData, axes: Axes) -> bool:
    """KL(μ‖π) by lag: each step a dot, the mean over the run's last half, and the last fitted line."""
    late = run.metrics[len(run.metrics) // 2 :]
    by_lag: dict[int, list[float]] = {}
    for row in late:
        for name, value in row.items():
            if (found := _BY_LAG.fullmatch(name)) and isinstance(value, int | float) and value > 0:
                by_lag.setdefault(int(found[1]), []).append(float(value))
    if not by_lag:
        return False
    lags = sorted(by_lag)
    for lag in lags:
        axes.plot([lag] * len(by_lag[lag]), by_lag[lag], "o", ms=3, color=BLUE, alpha=0.3, mew=0)
    axes.plot(lags, [mean(by_lag[lag]) for lag in lags], "_", ms=16, color=BLUE, mew=2, label="mean at a lag")
    engine, drift = _last(run, "mismatch/engine"), _last(run, "mismatch/drift")
    if engine is not None and drift is not None:
        ends = [0, max(*lags, 1)]
        line = [engine + drift * s for s in ends]
        axes.plot(ends, line, color=RED, label=f"D(s) = {engine:.2g} + {drift:.2g}·s")
    limit = run.setting("scheduler.max_drift")
    if run.setting("scheduler.window") == "adaptive" and limit is not None:
        axes.axhline(float(limit), color=INK, ls="--", lw=1.2, label="limit")
    axes.set_xlabel("lag of a token (learner steps)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-0.5, max(*lags, 1) + 0.5)
    axes.set_ylabel("KL(sampler ‖ learner)\n(nats a token)")
    highest = max(max(values) for values in by_lag.values())
    axes.set_ylim(0, 1.35 * highest)
    legend(axes, "upper right")
    return True


def draw_decisions(run: RunData, axes: Axes) -> bool:
    """The window, what the lag really was, and where the rule raised or lowered S."""
    decisions = [d for d in run.decisions if d.get("setting") == "window"]
    if run.setting("scheduler.window") != "adaptive":
        return False
    window = thin(run.points("scheduler/window"), max)
    if not window[0]:
        return False
    axes.plot(*window, color=INK, lw=2.0, drawstyle="steps-post", label="window S")
    axes.plot(*thin(run.points("lag/max"), max), color=ORANGE, lw=1.2, label="largest lag")
    axes.plot(*thin(run.points("lag/mean")), color=BLUE, lw=1.2, label="mean lag")
    every = thin(run.points("scheduler/publish_every"), max)
    if max(every[1], default=1) > 1:
        axes.plot(*every, color=GREY, ls=":", lw=1.6, drawstyle="steps-post", label="publish interval")
    for up, marker, color, label in ((True, "^", GREEN, "raised"), (False, "v", RED, "lowered")):
        at = [d for d in decisions if (int(d["new"]) > int(d["old"])) == up]
        points = [float(d["learner_step"]) for d in at], [float(d["new"]) for d in at]
        if at:
            axes.plot(*points, marker, color=color, ms=7, ls="", label=label, zorder=5)
    top = max([*window[1], *run.points("lag/max")[1], 1.0])
    axes.set_ylim(-0.1, top * 1.6)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("learner steps")
    legend(axes, "upper right", columns=3)
    return True


def _last(run: RunData, name: str) -> float | None:
    values = run.points(name)[1]
    return values[-1] if values and math.isfinite(values[-1]) else None

"""The report's pictures: each function draws one from a run's data as SVG, or answers None without data."""

import io
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from cluster.console import wait_fraction
from cluster.drawing import BLUE, GREEN, INK, ORANGE, RED, STYLE, Draw, legend, thin, trend
from cluster.figures_scheduler import (
    draw_decisions,
    draw_drift,
    draw_lag_split,
    draw_lengths,
    draw_wait_causes,
)
from cluster.preference_job.figures import PREFERENCE_PICTURES
from cluster.report_data import RunData


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn figure with the words that go with it."""

    key: str
    title: str
    caption: str
    svg: bytes


def draw_all(run: RunData) -> list[Picture]:
    """Every picture that the run has data for, in the order of reading."""
    pictures = []
    for key, title, caption, draw in _PICTURES:
        with mpl.rc_context(STYLE):
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
    drawn = trend(axes, run.points("reward/mean"), BLUE, "training samples")
    if heldout:
        xs, ys, halves = ([point[i] for point in heldout] for i in range(3))
        label = "held out, 95 % interval" if any(halves) else "held out"
        errors = halves if any(halves) else None
        axes.errorbar(xs, ys, errors, color=RED, fmt="o--", ms=5, lw=1.1, capsize=4, label=label, zorder=5)
    axes.set_ylabel("mean reward")
    legend(axes, "lower right")
    return drawn or bool(heldout)


def _supervised(run: RunData, axes: Axes) -> bool:
    drawn = trend(axes, run.points("supervised/loss"), BLUE, "training batches")
    xs, ys = run.points("supervised/heldout_loss")
    if xs:
        axes.plot(xs, ys, "o--", color=RED, ms=4, lw=1.1, label="held out")
    axes.set_xlabel("update")
    axes.set_ylabel("loss (nats a token)")
    legend(axes, "upper right")
    return drawn or bool(xs)


def _pass_at(run: RunData, axes: Axes) -> bool:
    """pass@k of the held-out evaluations, a line for each k that two of them have."""
    drawn = False
    for k, colour in zip(run.passes(), (BLUE, GREEN, ORANGE, RED, INK), strict=False):
        xs, ys = run.points(f"heldout/pass_at/{k}")
        halves = dict(zip(*run.points(f"heldout/pass_at/{k}_ci95"), strict=True))
        errors = [halves.get(x, 0.0) for x in xs]
        axes.errorbar(xs, ys, errors, color=colour, fmt="o-", ms=4, lw=1.2, capsize=3, label=f"k = {k}")
        drawn = True
    axes.set_ylabel("pass@k on held-out prompts")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    legend(axes, "lower right", columns=2)
    return drawn


def _kl(run: RunData, axes: Axes) -> bool:
    axes.set_ylabel("KL to the reference\n(nats a sequence)")
    return trend(axes, run.points("kl/sequence"), BLUE)


def _length(run: RunData, axes: Axes) -> bool:
    drawn = trend(axes, run.points("length/mean"), BLUE, "mean")
    limit = run.setting("rollout.max_new_tokens")
    if drawn and limit and max(run.points("length/mean")[1]) > limit / 2:
        axes.axhline(limit, color=RED, ls="--", lw=1.2, label=f"limit, {limit}")
        legend(axes, "lower right")
    if drawn:
        axes.set_ylim(bottom=0)
        axes.margins(y=0.15)
    axes.set_ylabel("response length (tokens)")
    return drawn


def _entropy(run: RunData, axes: Axes) -> bool:
    axes.set_ylabel("entropy (nats a token)")
    drawn = trend(axes, run.points("policy/entropy"), BLUE)
    if drawn:
        axes.set_ylim(bottom=0)
    return drawn


def _lag(run: RunData, axes: Axes) -> bool:
    steps, largest = thin(run.points("lag/max"), max)
    mean = thin(run.points("lag/mean"))
    if not steps and not mean[0]:
        return False
    axes.plot(steps, largest, color=ORANGE, lw=3.2, drawstyle="steps-mid", label="largest")
    axes.plot(*mean, color=BLUE, label="mean")
    bound = thin(run.points("scheduler/window"), max)
    if not bound[0] and (window := run.setting("scheduler.window")) is not None:
        xs = steps or mean[0]
        bound = ([min(xs), max(xs)], [float(window)] * 2)
    if bound[0]:
        axes.plot(*bound, color=INK, ls="--", lw=1.4, drawstyle="steps-mid", label="bound")
    axes.set_ylabel("lag of trained tokens\n(learner steps)")
    axes.set_ylim(-0.1, max([*largest, *mean[1], *bound[1], 1.0]) * 1.35)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes, "upper right", columns=3)
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
    parts = [thin((xs, part)) for part in (trains, waits, syncs)]
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
    legend(axes, "upper right")
    return True


def _waits(run: RunData, axes: Axes) -> bool:
    learner = run.points("perf/learner_wait_fraction")
    if not learner[0]:
        shares = [(row.get("learner_step"), wait_fraction(row)) for row in run.metrics]
        known = [(float(x), y) for x, y in shares if x is not None and y is not None]
        learner = [x for x, _ in known], [y for _, y in known]
    drawn = trend(axes, learner, BLUE, "learner, for samples")
    drawn = trend(axes, run.points("perf/rollout_wait_fraction"), ORANGE, "rollout actors, for room") or drawn
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("share of the time waiting")
    legend(axes, "upper right")
    return drawn


def _proof(run: RunData, axes: Axes) -> bool:
    xs, ys = thin(run.points("sync/probe_max_abs_diff"), max)
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
    legend(axes, "upper right", columns=2)
    return True


def _mismatch(run: RunData, axes: Axes) -> bool:
    axes.set_ylabel("effective share of samples")
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return trend(axes, run.points("mismatch/ess"), BLUE)


def _warmup(run: RunData, axes: Axes) -> bool:
    axes.set_xlabel("warm-up update")
    axes.set_ylabel("loss (nats a token)")
    drawn = trend(axes, run.points("warmup/loss", "warmup/step"), BLUE)
    if drawn:
        axes.set_ylim(bottom=0)
    return drawn


_PICTURES: tuple[tuple[str, str, str, Draw], ...] = (
    ("supervised", "Loss", "Should fall on both; held out it levels off.", _supervised),
    *PREFERENCE_PICTURES,
    ("reward", "Reward", "Should rise, on held-out prompts too.", _reward),
    (
        "pass_at",
        "pass@k",
        "How likely one of k answers passes, over prompts. k = 1 up and large k down: the policy narrows.",
        _pass_at,
    ),
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
    (
        "lag_split",
        "Where lag comes from",
        "In queue: sampled too early. In flight: slow to sample.",
        draw_lag_split,
    ),
    (
        "decisions",
        "What the scheduler decided",
        "S rises while the learner waits, and falls when samples drift; decisions.jsonl has the reasons.",
        draw_decisions,
    ),
    (
        "wait_causes",
        "What the learner waited for",
        "None is best; docs/metrics.md says what mends each.",
        draw_wait_causes,
    ),
    ("waits", "Who waits", "Both low is best; the learner high: more actors or a wider window.", _waits),
    ("proof", "Proof of weight sync", "Actors against learner on a probe batch after each sync.", _proof),
    ("mismatch", "Effective sample size", "Near 100 %: samples are still on-policy.", _mismatch),
    (
        "lengths",
        "Are long answers missed?",
        "Lengths of what was sampled and of what was trained on: the line should follow the area.",
        draw_lengths,
    ),
    (
        "drift",
        "Mismatch by lag",
        "The line starts at the engines' own difference; its slope is the drift of a learner step.",
        draw_drift,
    ),
    ("warmup", "Supervised warm-up", "Loss on demonstrations before reinforcement learning.", _warmup),
)

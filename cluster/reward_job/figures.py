"""The pictures of a reward model's report, from metrics.jsonl and evaluation.json."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cluster.drawing import BLUE, GREY, INK, ORANGE, RED, STYLE, legend, trend
from cluster.figures import Picture
from cluster.report_data import RunData

Draw = Callable[[RunData, Mapping[str, Any], Axes], bool]


def draw_reward_model(run: RunData, evaluation: Mapping[str, Any]) -> list[Picture]:
    """Every picture that there are data for, in the order of reading."""
    pictures = []
    for key, title, caption, draw in _PICTURES:
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(6.2, 3.3))
            figure.subplots_adjust(left=0.135, right=0.98, bottom=0.15, top=0.97)
            axes = figure.add_subplot()
            if not draw(run, evaluation, axes):
                continue
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        pictures.append(Picture(key, title, caption, buffer.getvalue()))
    return pictures


def _accuracy(run: RunData, evaluation: Mapping[str, Any], axes: Axes) -> bool:
    del evaluation
    drawn = trend(axes, run.points("preference/accuracy"), BLUE, "training batches")
    xs, ys = run.points("preference/heldout_accuracy")
    if xs:
        axes.plot(xs, ys, "o--", color=RED, ms=4, lw=1.1, label="held out")
    axes.set_xlabel("update")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("pairs in the right order")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    legend(axes, "lower right")
    return drawn or bool(xs)


def _loss(run: RunData, evaluation: Mapping[str, Any], axes: Axes) -> bool:
    del evaluation
    drawn = trend(axes, run.points("loss/preference"), BLUE, "training batches")
    xs, ys = run.points("preference/heldout_loss")
    if xs:
        axes.plot(xs, ys, "o--", color=RED, ms=4, lw=1.1, label="held out")
    axes.set_xlabel("update")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss (nats a pair)")
    legend(axes, "upper right")
    return drawn or bool(xs)


def _sets(run: RunData, evaluation: Mapping[str, Any], axes: Axes) -> bool:
    """Accuracy with its interval on each set of pairs, and on each subset of the held-out ones."""
    del run
    rows = [(name, found["accuracy"]) for name, found in evaluation.items() if name != "train"]
    rows += [
        (f"held out: {name}", found)
        for name, found in ((evaluation.get("heldout") or {}).get("subsets") or {}).items()
    ]
    rows = [row for row in rows if row[1]["value"] is not None]
    if not rows:
        return False
    rows = rows[:14]
    places = range(len(rows))
    values = [found["value"] for _, found in rows]
    # A single prompt has no interval.
    low = [0.0 if found["low"] is None else found["value"] - found["low"] for _, found in rows]
    high = [0.0 if found["high"] is None else found["high"] - found["value"] for _, found in rows]
    axes.barh(places, values, xerr=[low, high], color=BLUE, alpha=0.75, ecolor=INK, capsize=3, height=0.6)
    axes.axvline(0.5, color=RED, ls="--", lw=1.2)
    axes.set_yticks(list(places), ["held out" if name == "heldout" else name[:24] for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("pairs in the right order, 95 % interval")
    axes.figure.subplots_adjust(left=0.3)
    return True


def _reliability(run: RunData, evaluation: Mapping[str, Any], axes: Axes) -> bool:
    del run
    found = (evaluation.get("heldout") or {}).get("calibration")
    if not found or not found["bins"]:
        return False
    bins = found["bins"]
    most = max(one["count"] for one in bins)
    axes.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1.2, label="calibrated")
    axes.plot(
        [one["predicted"] for one in bins],
        [one["observed"] for one in bins],
        color=BLUE,
        label=f"this model: error {found['ece']:.3f}, by chance up to {found['ece_by_chance']:.3f}",
    )
    axes.scatter(
        [one["predicted"] for one in bins],
        [one["observed"] for one in bins],
        s=[12 + 120 * one["count"] / most for one in bins],
        color=BLUE,
        zorder=3,
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("predicted: σ(difference of raw scores)")
    axes.set_ylabel("preferred in fact")
    legend(axes, "best")
    return True


def _length(run: RunData, evaluation: Mapping[str, Any], axes: Axes) -> bool:
    del run
    found = evaluation.get("heldout") or {}
    points = found.get("points")
    if not points:
        return False
    correlation = (found.get("length") or {}).get("pearson")
    label = "held-out responses"
    if correlation and correlation["value"] is not None:
        label += f", correlation {correlation['value']:+.2f}"
    axes.scatter([x for x, _ in points], [y for _, y in points], s=9, color=ORANGE, alpha=0.6, label=label)
    axes.set_xlabel("length of the response (tokens)")
    axes.set_ylabel("score")
    legend(axes, "best")
    return True


_PICTURES: tuple[tuple[str, str, str, Draw], ...] = (
    (
        "accuracy",
        "Accuracy",
        "Ties count as wrong. Training far above held out: fewer epochs or more labels.",
        _accuracy,
    ),
    ("loss", "Loss", "Negative log-likelihood of the pairs; held out it should not rise again.", _loss),
    (
        "sets",
        "Where it is right",
        "Accuracy on each set of pairs; an interval that reaches the dashed line is no better than chance.",
        _sets,
    ),
    (
        "reliability",
        "Reliability",
        "Held-out pairs in a random order; a larger point has more. Says nothing where labels have no noise.",
        _reliability,
    ),
    (
        "score_length",
        "Score against length",
        "A slope is a length bias, of the labels or of the model; compare with what the length deserves.",
        _length,
    ),
)

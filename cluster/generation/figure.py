"""The picture of an evaluation: rewards of best-of-n against the KL that it costs, and pass@k."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.drawing import BLUE, GREEN, GREY, ORANGE, RED, STYLE, legend

_JUDGES = (ORANGE, GREEN, RED)


def draw_evaluation(found: Mapping[str, Any], path: Path) -> None:
    """Write the picture of evaluation.json's tables."""
    passes = found["pass_at_k"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5 if passes else 6.2, 4.0), layout="constrained")
        _curve(figure.add_subplot(1, 2 if passes else 1, 1), found["best_of_n"])
        if passes:
            _passes(figure.add_subplot(1, 2, 2), passes)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _curve(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The reward that chooses, and those that only judge, each with its band."""
    kls = [row["kl"]["mean"] for row in rows]
    _band(axes, kls, [row["reward"] for row in rows], BLUE, "reward (chooses)")
    for number, label in enumerate(rows[0]["judged"]):
        colour = _JUDGES[number % len(_JUDGES)]
        _band(axes, kls, [row["judged"][label] for row in rows], colour, f"{label} (judges)")
    for row in rows:
        axes.annotate(
            f"n={row['n']}",
            (row["kl"]["mean"], row["reward"]["mean"]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=GREY if not row["reliable"] else "black",
        )
    axes.set_xlabel("KL(best of n ‖ policy), nats")
    axes.set_ylabel("reward")
    axes.set_title("Best of n (grey labels: fewer than 4n samples)", fontsize=10)
    legend(axes, "best")


def _passes(axes: Axes, passes: Mapping[str, Any]) -> None:
    rows = passes["rows"]
    _band(axes, [row["k"] for row in rows], rows, BLUE, None)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("k")
    axes.set_ylabel(f"pass@k (reward ≥ {passes['threshold']:g})")
    axes.set_title("At least one of k samples passes", fontsize=10)


def _band(
    axes: Axes, xs: Sequence[float], rows: Sequence[Mapping[str, Any]], colour: str, label: str | None
) -> None:
    means = [row["mean"] for row in rows]
    halves = [row["ci95"] or 0.0 for row in rows]
    axes.plot(xs, means, color=colour, marker="o", markersize=3.5, label=label)
    axes.fill_between(
        xs,
        [mean - half for mean, half in zip(means, halves, strict=True)],
        [mean + half for mean, half in zip(means, halves, strict=True)],
        color=colour,
        alpha=0.15,
        lw=0,
    )

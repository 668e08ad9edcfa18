"""The picture of `length_bias`: a row a part, with gold, proxy, correlation with length, and accuracy."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.drawing import BLUE, GREEN, GREY, INK, ORANGE, RED, STYLE
from rewards.overoptimisation import fit_gao
from rewards.preferences.evaluation import best_of_n_kl

BY_BIAS = (BLUE, GREEN, ORANGE, RED)
BY_METHOD = {"bradley-terry": (RED, "o"), "residual": (BLUE, "s"), "odin": (GREEN, "^")}
Rows = list[dict[str, Any]]


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the picture of all parts that have a complete seed; none without any."""
    parts = {name: part["summary"] for name, part in results["parts"].items() if part.get("summary")}
    if not parts:
        return
    kl = np.array([best_of_n_kl(n) for n in results["sizes"]])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(15.5, 3.9 * len(parts)), layout="constrained")
        panels = figure.subplots(len(parts), 4, squeeze=False)
        for axes, (name, summary) in zip(panels, parts.items(), strict=True):
            rows, seeds = summary["table"], summary["seeds"]
            title = f"{name} reward models, {seeds} seed{'s' if seeds > 1 else ''}"
            _curves(axes[0], rows, "gold", kl, results["sizes"])
            axes[0].set_ylabel("gold reward of the best of n", color=INK)
            _curves(axes[1], rows, "proxy", kl, results["sizes"])
            axes[1].set_ylabel("proxy of the best of n, in sd", color=INK)
            axes[0].set_title(f"{title}\nBradley-Terry, dotted: d(α − βd)", fontsize=10, loc="left")
            _methods(axes[2], rows, "correlation", "ρ(reward, length)")
            axes[2].axhspan(-0.1, 0.1, color=GREY, alpha=0.2, lw=0)
            _methods(axes[3], rows, "accuracy_gold", "accuracy on pairs of known gold order")
        figure.savefig(path, dpi=110)


def _curves(axes: Axes, rows: Rows, name: str, kl: Any, sizes: list[int]) -> None:
    """A line a bias against d = √KL, with n above; gold with its interval and Gao's curve."""
    d = np.sqrt(kl)
    table = [row for row in rows if row["method"] == "bradley-terry"]
    for row, color in zip(table, BY_BIAS, strict=True):
        values = np.array(row[name])
        axes.plot(d, values, color=color, marker="o", ms=3.5, label=f"b = {row['bias']}")
        if name != "gold":
            continue
        if row["gold_ci95"][0]["low"] is not None:
            low, high = ([at[side] for at in row["gold_ci95"]] for side in ("low", "high"))
            axes.fill_between(d, low, high, color=color, alpha=0.15, lw=0)
        fit = fit_gao(kl[1:], values[1:], "best-of-n", origin=float(values[0]))
        if fit is not None:
            fine = np.linspace(0.0, d[-1], 100)
            axes.plot(fine, fit.curve(fine), color=color, ls=":", lw=1.1)
    axes.set_xlabel("d = √KL of best of n")
    above = axes.secondary_xaxis("top")
    above.set_xticks(d[[0, 1, 2, 3, 5, 7]], [f"n={sizes[0]}", *(str(sizes[i]) for i in (1, 2, 3, 5, 7))])
    above.tick_params(labelsize=8, length=2)
    axes.legend(loc="upper left" if name == "proxy" else "best")


def _methods(axes: Axes, rows: Rows, name: str, label: str) -> None:
    """A line a method against b, with intervals."""
    for shift, (method, (color, marker)) in zip((-0.003, 0.0, 0.003), BY_METHOD.items(), strict=True):
        table = [row for row in rows if row["method"] == method]
        b = np.array([row["bias"] for row in table]) + shift
        middle = np.array([row[name]["mean"] for row in table])
        half = [0.0 if row[name]["high"] is None else row[name]["high"] - row[name]["mean"] for row in table]
        axes.errorbar(b, middle, yerr=half, color=color, marker=marker, ms=5, capsize=3, label=method)
    axes.set_xlabel("length bias b of the labels")
    axes.set_ylabel(label, color=INK)
    axes.set_xticks([row["bias"] for row in rows if row["method"] == "odin"])
    axes.legend(loc="best")

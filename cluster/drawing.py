"""What all pictures share: colours, style, thinning of long series, trends and legends."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes

from cluster.report_data import Points, RunData

Draw = Callable[[RunData, Axes], bool]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8a94a0"
INK = "#26323d"
MOST_POINTS = 800

STYLE: Any = {
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


def trend(axes: Axes, points: Points, color: str, label: str | None = None) -> bool:
    """The values, and over them their moving mean where there are enough to need one."""
    xs, ys = thin(points)
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


def mean(values: Sequence[float]) -> float:
    """Σ values / n."""
    return sum(values) / len(values)


def thin(points: Points, combine: Callable[[Sequence[float]], float] = mean) -> Points:
    """At most `MOST_POINTS` points: neighbours are put together by `combine`, so no peak need be lost."""
    xs, ys = points
    size = -(-len(xs) // MOST_POINTS)
    if size <= 1:
        return xs, ys
    starts = range(0, len(xs), size)
    return [mean(xs[i : i + size]) for i in starts], [combine(ys[i : i + size]) for i in starts]


Place = Literal["best", "lower right", "upper right"]


def legend(axes: Axes, place: Place, columns: int = 1) -> None:
    """A legend where anything has a label."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc=place, ncols=columns)

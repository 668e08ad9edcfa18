"""The picture of a plan: step time and lag over S and actors, and a timeline of the chosen option."""

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cluster.drawing import BLUE, GREEN, GREY, INK, ORANGE, RED, STYLE
from cluster.plan import Option, Plan, Window
from cluster.sim_results import SimResult, Span

_MOST_LANES = 8
_LINES = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", INK)
_KINDS = {"training": BLUE, "publishing": RED, "scoring": GREEN, "loading": INK}


def draw(plan: Plan) -> bytes:
    """The picture as PNG."""
    lanes = len(_lanes(plan.timeline))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6 + 0.36 * (lanes + 2)), layout="constrained")
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[4, 0.36 * (lanes + 2) + 0.9])[
            :, 0
        ]
        times, lags = (upper.add_subplot(1, 2, place) for place in (1, 2))
        _curves(times, plan, [option.steady.step_s for option in plan.options], "time of a step (s)")
        _curves(
            lags,
            plan,
            [option.steady.lag_mean for option in plan.options],
            "mean lag of trained tokens (steps)",
        )
        _mark(times, plan, plan.chosen.steady.step_s)
        _mark(lags, plan, plan.chosen.steady.lag_mean)
        times.legend(title="rollout actors", loc="upper right")
        times.set_title("Time of a step", loc="left", fontsize=11)
        lags.set_title("Lag", loc="left", fontsize=11)
        handles = _timeline(lower.add_subplot(), plan)
        figure.legend(handles=handles, ncols=len(handles), loc="outside lower center")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


# ---- curves over S --------------------------------------------------------------------------------


def _place(plan: Plan, window: Window) -> int:
    return plan.request.windows.index(window)


def _curves(axes: Axes, plan: Plan, values: Sequence[float], label: str) -> None:
    windows = plan.request.windows
    for index, actors in enumerate(plan.request.actors):
        mine = [(o, value) for o, value in zip(plan.options, values, strict=True) if o.actors == actors]
        fixed = [(o, value) for o, value in mine if o.window != "adaptive"]
        color = _LINES[index % len(_LINES)]
        style = "-" if index < len(_LINES) else "--"
        axes.plot(
            [_place(plan, o.window) for o, _ in fixed],
            [v for _, v in fixed],
            style,
            color=color,
            marker="o",
            ms=4.5,
            label=str(actors),
        )
        for option, value in mine:
            if option.window == "adaptive":
                axes.plot(
                    _place(plan, option.window),
                    value,
                    "D",
                    color=color,
                    ms=6,
                    label=None if fixed else str(actors),
                )
    axes.set_xticks(range(len(windows)), [str(window) for window in windows])
    axes.set_xlabel("window S (largest lag, in learner steps)")
    axes.set_ylabel(label)
    axes.set_ylim(0, max([*values, 1e-9]) * 1.12)
    axes.margins(x=0.06)


def _mark(axes: Axes, plan: Plan, value: float) -> None:
    chosen: Option = plan.chosen
    place = _place(plan, chosen.window)
    axes.plot(place, value, "o", ms=15, mfc="none", mec=INK, mew=1.8, zorder=6)
    axes.annotate(
        f"recommended: {chosen.label}",
        (place, value),
        xytext=(10, -22 if value > 0.4 * axes.get_ylim()[1] else 20),
        textcoords="offset points",
        fontsize=9,
        color=INK,
        arrowprops={"arrowstyle": "-", "color": GREY, "shrinkB": 8},
        bbox={"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.85},
        zorder=7,
    )


# ---- timeline --------------------------------------------------------------------------------


def _lanes(result: SimResult) -> list[str]:
    """The actors that are shown: the first of them."""
    names = sorted(result.occupancy, key=lambda name: int(name.rsplit("-", 1)[1]))
    return names[:_MOST_LANES]


def _timeline(axes: Axes, plan: Plan) -> list[Patch]:
    """Draw the lanes; gives what a legend needs."""
    result = plan.timeline
    actors = _lanes(result)
    lanes = {"learner": 0, "scoring": 1} | {name: 2 + index for index, name in enumerate(actors)}
    start, end = result.shown
    for span in result.spans:
        if span.kind in _KINDS and span.who in lanes and span.end > start and span.start < end:
            _bar(axes, span, lanes[span.who], start)
    for name in actors:
        _area(axes, result, name, lanes[name])
    axes.set_ylim(len(lanes) - 0.45, -0.55)
    axes.set_xlim(0, (end - start) * 1.002)
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("seconds")
    more = (
        f" (the first {len(actors)} of {plan.chosen.actors} actors)"
        if len(actors) < plan.chosen.actors
        else ""
    )
    axes.set_title(
        f"A few steps of the recommended option: {plan.chosen.label}{more}", loc="left", fontsize=11
    )
    handles = [Patch(color=_SAMPLING, label="groups being sampled")]
    handles += [Patch(color=color, label=kind) for kind, color in _KINDS.items()]
    return handles


_SAMPLING = "#F2C879"


def _bar(axes: Axes, span: Span, lane: int, start: float) -> None:
    height = 0.86 if span.kind == "loading" else 0.62
    axes.barh(
        lane, span.end - span.start, left=span.start - start, height=height, color=_KINDS[span.kind],
        edgecolor="white", linewidth=0.0 if span.kind == "scoring" else 0.6,
        zorder=4 if span.kind == "loading" else 3,
    )  # fmt: skip
    width = (span.end - span.start) / max(1e-9, axes.get_xlim()[1])
    if span.kind == "training" and width > 0:
        axes.text(
            (span.start + span.end) / 2 - start, lane, f"step {span.step}", ha="center", va="center",
            color="white", fontsize=8, zorder=5, clip_on=True,
        )  # fmt: skip


def _area(axes: Axes, result: SimResult, name: str, lane: int) -> None:
    """How many groups an actor works on, as a filled step curve in its lane."""
    start, end = result.shown
    changes = result.occupancy[name]
    most = max(1, *(groups for points in result.occupancy.values() for _, groups in points))
    before = [groups for when, groups in changes if when <= start]
    points = [(start, before[-1] if before else 0), *(point for point in changes if start < point[0] <= end)]
    points.append((end, points[-1][1]))
    xs = [when - start for when, _ in points]
    heights = [lane + 0.36 - 0.72 * groups / most for _, groups in points]
    axes.fill_between(xs, heights, lane + 0.36, step="post", color=_SAMPLING, lw=0, zorder=2)

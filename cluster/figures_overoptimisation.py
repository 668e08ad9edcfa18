"""The report's pictures of over-optimisation: rewards against √KL with Gao's curves; what rules look at."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cluster.drawing import BLUE, GREEN, GREY, INK, ORANGE, RED, STYLE
from cluster.figures import Picture
from cluster.report_data import RunData
from rewards.overoptimisation import GaoFit, fit_gao

ROOT = "overoptimisation"
# The name of the value, its colour, and what it is called.
SERIES = (
    ("proxy", BLUE, "trained reward"),
    ("heldout", ORANGE, "held-out reward"),
    ("gold", GREEN, "gold reward"),
)


@dataclass(frozen=True, slots=True)
class Curve:
    """One reward at every evaluation, in order: step, √KL, value, half width of its interval (0: none)."""

    step: list[float]
    d: list[float]
    value: list[float]
    half: list[float]

    def fit(self) -> GaoFit | None:
        """Gao's form for reinforcement learning, through the first evaluation; None with too few points."""
        if len(self.d) < 4:
            return None
        kl = np.square(self.d[1:])
        return fit_gao(kl, self.value[1:], "rl", origin=self.value[0])


def curve(run: RunData, name: str) -> Curve | None:
    """A reward's curve; None where the run has not measured it twice."""
    rows = [
        (float(row.get("learner_step") or 0), float(d), float(y), float(row.get(f"{ROOT}/{name}_ci95") or 0))
        for row in run.metrics
        if (d := row.get(f"{ROOT}/kl_sqrt")) is not None and (y := row.get(f"{ROOT}/{name}")) is not None
    ]
    if len(rows) < 2:
        return None
    step, d, value, half = ([row[i] for row in rows] for i in range(4))
    return Curve(step, d, value, half)


def curves(run: RunData) -> dict[str, Curve]:
    """All that the run has measured, by name."""
    found = {name: curve(run, name) for name, _, _ in SERIES}
    return {name: one for name, one in found.items() if one is not None}


def draw_overoptimisation(run: RunData) -> list[Picture]:
    """The pictures that the run has data for."""
    wanted: tuple[tuple[str, str, str, Callable[[RunData, Axes], bool]], ...] = (
        (
            "overoptimisation",
            "Over-optimisation",
            "Rewards on held-out prompts as the policy leaves its reference. Dashed: Gao's form "
            "d(α − β log d), d = √KL. The trained reward rising while another falls is reward hacking.",
            _rewards,
        ),
        (
            "overoptimisation_rules",
            "What the stop rules look at",
            "Each signal as a share of its limit: above 1 the rule holds.",
            _rules,
        ),
    )
    pictures = []
    for key, title, caption, draw in wanted:
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(6.2, 3.3))
            figure.subplots_adjust(
                left=0.135, right=0.87 if draw is _rewards else 0.98, bottom=0.15, top=0.97
            )
            if not draw(run, figure.add_subplot()):
                continue
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        pictures.append(Picture(key, title, caption, buffer.getvalue()))
    return pictures


def _rewards(run: RunData, axes: Axes) -> bool:
    """The reward models' scale to the left; gold has one of its own to the right."""
    found = curves(run)
    if len(found) < 2:  # a proxy alone shows nothing
        return False
    axes.set_xlabel("√KL to the reference (√nats a sequence)")
    axes.set_ylabel("reward on held-out prompts")
    right = axes.twinx() if "gold" in found else None
    if right is not None:
        right.set_ylabel("gold reward", color=GREEN)
        right.grid(visible=False)
        right.spines["right"].set_visible(True)
    lines = []
    for name, color, label in SERIES:
        if (one := found.get(name)) is None:
            continue
        place = right if name == "gold" and right is not None else axes
        errors = one.half if any(one.half) else None
        bars = place.errorbar(one.d, one.value, errors, color=color, fmt="o-", ms=4, lw=1, capsize=3)
        lines.append((bars, label))
        _draw_fit(place, one, color)
    _mark(run, axes)
    axes.legend([line for line, _ in lines], [label for _, label in lines], loc="best")
    return True


def _draw_fit(axes: Axes, one: Curve, color: str) -> None:
    fit = one.fit()
    if fit is None:
        return
    d = np.linspace(0, max(one.d), 100)
    axes.plot(d, fit.curve(d), color=color, ls="--", lw=1.4)


def _mark(run: RunData, axes: Axes) -> None:
    """Vertical lines at the best evaluation and where a rule stopped the run."""
    best = run.summary.get("best")
    marks = [(best.get("step"), "best", GREY)] if isinstance(best, dict) else []
    stops = [
        d["learner_step"] for d in run.decisions if d.get("setting") == "stop" and d.get("action") == "stop"
    ]
    marks += [(step, "stopped", RED) for step in stops[-1:]]
    for step, text, color in marks:
        d = next((row.get(f"{ROOT}/kl_sqrt") for row in run.metrics if row.get("learner_step") == step), None)
        if d is None:
            continue
        left, right = axes.get_xlim()
        at_end = d > (left + 3 * right) / 4  # its word stands on the other side
        axes.axvline(d, color=color, ls=":", lw=1.4)
        axes.annotate(
            text,
            (d, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if at_end else 3, -10),
            textcoords="offset points",
            ha="right" if at_end else "left",
            color=color,
            fontsize=9,
        )


def _rules(run: RunData, axes: Axes) -> bool:
    """Gap, disagreement and KL over steps, each by its limit."""
    lines: list[tuple[list[float], list[float], str, str]] = []
    steps, gaps = run.points(f"{ROOT}/gap")
    if limit := run.setting("stop.gap_limit"):
        lines.append((steps, [gap / limit for gap in gaps], ORANGE, "gap"))
    steps, spread = run.points(f"{ROOT}/disagreement")
    limit = run.setting("stop.disagreement_limit")
    if spread and spread[0] > 0 and limit:
        lines.append((steps, [one / spread[0] / limit for one in spread], BLUE, "disagreement"))
    if budget := run.setting("stop.kl_limit"):
        steps, kl = run.points("heldout/kl_sequence")
        lines.append((steps, [one / budget for one in kl], INK, "KL"))
    drawn = [line for line in lines if len(line[0]) > 1 and all(math.isfinite(y) for y in line[1])]
    for xs, ys, color, label in drawn:
        axes.plot(xs, ys, "o-", ms=3, color=color, label=label)
    axes.axhline(1.0, color=RED, ls="--", lw=1.2)
    axes.set_xlabel("learner step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_ylabel("share of the limit")
    if drawn:
        axes.legend(loc="best")
    return bool(drawn)

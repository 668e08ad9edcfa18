"""`headrace plan`: what a job would do on a cluster that is not there yet, and which settings to choose.

Every option (actors, S, publish interval) is simulated with the real scheduler; see `cluster.simulate`.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.calibrate import Calibration
from cluster.config import JobConfig
from cluster.monitor import dump, write_atomically
from cluster.plan_memory import FORMULA, Memory, Sizes, derive_sizes, estimate
from cluster.plan_model import Workload, dump_workload
from cluster.sim_results import Plant, SimResult, Steady, plant_of
from cluster.simulate import Simulation

Window = int | Literal["adaptive"]

WINDOWS: tuple[Window, ...] = (0, 1, 2, 4, 8, "adaptive")
_NEAR = 1.05  # an option is as good as the fastest if its steps take at most this much longer
_GROUPS = 20_000  # that one simulation samples, about; some seconds for a plan
_SPAN_STEPS = 4


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a plan."""

    config: JobConfig
    workload: Workload
    actors: tuple[int, ...]
    windows: tuple[Window, ...] = WINDOWS
    publish_every: tuple[int, ...] = (1, 2, 4, 8)
    steps: int = 0  # 0: chosen by the batch
    seed: int = 0
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Option:
    """One choice of settings and what came of it; `allowed` is false where the drift at S is too large."""

    actors: int
    window: Window
    publish_every: int
    steady: Steady
    memory: Memory | None
    allowed: bool

    @property
    def label(self) -> str:
        """For people."""
        actors = "1 actor" if self.actors == 1 else f"{self.actors} actors"
        return f"{actors}, S = {self.window}"


@dataclass(frozen=True, slots=True)
class Plan:
    """All options, the chosen one and why."""

    request: Request
    options: list[Option]
    intervals: list[Option]  # the chosen actors and S with other publish intervals
    chosen: Option
    reason: str
    timeline: SimResult  # of the chosen option, with the spans of its last steps


# ---- options --------------------------------------------------------------------------------


def make_plan(request: Request) -> Plan:
    """Simulate every option and choose."""
    interval = min(request.publish_every)
    options = [
        simulate_option(request, actors, window, interval)
        for actors in request.actors
        for window in request.windows
    ]
    pair = choose(options)
    intervals = [pair]
    if pair.window != "adaptive":  # which sets the interval itself
        intervals += [
            simulate_option(request, pair.actors, pair.window, every)
            for every in sorted(request.publish_every)
            if interval < every <= pair.window + 1
        ]
    # Rarer weights are older weights: only where publishing costs more than a fiftieth of a step.
    fastest = min(option.steady.step_s for option in intervals)
    chosen = next(option for option in intervals if option.steady.step_s <= 1.02 * fastest)
    simulation = _simulation(request, chosen.actors, chosen.window, chosen.publish_every, _SPAN_STEPS)
    return Plan(request, options, intervals, chosen, _reason(options, intervals, chosen), simulation.run())


def simulate_option(request: Request, actors: int, window: Window, publish_every: int) -> Option:
    """One option."""
    result = _simulation(request, actors, window, publish_every).run()
    widest = request.config.scheduler.max_window if window == "adaptive" else window
    return Option(
        actors,
        window,
        publish_every,
        result.steady(),
        estimate(request.config, request.workload, actors=actors, window=widest),
        allowed=window == "adaptive" or _within_drift(request, window),
    )


def _simulation(
    request: Request, actors: int, window: Window, publish_every: int, spans: int = 0
) -> Simulation:
    settings = request.config.scheduler.model_copy(update={"window": window, "publish_every": publish_every})
    plant: Plant = dataclasses.replace(plant_of(request.config), actors=actors, scheduler=settings)
    steps = request.steps or max(32, min(96, _GROUPS // plant.groups_per_step))
    return Simulation(plant, request.workload, steps=steps, seed=request.seed, spans_of_steps=spans)


def _within_drift(request: Request, window: int) -> bool:
    drift, limits = request.workload.drift, request.config.scheduler
    kl, ess = drift.engine + drift.per_version * window, drift.ess_per_version**window
    return kl <= limits.max_drift and ess >= limits.min_ess


def choose(options: Sequence[Option]) -> Option:
    """Of the fixed windows that are near the fastest: fewest actors, then least lag, then smallest S.

    Windows whose drift is beyond `max_drift` or `min_ess` are left out, unless all of them are.
    """
    fixed = [option for option in options if isinstance(option.window, int)] or list(options)
    allowed = [option for option in fixed if option.allowed] or fixed
    fastest = min(option.steady.step_s for option in allowed)
    near = [option for option in allowed if option.steady.step_s <= _NEAR * fastest]
    return min(near, key=lambda o: (o.actors, round(o.steady.lag_mean, 2), _number(o.window)))


def _reason(options: Sequence[Option], intervals: Sequence[Option], chosen: Option) -> str:
    """Why, in sentences that a person can check against the table."""
    fixed = [option for option in options if isinstance(option.window, int) and option.allowed] or list(
        options
    )
    fastest = min(fixed, key=lambda option: option.steady.step_s)
    steady = chosen.steady
    parts = [
        f"{chosen.label}, weights every {chosen.publish_every} step(s): {_seconds(steady.step_s)} a step"
    ]
    if fastest.steady.step_s < steady.step_s:
        parts.append(
            f"The fastest ({fastest.label}) takes {_seconds(fastest.steady.step_s)}, at most 5 % less"
        )
    for what, others in (
        ("Fewer actors", [o for o in fixed if o.actors < chosen.actors]),
        (
            "A smaller window",
            [o for o in fixed if o.actors == chosen.actors and _number(o.window) < _number(chosen.window)],
        ),
    ):
        if others:
            best = min(others, key=lambda option: option.steady.step_s)
            if best.steady.step_s > chosen.steady.step_s:
                parts.append(f"{what}: {_seconds(best.steady.step_s)} at best")
    if any(not option.allowed for option in options):
        refused = min(_number(option.window) for option in options if not option.allowed)
        parts.append(f"S = {refused:g} and above drift too far (scheduler.max_drift, scheduler.min_ess)")
    generation, learner = steady.generation_s, steady.learner_s
    limit = "training" if learner >= generation else "sampling"
    parts.append(
        f"{limit.capitalize()} is the longer part: of a step an actor has work for {_seconds(generation)}, "
        f"the learner for {_seconds(learner)}; η = {steady.efficiency:.2f}, mean lag {steady.lag_mean:.2f}"
    )
    if len(intervals) > 1:
        times = ", ".join(f"{o.publish_every}: {_seconds(o.steady.step_s)}" for o in intervals)
        parts.append(f"Steps by publish interval: {times}")
    return ". ".join(parts) + "."


def _number(window: Window) -> float:
    return float("inf") if window == "adaptive" else window


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


# ---- output --------------------------------------------------------------------------------

_COLUMNS = (
    *("actors", "S", "publish", "step s", "tokens/s", "learner waits", "actors wait", "η", "lag mean", "max"),
    *("lag shares", "memory GiB"),
)


def table_rows(plan: Plan) -> Iterator[list[str]]:
    """The table's rows as text."""
    for option in [*plan.options, *plan.intervals[1:]]:
        steady, memory = option.steady, option.memory
        shares = sorted(steady.lag_shares.items(), key=lambda item: -item[1])[:3]
        yield [
            str(option.actors),
            str(option.window) + ("" if option.allowed else " !"),
            f"{steady.publish_every:.2g}",
            f"{steady.step_s:.4g}",
            f"{steady.tokens_per_s:.4g}",
            f"{steady.learner_wait_fraction:.0%}",
            f"{steady.rollout_wait_fraction:.0%}",
            f"{steady.efficiency:.2f}",
            f"{steady.lag_mean:.2f}",
            str(steady.lag_max),
            " ".join(f"{lag}:{share:.0%}" for lag, share in sorted(shares)),
            f"{memory.total:.3g}" if memory else "–",
            "*" if option is plan.chosen else "",
        ]


def show(plan: Plan) -> None:
    """Print the table, the choice and the notes: in colour on a terminal, plain text elsewhere."""
    rows = list(table_rows(plan))
    if sys.stdout.isatty():
        table = Table(title=Text(f"headrace plan: {plan.request.workload.source or 'workload'}"))
        for index, name in enumerate((*_COLUMNS, "")):
            table.add_column(name, justify="left" if index == 10 else "right")
        for row in rows:
            table.add_row(*row, style="bold green" if row[-1] else None)
        Console().print(table)
    else:
        header = [*_COLUMNS, ""]
        widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
        for line in [header, *rows]:
            cells = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            sys.stdout.write("  ".join(cells).rstrip() + "\n")
    if (calibration := plan.request.calibration) is not None:
        measured, simulated = calibration.measured, calibration.simulated
        sys.stdout.write(
            f"calibration: step {measured.step_s:.3g} s measured, {simulated.step_s:.3g} s simulated; "
            f"mean lag {measured.lag_mean:.3g} and {simulated.lag_mean:.3g}\n"
        )
    for note in plan.request.notes:
        sys.stdout.write(f"note: {note}\n")
    sys.stdout.write(f"recommended: {plan.reason}\n")
    chosen = plan.chosen
    sys.stdout.write(
        f"    --set rollout.actors={chosen.actors} --set scheduler.window={chosen.window} "
        f"--set scheduler.publish_every={chosen.publish_every}\n"
    )
    sys.stdout.write(f"sizes: {describe_sizes(sizes_of(plan))}\n")


def sizes_of(plan: Plan) -> Sizes | None:
    """Sizes of the recommended option's parts."""
    config, window = plan.request.config, plan.chosen.window
    widest = config.scheduler.max_window if window == "adaptive" else window
    return derive_sizes(config, plan.request.workload, window=widest)


def describe_sizes(sizes: Sizes | None) -> str:
    """For people, on one line."""
    if sizes is None:
        return "not known without the model's size; give size.parameters in --model, or a model's folder"
    return (
        f"{sizes.parameters:.4g} parameters, a copy of the weights {sizes.weights:.3g} GiB; "
        f"a learner rank: weights {sizes.rank_weights:.3g}, gradients {sizes.rank_gradients:.3g}, "
        f"Adam {sizes.rank_optimizer:.3g} GiB; a rollout actor: weights {sizes.weights:.3g}, "
        f"key-value cache {sizes.kv_cache:.3g} GiB; object store {sizes.object_store:.3g} GiB"
    )


def write(plan: Plan, folder: Path) -> list[Path]:
    """plan.json, plan.png and the workload, for another plan."""
    from cluster.plan_figures import draw

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "plan.json", dump(as_json(plan), indent=2) + "\n")
    write_atomically(folder / "workload.toml", dump_workload(plan.request.workload))
    (folder / "plan.png").write_bytes(draw(plan))
    return [folder / name for name in ("plan.json", "plan.png", "workload.toml")]


def as_json(plan: Plan) -> dict[str, Any]:
    """All of a plan as plain values."""
    request = plan.request
    calibration = request.calibration
    return {
        "workload": request.workload.model_dump(mode="json"),
        "calibration": None
        if calibration is None
        else {
            "steps": calibration.steps,
            "measured": dataclasses.asdict(calibration.measured),
            "simulated": dataclasses.asdict(calibration.simulated),
        },
        "notes": list(request.notes),
        "memory_formula": FORMULA,
        "sizes_gib": None if (sizes := sizes_of(plan)) is None else dataclasses.asdict(sizes),
        "options": [_option_json(option) for option in [*plan.options, *plan.intervals[1:]]],
        "recommended": _option_json(plan.chosen),
        "reason": plan.reason,
    }


def _option_json(option: Option) -> dict[str, Any]:
    memory = None
    if option.memory is not None:
        memory = {**dataclasses.asdict(option.memory), "total": option.memory.total}
    steady = dataclasses.asdict(option.steady)
    return {
        **steady,
        "window_mean": steady["window"],  # the adaptive rule moves both
        "publish_every_mean": steady["publish_every"],
        "actors": option.actors,
        "window": option.window,
        "publish_every": option.publish_every,
        "allowed": option.allowed,
        "memory_gib": memory,
    }

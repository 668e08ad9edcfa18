"""A workload from a run: how long things took there, from its trace (`rollouts.jsonl`) and metrics.

What is estimated from what:

- lengths: the quantiles of all trained responses, and their correlation within a group
- generation: time of a group = (longest length) · (τ₀ + τ₁ · sequences that ran beside it), least squares
- learner: time of a step = c₀ + c₁ · tokens
- shared cores: both are longer by a factor 1 + κ · (share of the time that the other one worked)
- scoring, publishing, loading and proving: as they were measured

At last the run itself is simulated, and generation and training are scaled until the times agree.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.special import ndtri

from cluster.config import JobConfig
from cluster.config_file import load_config
from cluster.monitor import METRICS, TRACE, read_rows
from cluster.plan_model import Workload
from cluster.sim_results import Plant, plant_of
from cluster.simulate import Simulation

Floats = NDArray[np.float64]

_WARM_UP_STEPS = 2  # compile and fill caches; left out of every estimate
_FEWEST_STEPS = 6
_SLOWDOWNS = np.linspace(0.0, 3.0, 31)  # κ that are tried
_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run measured, or a simulation of it: the figures that must agree."""

    step_s: float
    lag_mean: float
    sample_s: float
    train_s: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """A workload, the run's own settings, and how well the one gives back the times of the other."""

    workload: Workload
    config: JobConfig
    plant: Plant
    steps: int
    measured: Measured
    simulated: Measured


@dataclass(frozen=True, slots=True)
class _Trace:
    """The rows of rollouts.jsonl after the first steps; all times in seconds since the run began."""

    groups: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]
    training: Floats  # (steps, 2): from, to
    sampling: Floats  # (groups, 2): dispatched, sampled


def calibrate(run_dir: Path, *, cores: float = 0.0) -> Calibration:
    """Estimate a workload from a run folder. `cores`: how many its processes shared; 0: each has his own.

    Raises ValueError where the folder holds too little.
    """
    trace = _read(run_dir)
    rows = [row for row in read_rows(run_dir / METRICS) if row.get("learner_step")]
    config = load_config(run_dir / "config.toml")
    plant = plant_of(config)
    kappa = _slowdown(trace) if cores else 0.0
    workload = Workload.model_validate({"source": f"calibrated on {run_dir.name}, {len(trace.steps)} steps"})
    workload = workload.changed("lengths", kind="quantiles", **_lengths(trace))
    workload = workload.changed("generation", **_generation(trace, kappa, config))
    workload = workload.changed("scoring", **_scoring(trace, kappa, config.scoring.actors))
    workload = workload.changed("learner", **_learner(trace, kappa))
    workload = workload.changed("sync", **_sync(trace, rows, kappa))
    workload = workload.changed("drift", **_drift(rows))
    if cores:
        wanted = cores * (1 + kappa)  # of the learner and of the actors together
        learner = min(
            cores, float(config.learner.ranks * (config.learner.threads or max(1, config.learner.cores)))
        )
        actor = max(0.1, wanted - learner) / config.rollout.actors
        workload = workload.changed(
            "sharing",
            cores=float(cores),
            learner=learner,
            actor=actor,
            scoring=min(1.0, config.scoring.cores),
        )
    measured = measure(run_dir)
    steps = len(trace.steps) + _WARM_UP_STEPS
    workload, simulated = _matched(workload, plant, steps, measured)
    return Calibration(workload, config, plant, steps, measured, simulated)


def measure(run_dir: Path) -> Measured:
    """The figures of a run, without its first steps."""
    trace = _read(run_dir)
    ended = [float(step["train_to_s"]) for step in trace.steps]
    lags = [float(row["lag/mean"]) for row in read_rows(run_dir / METRICS) if row.get("lag/mean") is not None]
    periods = np.diff(ended)
    return Measured(
        step_s=_trimmed_mean(periods),  # a checkpoint or an evaluation between two steps is none of them
        lag_mean=float(np.mean(lags[_WARM_UP_STEPS:])),
        sample_s=float(np.mean(np.diff(trace.sampling, axis=1))),
        train_s=float(np.mean(np.diff(trace.training, axis=1))),
    )


def _read(run_dir: Path) -> _Trace:
    if not (run_dir / TRACE).is_file():
        raise ValueError(
            f"--run-dir {run_dir}: holds no {TRACE}; give the folder of a run with monitor.trace = true"
        )
    rows = list(read_rows(run_dir / TRACE))
    late = [row for row in rows if int(row.get("learner_step", 0)) > _WARM_UP_STEPS]
    groups = [
        row for row in late if "group" in row and "sampled_s" in row and int(row.get("attempts", 1)) == 1
    ]
    steps = [row for row in late if "train_to_s" in row]
    if len(steps) < _FEWEST_STEPS or not groups:
        raise ValueError(
            f"--run-dir {run_dir}: {TRACE} has {len(steps) + _WARM_UP_STEPS} learner steps, fewer than the "
            f"{_FEWEST_STEPS + _WARM_UP_STEPS} that an estimate needs; calibrate on a longer run"
        )
    return _Trace(
        groups,
        steps,
        training=np.array([[step["train_from_s"], step["train_to_s"]] for step in steps], dtype=float),
        sampling=np.array([[group["dispatched_s"], group["sampled_s"]] for group in groups], dtype=float),
    )


def _trimmed_mean(values: Floats) -> float:
    """Mean of all that are at most three times the median."""
    return float(np.mean(values[values <= 3 * np.median(values)]))


# ---- estimates --------------------------------------------------------------------------------


def _lengths(trace: _Trace) -> dict[str, Any]:
    samples = [group["lengths"] for group in trace.groups]
    everything = np.sort(np.concatenate(samples).astype(float))
    count = min(201, len(everything))
    quantiles = np.quantile(everything, np.linspace(0, 1, count))
    return {"quantiles": [float(q) for q in quantiles], "within_group": within_group(samples)}


def within_group(samples: Sequence[Sequence[int]]) -> float:
    """Correlation of two lengths of one group: intraclass correlation of their normal scores.

    ICC = (MSB − MSW) / (MSB + (n − 1) MSW), with the mean squares between and within groups.
    """
    size = min(map(len, samples))
    values = np.array([group[:size] for group in samples], dtype=float)
    if size < 2 or len(values) < 3 or np.ptp(values) == 0:
        return 0.0
    flat = np.sort(values.ravel())
    middle = (np.searchsorted(flat, values, "left") + np.searchsorted(flat, values, "right")) / 2
    scores = ndtri(np.clip(middle / values.size, 0.5 / values.size, 1 - 0.5 / values.size))
    between = size * scores.mean(axis=1).var(ddof=1)
    within = scores.var(axis=1, ddof=1).mean()
    total = between + (size - 1) * within
    return float(np.clip((between - within) / total if total else 0.0, 0.0, 0.95))


def overlap(spans: Floats, others: Floats) -> Floats:
    """Of each span the share that is covered by `others`, which do not overlap each other."""
    low = np.maximum(spans[:, None, 0], others[None, :, 0])
    high = np.minimum(spans[:, None, 1], others[None, :, 1])
    covered = np.maximum(0.0, high - low).sum(axis=1)
    return np.asarray(np.minimum(1.0, covered / np.maximum(1e-9, spans[:, 1] - spans[:, 0])))


def _beside(trace: _Trace) -> Floats:
    """Mean number of sequences that ran on a group's actor while it ran, its own included.

    A sequence of length L is taken to end at L / (longest of its group) of the group's time.
    """
    by_actor: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(trace.groups):
        by_actor[str(group["actor"])].append(index)
    mean = np.ones(len(trace.groups))
    for indices in by_actor.values():
        starts, ends = [], []
        for index in indices:
            (begin, end), lengths = (
                trace.sampling[index],
                np.array(trace.groups[index]["lengths"], dtype=float),
            )
            starts += [begin] * len(lengths)
            ends += list(begin + (end - begin) * lengths / lengths.max())
        # ∫ n dt up to t = Σ over sequences of the time they ran before t; by sums over sorted moments.
        first, last = np.sort(starts), np.sort(ends)
        for index in indices:
            begin, end = trace.sampling[index]
            mean[index] = (_area(first, last, end) - _area(first, last, begin)) / max(1e-9, end - begin)
    return np.maximum(mean, 1.0)


def _area(starts: Floats, ends: Floats, until: float) -> float:
    begun, done = np.searchsorted(starts, until), np.searchsorted(ends, until)
    return float(begun * until - starts[:begun].sum() - (done * until - ends[:done].sum()))


def _design(trace: _Trace) -> tuple[Floats, Floats, Floats]:
    """Of each group: (longest length, that times the sequences beside it), time, share of training in it."""
    longest = np.array([max(group["lengths"]) for group in trace.groups], dtype=float)
    columns = np.stack([longest, longest * _beside(trace)], axis=1)
    seconds = np.maximum(1e-9, trace.sampling[:, 1] - trace.sampling[:, 0])
    return columns, seconds, overlap(trace.sampling, trace.training)


def _fit_relative(columns: Floats, seconds: Floats) -> tuple[list[float], float]:
    """Non-negative least squares of relative errors: Σ (prediction / seconds − 1)²."""
    coefficients, residual = nnls(columns / seconds[:, None], np.ones(len(seconds)))
    return [float(value) for value in coefficients], float(residual**2 / len(seconds))


def _merged(spans: Floats) -> Floats:
    """The union of spans, as spans that do not overlap."""
    merged: list[list[float]] = []
    for begin, end in sorted(map(tuple, spans.tolist())):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return np.array(merged)


def _learner_columns(trace: _Trace) -> tuple[Floats, Floats]:
    tokens: dict[int, float] = defaultdict(float)
    for group in trace.groups:
        lengths = group["lengths"]
        tokens[int(group["learner_step"])] += sum(lengths) + len(lengths) * group.get("prompt_tokens", 0)
    counts = np.array([tokens[int(step["learner_step"])] for step in trace.steps])
    columns = np.stack([np.ones(len(counts)), counts], axis=1)
    if counts.std() < 0.05 * counts.mean():  # too much alike to tell a fixed part from one a token
        columns[:, 0] = 0.0
    return columns, trace.training[:, 1] - trace.training[:, 0]


def _slowdown(trace: _Trace) -> float:
    """κ: by how much sampling and training take longer while the other one works too. Least squares."""
    columns, seconds, trained = _design(trace)
    steps, step_seconds = _learner_columns(trace)
    sampled = overlap(trace.training, _merged(trace.sampling))
    errors = [
        _fit_relative(columns * (1 + kappa * trained)[:, None], seconds)[1]
        + _fit_relative(steps * (1 + kappa * sampled)[:, None], step_seconds)[1]
        for kappa in _SLOWDOWNS
    ]
    return float(_SLOWDOWNS[int(np.argmin(errors))])


def _generation(trace: _Trace, kappa: float, config: JobConfig) -> dict[str, Any]:
    columns, seconds, trained = _design(trace)
    (fixed, each), _ = _fit_relative(columns * (1 + kappa * trained)[:, None], seconds)
    most = float(config.rollout.max_num_seqs)
    floor = 1e-7
    return {
        "token_s": [
            [1.0, max(floor, fixed + each)],
            [max(2.0, most), max(floor, fixed + each * max(2.0, most))],
        ],
        "prompt_tokens": float(np.mean([group.get("prompt_tokens", 0) for group in trace.groups])),
    }


def _learner(trace: _Trace, kappa: float) -> dict[str, float]:
    columns, seconds = _learner_columns(trace)
    slower = (1 + kappa * overlap(trace.training, _merged(trace.sampling)))[:, None]
    (fixed, each), _ = _fit_relative(columns * slower, seconds)
    left = seconds / (columns * slower @ np.array([fixed, each]))
    return {"step_s": float(fixed), "token_s": float(each), "variation": float(min(0.5, np.std(left)))}


def _scoring(trace: _Trace, kappa: float, scorers: int) -> dict[str, float]:
    """Groups that were scored at one moment were one call, which began when its actor and they were there."""
    calls: dict[float, list[float]] = defaultdict(list)
    for group in trace.groups:
        calls[round(float(group["scored_s"]), 2)].append(float(group["sampled_s"]))
    ends = sorted(calls)
    spans, sizes = [], []
    for before, end in zip([-np.inf, *ends], ends, strict=False):
        begun = max(calls[end]) if scorers > 1 else max(min(calls[end]), before)
        spans.append([begun, max(begun + 1e-4, end)])
        sizes.append(len(calls[end]))
    calls_s = np.array(spans)
    slower = 1 + kappa * overlap(calls_s, trace.training)
    columns = np.stack([np.ones(len(sizes)), np.array(sizes, dtype=float)], axis=1)
    call, group_s = nnls(columns * slower[:, None], calls_s[:, 1] - calls_s[:, 0])[0]
    return {"call_s": float(call), "group_s": float(group_s)}


def _sync(trace: _Trace, rows: Sequence[Mapping[str, Any]], kappa: float) -> dict[str, float]:
    published = [step for step in trace.steps if "publish_to_s" in step]
    if not published:
        return {}
    sends = np.array([[step["publish_from_s"], step["publish_to_s"]] for step in published], dtype=float)
    publish = float(
        np.median((sends[:, 1] - sends[:, 0]) / (1 + kappa * overlap(sends, _merged(trace.sampling))))
    )
    done = [step for step in published if isinstance(step.get("loaded_s"), int | float)]
    spans = np.array([[step["publish_to_s"], step["loaded_s"]] for step in done], dtype=float)
    if not len(spans):
        return {"publish_s": publish}
    slower = 1 + kappa * overlap(spans, trace.training)
    total = float(np.median((spans[:, 1] - spans[:, 0]) / slower))
    loads = [row["timing_s/sync_load"] for row in rows if row.get("timing_s/sync_load") is not None]
    load = min(float(np.median(loads)) / float(np.median(slower)) if loads else total / 2, total)
    return {"publish_s": publish, "load_s": load, "probe_s": total - load}


def _drift(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, key in (("engine", "mismatch/engine"), ("per_version", "mismatch/drift")):
        values = [float(row[key]) for row in rows if row.get(key) is not None]
        if values:
            found[name] = max(0.0, float(np.median(values[len(values) // 2 :])))
    return found


# ---- the run itself, simulated ----------------------------------------------------------------


def _matched(workload: Workload, plant: Plant, steps: int, wanted: Measured) -> tuple[Workload, Measured]:
    """Scale generation and training until the simulated run takes as long for both as the real one did."""
    simulated = simulate_as(workload, plant, steps)
    for _ in range(_ROUNDS):
        slower = float(np.clip(wanted.sample_s / simulated.sample_s, 0.5, 2.0))
        longer = float(np.clip(wanted.train_s / simulated.train_s, 0.5, 2.0))
        if max(abs(slower - 1), abs(longer - 1)) < 0.01:
            break
        points = [[n, seconds * slower] for n, seconds in workload.generation.token_s]
        learner = workload.learner
        workload = workload.changed("generation", token_s=points).changed(
            "learner", step_s=learner.step_s * longer, token_s=learner.token_s * longer
        )
        simulated = simulate_as(workload, plant, steps)
    return workload, simulated


def simulate_as(workload: Workload, plant: Plant, steps: int, seeds: Sequence[int] = (0, 1, 2)) -> Measured:
    """The figures of a simulated run, over the same steps as `measure` takes; means over seeds."""
    steps = max(steps, _WARM_UP_STEPS + 2)
    found = [
        Simulation(plant, workload, steps=steps, seed=seed).run().steady((_WARM_UP_STEPS, steps))
        for seed in seeds
    ]
    return Measured(
        step_s=fmean(one.step_s for one in found),
        lag_mean=fmean(one.lag_mean for one in found),
        sample_s=fmean(one.sample_s for one in found),
        train_s=fmean(one.train_s for one in found),
    )

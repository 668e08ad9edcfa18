"""The command `headrace plan`: options in, table, plan.json and plan.png out."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.calibrate import Calibration, calibrate
from cluster.config import JobConfig
from cluster.config_file import load_config
from cluster.plan import WINDOWS, Request, Window, make_plan, show, write
from cluster.plan_memory import model_size
from cluster.plan_model import Workload, load_workload

_MOST_ACTORS = 100_000


def run_plan(options: argparse.Namespace) -> None:
    """Make a plan, print it, write its files. ValueError for what the user can mend."""
    config = load_config(options.config, options.overrides)
    workload, calibration, notes = _workload(options, config)
    if options.cores is not None:
        if options.cores < 0:
            raise ValueError(f"--cores {options.cores:g}: must be at least 0; 0 means that nothing is shared")
        workload = workload.changed("sharing", cores=float(options.cores))
    if not 0 <= options.steps <= 1_000_000 or 0 < options.steps < 4:
        raise ValueError(f"--steps {options.steps}: must be at least 4, or 0 to choose by the batch")
    if options.seed < 0:
        raise ValueError(f"--seed {options.seed}: must be at least 0")
    plan = make_plan(
        Request(
            config=config,
            workload=workload,
            actors=_actors(options.actors, config),
            windows=_windows(options.windows),
            publish_every=_numbers("--publish-every", options.publish_every, 1, 10_000) or (1, 2, 4, 8),
            steps=options.steps,
            seed=options.seed,
            calibration=calibration,
            notes=tuple(notes),
        )
    )
    show(plan)
    for path in write(plan, options.out):
        sys.stdout.write(f"wrote {path}\n")


def _workload(
    options: argparse.Namespace, config: JobConfig
) -> tuple[Workload, Calibration | None, list[str]]:
    if (options.run_dir is None) == (options.model is None):
        raise ValueError(
            "give exactly one of --run-dir (the folder of a run to take times from) and --model (a TOML file "
            "of times; docs/plan.md shows one)"
        )
    if options.model is not None:
        workload = load_workload(options.model, options.model_overrides)
        if not workload.size.parameters and config.model.path:
            workload = workload.changed("size", **model_size(Path(config.model.path)))
        return workload, None, []
    if options.model_overrides:
        raise ValueError(f"--set-model {options.model_overrides[0]}: belongs to --model, which is not given")
    if not options.run_dir.is_dir():
        raise ValueError(f"--run-dir {options.run_dir}: there is no such folder; give the folder of a run")
    calibration = calibrate(options.run_dir, cores=_shared_cores(options.run_dir))
    sizes = (model_size(options.run_dir / place) for place in ("reference", "inputs/model"))
    workload = calibration.workload.changed("size", **next((size for size in sizes if size), {}))
    return workload, calibration, _differences(calibration.config, config)


def _shared_cores(run_dir: Path) -> float:
    """Cores that the run's processes shared: this machine's, where the run started a Ray of its own."""
    config = load_config(run_dir / "config.toml")
    return 0.0 if config.cluster.address else float(os.cpu_count() or 1)


def _differences(run: JobConfig, planned: JobConfig) -> list[str]:
    """Settings on which measured times depend and that the plan has otherwise."""
    pairs = {
        "model": (run.model, planned.model),
        "rollout.max_new_tokens": (run.rollout.max_new_tokens, planned.rollout.max_new_tokens),
        "learner.ranks": (run.learner.ranks, planned.learner.ranks),
        "learner.precision": (run.learner.precision, planned.learner.precision),
        "learner.threads": (run.learner.threads, planned.learner.threads),
        "ppo.epochs": (run.ppo.epochs, planned.ppo.epochs),
    }
    changed = [name for name, (before, after) in pairs.items() if before != after]
    return [f"{name} differs from the calibration run, whose times are used all the same" for name in changed]


def _actors(given: str | None, config: JobConfig) -> tuple[int, ...]:
    own = config.rollout.actors
    return _numbers("--actors", given, 1, _MOST_ACTORS) or tuple(
        sorted({max(1, own // 2), own, 2 * own, 4 * own})
    )


def _windows(given: str | None) -> tuple[Window, ...]:
    if given is None:
        return WINDOWS
    words = [word.strip() for word in given.split(",")]
    numbers = _numbers("--windows", ",".join(word for word in words if word != "adaptive") or None, 0, 10_000)
    return (*numbers, "adaptive") if "adaptive" in words else numbers


def _numbers(option: str, given: str | None, least: int, most: int) -> tuple[int, ...]:
    """Whole numbers with commas between them, sorted, each once; () where none are given."""
    if given is None:
        return ()
    words: Sequence[str] = [word.strip() for word in given.split(",")]
    if not all(word.isdecimal() and least <= int(word) <= most for word in words):
        raise ValueError(f"{option} {given!r}: must be whole numbers from {least} to {most}, as in 1,2,4")
    return tuple(sorted({int(word) for word in words}))

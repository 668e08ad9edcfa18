"""How well `headrace plan` foretells runs: calibrated on one, compared with that one and with the others.

    python -m benchmarks.plan_accuracy [--workloads tail even] [--steps 40] [--keep FOLDER] [--compare-only]

Runs of one job from one policy that differ in the window alone, with one thread for the learner and one for
the engine, and without evaluations between their steps. Of each workload every run with S ≥ 1 is calibrated
on in turn, and the simulator's step time and mean lag are compared with all of them. As in `time_to_reward`,
the seconds of a run are those that a machine of the median run's speed would have taken. Writes
plan_accuracy.json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.machine import describe, seconds_of_fixed_work
from benchmarks.time_to_reward import train, warmed_up
from benchmarks.workloads import WORKLOADS, config
from cluster.calibrate import calibrate, measure, simulate_as
from cluster.config_file import load_config
from cluster.monitor import METRICS, read_rows
from cluster.sim_results import plant_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "plan_accuracy.json"
WINDOWS = (0, 1, 2, 4, 8)
SPEEDS = "speeds.json"
OWN_LIMIT, OTHER_LIMIT = 0.10, 0.20


def make_runs(workload: str, steps: int, folder: Path) -> None:
    """One run for each window, one after the other, and the machine's speed before and after each."""
    model = warmed_up(workload, 0, folder)
    speeds: dict[str, list[float]] = {}
    for window in WINDOWS:
        print(f"{workload}, S={window} …", flush=True)
        name = f"S={window}"
        overrides = [f"run.steps={steps}", f"scheduler.window={window}", "run.evaluate_prompts=8"]
        overrides += ["learner.threads=1", "rollout.threads=1"]
        before = seconds_of_fixed_work()
        train(config(workload, folder / "data", str(model)), folder / name, overrides)
        speeds[name] = [before, seconds_of_fixed_work()]
        (folder / SPEEDS).write_text(json.dumps(speeds), encoding="utf-8")


def compare(workload: str, folder: Path, cores: float) -> list[dict[str, Any]]:
    """Every run against its simulation, by the run that the simulator was calibrated on."""
    speeds = {name: mean(both) for name, both in json.loads((folder / SPEEDS).read_text("utf-8")).items()}
    usual = median(speeds.values())
    rows = []
    for on in (f"S={window}" for window in WINDOWS if window):
        model = calibrate(folder / on, cores=cores).workload
        for name, speed in speeds.items():
            run = folder / name
            real = measure(run)
            steps = max(int(row["learner_step"]) for row in read_rows(run / METRICS))
            simulated = simulate_as(model, plant_of(load_config(run / "config.toml", [])), steps)
            step = real.step_s * usual / speed
            foretold = simulated.step_s * usual / speeds[on]
            rows.append(
                {
                    "workload": workload,
                    "calibrated_on": on,
                    "run": name,
                    "step_s": [step, foretold],
                    "step_error": foretold / step - 1,
                    "lag_mean": [real.lag_mean, simulated.lag_mean],
                    "lag_error": simulated.lag_mean / real.lag_mean - 1 if real.lag_mean else None,
                    "fixed_work_s": speed,
                }
            )
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By workload: how many errors of step time and mean lag keep to the limits, and the largest of each."""
    table: dict[str, Any] = {}
    for workload in sorted({row["workload"] for row in rows}):
        mine = [row for row in rows if row["workload"] == workload]
        for kind, limit in (("own", OWN_LIMIT), ("other", OTHER_LIMIT)):
            chosen = [row for row in mine if (row["run"] == row["calibrated_on"]) == (kind == "own")]
            for what in ("step_error", "lag_error"):
                errors = [abs(row[what]) for row in chosen if row[what] is not None]
                table.setdefault(workload, {})[f"{kind}_{what}"] = {
                    "limit": limit,
                    "within": sum(error <= limit for error in errors),
                    "of": len(errors),
                    "median": median(errors),
                    "largest": max(errors),
                }
    return table


def show(rows: list[dict[str, Any]]) -> None:
    """The comparison as text."""
    for row in rows:
        lag = "" if row["lag_error"] is None else f" ({row['lag_error']:+.0%})"
        print(
            f"{row['workload']:9s} on {row['calibrated_on']}: {row['run']} step {row['step_s'][0]:.2f} s, "
            f"foretold {row['step_s'][1]:.2f} s ({row['step_error']:+.0%}); mean lag "
            f"{row['lag_mean'][0]:.2f}, foretold {row['lag_mean'][1]:.2f}{lag}"
        )


def main() -> None:
    """Run, calibrate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["tail", "even"], choices=WORKLOADS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cores", type=float, default=2.0, help="cores that all parts share")
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    parser.add_argument("--compare-only", action="store_true", help="on the runs that --keep has")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for workload in options.workloads:
            folder = (options.keep or Path(temporary)) / workload
            if not options.compare_only:
                make_runs(workload, options.steps, folder)
            rows += compare(workload, folder, options.cores)
    show(rows)
    command = "python -m benchmarks.plan_accuracy"
    results = {"command": command, "machine": describe(), "summary": summarise(rows), "runs": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results["summary"], indent=1))


if __name__ == "__main__":
    main()

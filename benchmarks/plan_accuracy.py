"""How well `headrace plan` foretells runs: calibrated on one, compared with that one and with the others.

    python -m benchmarks.plan_accuracy FOLDER [--on S=1]

FOLDER holds finished runs of one job that differ in settings, each in a folder of its own, for example
`tail/seed-0` of `python -m benchmarks.time_to_reward --keep …`. Writes plan_accuracy.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from cluster.calibrate import Measured, calibrate, measure, simulate_as
from cluster.config_file import load_config
from cluster.monitor import METRICS, TRACE, read_rows
from cluster.sim_results import plant_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "plan_accuracy.json"


def steps_of(run: Path) -> int:
    """Learner steps of a run."""
    return max(int(row["learner_step"]) for row in read_rows(run / METRICS))


def compare(run: Path, workload: Any) -> dict[str, Any]:
    """A run's figures and those that the simulator gives for its settings."""
    real = measure(run)
    simulated = simulate_as(workload, plant_of(load_config(run / "config.toml", [])), steps_of(run))
    return {
        "run": run.name,
        "step_s": [real.step_s, simulated.step_s],
        "step_error": simulated.step_s / real.step_s - 1,
        "lag_mean": [real.lag_mean, simulated.lag_mean],
        "lag_error": _relative(real, simulated),
    }


def _relative(real: Measured, simulated: Measured) -> float | None:
    return simulated.lag_mean / real.lag_mean - 1 if real.lag_mean else None


def main() -> None:
    """Calibrate on one run and compare all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--on", default="S=1", help="name of the run to calibrate on")
    parser.add_argument("--cores", type=float, default=2.0, help="cores that all parts share")
    options = parser.parse_args()
    calibration = calibrate(options.folder / options.on, cores=options.cores)
    rows = []
    for run in sorted(options.folder.iterdir()):
        if not (run / TRACE).is_file() or steps_of(run) < 8:
            continue
        rows.append(compare(run, calibration.workload) | {"calibrated_on": options.on})
        row = rows[-1]
        lag = "" if row["lag_error"] is None else f" ({row['lag_error']:+.0%})"
        print(
            f"{row['run']:10s} step {row['step_s'][0]:.2f} s, simulated {row['step_s'][1]:.2f} s "
            f"({row['step_error']:+.0%}); mean lag {row['lag_mean'][0]:.2f}, simulated "
            f"{row['lag_mean'][1]:.2f}{lag}"
        )
    command = f"python -m benchmarks.plan_accuracy {options.folder.name} --on {options.on}"
    results = {"command": command, "machine": describe(), "runs": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

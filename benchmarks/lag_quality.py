"""What lag costs, with and without correction: held-out reward after the same number of learner steps.

    python -m benchmarks.lag_quality [--lags 8] [--corrections none tis] [--seeds 3]

The workload is the one with the length tail; with a window of 8 its queue stays full, and the mean lag
comes close to the window: a forced lag of 8. All runs of a seed start from one policy and have the same data.
The synchronous runs, and those of each lag with the coupled ratio, are those of time_to_reward.json: run
`benchmarks.time_to_reward` first, and with the same `--keep`. Each finished run is added to lag_quality.json
at once, so an interrupted benchmark goes on where it was.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from scipy import stats

from benchmarks.machine import StolenTime, describe
from benchmarks.time_to_reward import EVALUATIONS, MODES, least_disturbed, train, warmed_up
from benchmarks.time_to_reward import RESULTS as TIME_TO_REWARD
from benchmarks.workloads import config
from cluster.monitor import read_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "lag_quality.json"
WORKLOAD = "tail"
DECOUPLED = "correction.ratio=proximal"
CORRECTIONS = {
    "none": [DECOUPLED],
    "tis": [DECOUPLED, "correction.weights=tis"],
    "tis+m2po": [DECOUPLED, "correction.weights=tis", "correction.mask=m2po"],
    "icepop": [DECOUPLED, "correction.weights=icepop"],
    "damped": [DECOUPLED, "correction.weights=tis", "correction.damp_lr_by_ess=token"],
}


def one_run(lag: int, correction: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train at one window with one correction."""
    model = warmed_up(WORKLOAD, seed, folder)
    run = folder / f"lag-{lag}-{correction}"
    clock = time.monotonic()
    stolen = StolenTime(clock)
    overrides = [f"run.steps={steps}", f"run.seed={seed}", f"scheduler.window={lag}"]
    overrides += ["learner.threads=1", "rollout.threads=1"]
    overrides += [f"run.evaluate_every={steps // EVALUATIONS}", "run.evaluate_pauses=true"]
    train(config(WORKLOAD, folder / "data", str(model)), run, [*overrides, *CORRECTIONS[correction]])
    rows = [row for row in read_rows(run / "metrics.jsonl") if row.get("timing_s/step")]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    late = rows[len(rows) // 4 :]
    return {
        "lag": lag,
        "correction": correction,
        "seed": seed,
        "steps": steps,
        "lag_mean": mean(row["lag/mean"] for row in late),
        "reward_final": summary["reward_final"],
        "mismatch_kl": mean(row["mismatch/kl"] for row in late),
        "ess": mean(row["mismatch/ess"] for row in late),
        "cpu_stolen_fraction": stolen.share(time.monotonic()),
    }


def coupled_runs() -> list[dict[str, Any]]:
    """The runs of the other benchmark on this workload, as this one has them."""
    if not TIME_TO_REWARD.exists():
        return []
    kept = ("seed", "steps", "lag_mean", "reward_final", "mismatch_kl", "ess")
    return [
        {"lag": int(MODES[run["mode"]]), "correction": "coupled", **{key: run[key] for key in kept}}
        for run in least_disturbed(json.loads(TIME_TO_REWARD.read_text(encoding="utf-8"))["runs"])
        if run["workload"] == WORKLOAD and MODES[run["mode"]].isdigit()
    ]


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By lag and correction: mean reward, and its difference to the synchronous run of the same seed."""
    sync = {run["seed"]: run["reward_final"] for run in runs if run["lag"] == 0}
    table = []
    for lag, correction in sorted({(run["lag"], run["correction"]) for run in runs}):
        mine = [run for run in runs if (run["lag"], run["correction"]) == (lag, correction)]
        gaps = [run["reward_final"] - sync[run["seed"]] for run in mine if run["seed"] in sync]
        half = None
        if len(gaps) > 1:
            half = float(stats.t.ppf(0.975, len(gaps) - 1) * stats.sem(gaps))
        table.append(
            {
                "lag": lag,
                "correction": correction,
                "seeds": len(mine),
                "reward_final": mean(run["reward_final"] for run in mine),
                "against_sync": mean(gaps) if gaps else None,
                "against_sync_ci95_half": half,
                "lag_mean": mean(run["lag_mean"] for run in mine),
                "mismatch_kl": mean(run["mismatch_kl"] for run in mine),
                "ess": mean(run["ess"] for run in mine),
            }
        )
    return table


def main() -> None:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lags", type=int, nargs="+", default=[8])
    parser.add_argument("--corrections", nargs="+", default=["none", "tis"], choices=CORRECTIONS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further run after so long")
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"runs": []}
    done = {(run["lag"], run["correction"], run["seed"]) for run in results["runs"]}
    cells = [(lag, name) for lag in options.lags for name in options.corrections]
    ends = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for seed in range(options.seeds):
            for lag, correction in cells:
                if (lag, correction, seed) in done or time.monotonic() > ends:
                    continue
                print(f"lag {lag}, {correction}, seed {seed} …", flush=True)
                place = folder / WORKLOAD / f"seed-{seed}"
                results["runs"].append(one_run(lag, correction, seed, options.steps, place))
                results |= {"command": "python -m benchmarks.lag_quality", "machine": describe()}
                RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if results["runs"]:
        results["summary"] = summarise([*coupled_runs(), *results["runs"]])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for row in results.get("summary", []):
        half = row["against_sync_ci95_half"]
        gap = "" if row["against_sync"] is None else f", against sync {row['against_sync']:+.3f}"
        print(
            f"S = {row['lag']}, {row['correction']:8s} reward {row['reward_final']:.3f}{gap}"
            f"{'' if half is None else f' ± {half:.3f}'} ({row['seeds']} seeds; mean lag "
            f"{row['lag_mean']:.1f}, KL {row['mismatch_kl']:.4f}, ESS {row['ess']:.3f})"
        )


if __name__ == "__main__":
    main()

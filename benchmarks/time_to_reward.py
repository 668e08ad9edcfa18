"""Wall-clock to the same held-out reward: synchronous, fixed windows and the adaptive one, paired over seeds.

    python -m benchmarks.time_to_reward [--workloads tail verifier even] [--seeds 3] [--steps 40]
    python -m benchmarks.time_to_reward --summarise

Every run of a seed starts from the same warmed-up policy and the same data. `scheduler.window` differs, and
the threads: on two cores that all share, the synchronous run gives learner and engine two each, which is its
best, and the others one each, which is theirs. The clock is `time/training_s`: what training takes, without
start-up and the pauses for evaluation (what is in flight when one begins comes back on the clock). The target
of a workload and seed is the reward at which the synchronous run has made 80 % of its own gain. All runs of
a seed begin with the same policy, so their first evaluations are averaged; and each curve is made monotone by
least squares (isotonic regression), so that one lucky evaluation is no hit. Each finished run is added to
time_to_reward.json at once, so an interrupted benchmark goes on where it was. The speed of a shared machine
changes from hour to hour: the same matrix products are timed before and after each run, and the run's seconds
are divided by how much longer they took than in the median run of its seed. What one run sees change within
itself cannot be mended so: where its host kept back more than MOST_STOLEN of the cores, or the products took
more than MOST_UNEVEN times as long after the run as before it, or the reverse, the seed is made again whole,
up to --attempts times; of several the attempt counts that was least uneven.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from scipy import optimize, stats

from benchmarks.machine import StolenTime, describe, seconds_of_fixed_work
from benchmarks.workloads import WARM_UP, WORKLOADS, config, write_data
from cluster.monitor import read_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "time_to_reward.json"
MODES = {"sync": "0", "S=1": "1", "S=2": "2", "S=4": "4", "S=8": "8", "adaptive": "adaptive"}
# On two shared cores: where phases alternate each may use both, where they overlap each has one.
THREADS = {"sync": 2}
EVALUATIONS = 5
MOST_STOLEN = 0.05
MOST_UNEVEN = 1.15
GAIN = 0.8  # share of the synchronous run's gain that is the target


def train(text: str, folder: Path, overrides: list[str]) -> None:
    """One job in a process of its own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / f"{folder.name}.toml"
    file.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "cluster.cli", "train", str(file), "--run-dir", str(folder)]
    for override in overrides:
        command += ["--set", override]
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        subprocess.run(command, cwd=HERE.parent, check=True, stdout=log, stderr=subprocess.STDOUT)


def warmed_up(workload: str, seed: int, folder: Path) -> Path:
    """The policy that all modes of this workload and seed start from."""
    data = folder / "data"
    run = folder / "warm-up"
    if not (run / "summary.json").exists():
        write_data(workload, seed, data)
        train(
            config(workload, data, "") + WARM_UP.format(data=data),
            run,
            ["run.steps=1", f"run.seed={seed}", "optimizer.lr=1e-9"],
        )
    return run / "reference"


def one_run(workload: str, seed: int, mode: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train in one mode and say what came of it."""
    data = folder.parent / "data"
    model = warmed_up(workload, seed, folder.parent)
    run = folder / mode
    speeds = [seconds_of_fixed_work()]
    clock = time.monotonic()
    stolen = StolenTime(clock)
    threads = THREADS.get(mode, 1)
    overrides = [f"run.steps={steps}", f"run.seed={seed}", f"scheduler.window={MODES[mode]}"]
    overrides += [f"learner.threads={threads}", f"rollout.threads={threads}"]
    train(
        config(workload, data, str(model)),
        run,
        [*overrides, f"run.evaluate_every={steps // EVALUATIONS}", "run.evaluate_pauses=true"],
    )
    taken = stolen.share(time.monotonic())
    speeds.append(seconds_of_fixed_work())
    rows = list(read_rows(run / "metrics.jsonl"))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    steps_rows = [row for row in rows if row.get("timing_s/step")]
    steady = steps_rows[len(steps_rows) // 4 :]
    return {
        "workload": workload,
        "seed": seed,
        "mode": mode,
        "steps": steps,
        "curve": [
            [row.get("time/training_s", 0.0), row["heldout/reward"]]
            for row in rows
            if row.get("heldout/reward") is not None
        ],
        "training_s": steps_rows[-1]["time/training_s"],
        "step_s_median": median(row["timing_s/step"] for row in steady),
        "learner_step_s_median": median(row["timing_s/learner_step"] for row in steady),
        "wait_fraction": sum(row["wait/learner_s"] for row in steady)
        / sum(row["timing_s/step"] for row in steady),
        "wait_by_cause_s": summary["wait_by_cause"],
        "rollout_wait_fraction": summary["rollout_wait_fraction"],
        "efficiency": mean(row["perf/efficiency"] for row in steady),
        "scoring_saturated_median": median(row["perf/scoring_saturated_fraction"] for row in steady),
        "scheduler_share": sum(row["timing_s/scheduler"] for row in steady)
        / sum(row["timing_s/step"] for row in steady),
        "lag_mean": summary["lag_mean"],
        "lag_max": summary["lag_max"],
        "window_final": summary["window_final"],
        "reward_final": summary["reward_final"],
        "mismatch_kl": mean(row["mismatch/kl"] for row in steady),
        "ess": mean(row["mismatch/ess"] for row in steady),
        "cpu_stolen_fraction": taken,
        "fixed_work_s": speeds,
    }


def monotone(curves: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    """Least-squares rising curves; all begin with the same policy: with the mean of their first points."""
    start = mean(curve[0][1] for curve in curves.values())
    weights = [len(curves), *[1] * (len(next(iter(curves.values()))) - 1)]
    made = {}
    for mode, curve in curves.items():
        rewards = [start, *(reward for _, reward in curve[1:])]
        fitted = optimize.isotonic_regression(rewards, weights=weights[: len(rewards)]).x
        made[mode] = [[moment, float(reward)] for (moment, _), reward in zip(curve, fitted, strict=True)]
    return made


def time_to(curve: list[list[float]], target: float) -> float | None:
    """The moment at which the curve first reaches the target, linear between evaluations."""
    if curve[0][1] >= target:
        return 0.0
    for (t0, r0), (t1, r1) in pairwise(curve):
        if r1 >= target:
            return t0 + (t1 - t0) * (target - r0) / (r1 - r0)
    return None


def attempts_of(runs: list[dict[str, Any]], workload: str, seed: int) -> dict[int, dict[str, dict[str, Any]]]:
    """The runs of a workload and seed by attempt and mode."""
    found: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for run in runs:
        if (run["workload"], run["seed"]) == (workload, seed):
            found[run.get("attempt", 0)][run["mode"]] = run
    return found


def most_stolen(attempt: dict[str, dict[str, Any]]) -> float:
    """Share of its cores that the run of the attempt lost that lost most."""
    return max(float(run["cpu_stolen_fraction"]) for run in attempt.values())


def unevenness(attempt: dict[str, dict[str, Any]]) -> float:
    """Most by which the machine's speed changed between the two ends of one run; infinite where unknown."""
    return max(_change(run.get("fixed_work_s")) for run in attempt.values())


def _change(seconds: list[float] | None) -> float:
    return max(seconds) / min(seconds) if seconds else math.inf


def at_one_speed(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of one workload and seed, their seconds as a machine of the median run's speed would have taken.

    Runs whose speed was not measured stay as they are.
    """
    if any("fixed_work_s" not in run for run in runs):
        return runs
    usual = median(mean(run["fixed_work_s"]) for run in runs)
    scaled = []
    for run in runs:
        factor = usual / mean(run["fixed_work_s"])
        timed = {
            name: run[name] * factor for name in ("training_s", "step_s_median", "learner_step_s_median")
        }
        curve = [[moment * factor, reward] for moment, reward in run["curve"]]
        scaled.append(run | timed | {"curve": curve, "speed_factor": factor})
    return scaled


def least_disturbed(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each workload and seed one attempt, at one speed: of those with most modes the most even."""
    chosen: list[dict[str, Any]] = []
    for workload, seed in sorted({(run["workload"], run["seed"]) for run in runs}):
        attempts = attempts_of(runs, workload, seed).values()
        best = min(attempts, key=lambda one: (-len(one), unevenness(one), most_stolen(one)))
        chosen += at_one_speed([*best.values()])
    return chosen


def speedups_of(curves: dict[str, list[list[float]]]) -> dict[str, float | None]:
    """Sync's time to GAIN of its own gain over each mode's; None for a mode that does not reach it."""
    fitted = monotone(curves)
    first, last = (fitted["sync"][place][1] for place in (0, -1))
    target = first + GAIN * (last - first)
    base = time_to(fitted["sync"], target)
    times = {mode: time_to(curve, target) for mode, curve in fitted.items()}
    return {mode: base / reached if base and reached else None for mode, reached in times.items()}


def pooled(runs: list[dict[str, Any]]) -> dict[str, float | None]:
    """`speedups_of` the mean curves over seeds: one evaluation's luck counts less than seed by seed."""
    curves: dict[str, list[list[float]]] = {}
    for mode in {run["mode"] for run in runs}:
        points = zip(*(run["curve"] for run in runs if run["mode"] == mode), strict=True)
        curves[mode] = [[mean(values) for values in zip(*point, strict=True)] for point in points]
    return speedups_of(curves)


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By workload and mode: speed-up over sync to the same reward, by seed and pooled, and its causes."""
    table: dict[str, Any] = {}
    for workload in WORKLOADS:
        mine = [run for run in runs if run["workload"] == workload]
        by_seed = [[r for r in mine if r["seed"] == seed] for seed in sorted({r["seed"] for r in mine})]
        by_seed = [group for group in by_seed if any(run["mode"] == "sync" for run in group)]
        found = {group[0]["seed"]: speedups_of({r["mode"]: r["curve"] for r in group}) for group in by_seed}
        together = pooled(mine) if by_seed else {}
        table[workload] = {
            mode: _row(
                [run for run in mine if run["mode"] == mode],
                {str(seed): one[mode] for seed, one in found.items() if mode in one},
                {r["seed"]: r["training_s"] for r in mine if r["mode"] == "sync"},
            )
            | {"speedup_pooled": together[mode]}
            for mode in MODES
            if mode in together
        }
    return table


def _row(
    runs: list[dict[str, Any]], speedups: dict[str, float | None], sync_s: dict[int, float]
) -> dict[str, Any]:
    """What the summary says of a mode: `speedups` by seed, None where the target was missed."""
    reached = {seed: value for seed, value in speedups.items() if value is not None}
    means = ("lag_mean", "wait_fraction", "efficiency", "scheduler_share", "reward_final")
    return {
        "speedup_median": median(reached.values()) if reached else None,
        "speedup_ci95": _interval([*reached.values()]),
        "seeds": len(reached),
        "target_missed": len(speedups) - len(reached),
        "speedups": reached,
        "same_steps_speedup": median(sync_s[r["seed"]] / r["training_s"] for r in runs),
        "step_s": median(r["step_s_median"] for r in runs),
        "learner_step_s": median(r["learner_step_s_median"] for r in runs),
        "wait_by_cause": _waits(runs),
        **{name: mean(r[name] for r in runs) for name in means},
    }


def _waits(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the training time that the learner waited, by cause: mean over runs."""
    causes = runs[0]["wait_by_cause_s"]
    return {
        cause: mean(r["wait_by_cause_s"][cause] * r.get("speed_factor", 1.0) / r["training_s"] for r in runs)
        for cause in causes
    }


def against_best(modes: dict[str, Any]) -> dict[str, Any] | None:
    """The adaptive window against the fixed one that was fastest, seeds pooled: below 1 it was faster."""
    fixed = {mode: row for mode, row in modes.items() if mode.startswith("S=") and row["speedup_pooled"]}
    if "adaptive" not in modes or not fixed or modes["adaptive"]["speedup_pooled"] is None:
        return None
    best = max(fixed, key=lambda mode: fixed[mode]["speedup_pooled"])
    theirs, mine = fixed[best]["speedups"], modes["adaptive"]["speedups"]
    return {
        "best_fixed": best,
        "time_ratio_pooled": fixed[best]["speedup_pooled"] / modes["adaptive"]["speedup_pooled"],
        "time_ratios": {seed: theirs[seed] / mine[seed] for seed in theirs if seed in mine},
        "step_ratio": modes["adaptive"]["step_s"] / fixed[best]["step_s"],
    }


def _interval(values: list[float]) -> list[float] | None:
    """95 % t interval of the geometric mean of the paired ratios; None for a single one."""
    if len(values) < 2:
        return None
    logs = [math.log(value) for value in values]
    half = float(stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs))
    return [math.exp(mean(logs) - half), math.exp(mean(logs) + half)]


def show(table: dict[str, Any]) -> None:
    """The summary as text."""
    for workload, modes in table.items():
        if modes:
            print(f"\n{workload}: time to the same held-out reward, against sync")
        for mode, row in modes.items():
            interval = row["speedup_ci95"]
            ends = f"[{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
            missed = f", target missed {row['target_missed']} times" if row["target_missed"] else ""
            print(
                f"  {mode:9s} pooled {_times(row['speedup_pooled'])}, seeds' median "
                f"{_times(row['speedup_median'])} {ends}, same steps {row['same_steps_speedup']:.2f}×; step "
                f"{row['step_s']:.2f} s, mean lag {row['lag_mean']:.2f}, learner waits "
                f"{row['wait_fraction']:.0%}, η {row['efficiency']:.2f}, scheduler "
                f"{row['scheduler_share']:.1%} of a step, final reward {row['reward_final']:.3f}{missed}"
            )
        if found := against_best(modes):
            print(
                f"  adaptive reached it in {found['time_ratio_pooled']:.2f} of the time of the best fixed "
                f"window ({found['best_fixed']}), at {found['step_ratio']:.2f} of its step time"
            )


def _times(ratio: float | None) -> str:
    return "target missed" if ratio is None else f"{ratio:.2f}×"


def missing(
    runs: list[dict[str, Any]], workload: str, seed: int, modes: list[str], most: int
) -> tuple[int, str] | None:
    """The attempt and mode to run next for a workload and seed; None where all is there."""
    attempts = attempts_of(runs, workload, seed)
    for attempt in range(most):
        made = attempts.get(attempt, {})
        for mode in modes:
            if mode not in made:
                return attempt, mode
        if most_stolen(made) <= MOST_STOLEN and unevenness(made) <= MOST_UNEVEN:
            return None
    return None


def main() -> None:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--attempts", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further run after so long")
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    parser.add_argument("--summarise", action="store_true", help="run nothing")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"runs": []}
    ends = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        # Seed by seed and workload by workload: the runs that are compared stand next to each other in time.
        for seed in range(options.seeds):
            for workload in options.workloads:
                while not options.summarise and time.monotonic() < ends:
                    todo = missing(results["runs"], workload, seed, options.modes, options.attempts)
                    if todo is None:
                        break
                    attempt, mode = todo
                    print(f"{workload}, seed {seed}, {mode} (attempt {attempt}) …", flush=True)
                    place = folder / workload / f"seed-{seed}" / f"attempt-{attempt}"
                    run = one_run(workload, seed, mode, options.steps, place)
                    results["runs"].append(run | {"attempt": attempt})
                    results |= {"command": "python -m benchmarks.time_to_reward", "machine": describe()}
                    _write(results)
    results["summary"] = summarise(least_disturbed(results["runs"]))
    results["adaptive_against_best_fixed"] = {
        workload: against_best(modes) for workload, modes in results["summary"].items()
    }
    if results["runs"]:
        _write(results)
    show(results["summary"])


def _write(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The demo over several seeds: gains with their intervals, wall-clock, peak memory. Writes demo_seeds.json.

    python benchmarks/demo_seeds.py [--seeds 3] [--keep FOLDER]

Memory is the proportional set size (PSS) of all processes of the run together, sampled every two seconds:
shared pages count once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from machine import StolenTime, describe

from cluster.evaluation import Evaluation, paired_gain
from cluster.heldout import EVALUATION_AFTER, EVALUATION_BEFORE

HERE = Path(__file__).resolve().parent
KEPT = (
    *("status", "steps", "reward_initial", "reward_final", "reward_gain", "reward_gain_ci95", "kl_final"),
    *("lag_max", "lag_mean", "groups_dropped", "padding_fraction", "sync_probe_max_abs_diff", "sync_s_mean"),
    *("trainer_wait_fraction", "rollout_wait_fraction", "scoring_exposed_fraction", "wall_s"),
    *("win_rates", "best", "verdicts"),
)
GIB = 1024**3


def family_memory(root: psutil.Process) -> int:
    """PSS of a process and all its descendants, in bytes."""
    total = 0
    try:
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:  # it ended meanwhile
                continue
    except psutil.NoSuchProcess:
        return total
    return total


def run_demo(seed: int, folder: Path) -> dict[str, Any]:
    """One demo in a process of its own."""
    command = [sys.executable, "-m", "cluster.cli", "demo", "--run-dir", str(folder)]
    started = time.monotonic()
    stolen = StolenTime(started)
    process = subprocess.Popen([*command, "--seed", str(seed)], cwd=HERE.parent)
    peak = 0
    while process.poll() is None:
        peak = max(peak, family_memory(psutil.Process(process.pid)))
        time.sleep(2)
    seconds = time.monotonic() - started
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        **{key: summary[key] for key in KEPT},
        "scoring_exposed_fraction_after_the_first_step": exposed_later(folder),
        "rewards": gains(folder),
        "reward_model_accuracy": {
            stage: json.loads((folder / "stages" / stage / "summary.json").read_text())["accuracy"]
            for stage in ("3-reward-model", "4-heldout-reward-model")
        },
        "process_s": seconds,
        "peak_pss_gib": peak / GIB,
        "cpu_stolen_fraction": stolen.share(started + seconds),
    }


def exposed_later(folder: Path) -> float:
    """`scoring_exposed_fraction` without the first step, in which nothing is there to overlap."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "wait/scoring_exposed_s" in row and row["learner_step"] > 1]
    exposed = sum(row["wait/scoring_exposed_s"] for row in steps)
    return float(exposed / sum(row["timing_s/step"] for row in steps))


def gains(folder: Path) -> dict[str, dict[str, Any]]:
    """Each reward before and after PPO on held-out prompts, and the paired gain's interval."""
    before, after = (Evaluation.load(folder / name) for name in (EVALUATION_BEFORE, EVALUATION_AFTER))
    found = {}
    for label in ("proxy", "twin", "gold"):
        ends = [replace(one, rewards=one.components[label]) for one in (before, after)]
        gain = paired_gain(*ends)
        found[label] = {
            "before": ends[0].mean,
            "after": ends[1].mean,
            "gain": gain.mean,
            "ci95": [gain.low, gain.high],
        }
    return found


def main() -> None:
    """Run the seeds one after another and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        runs = [run_demo(seed, folder / f"seed-{seed}") for seed in range(options.seeds)]
    result = {"command": "python benchmarks/demo_seeds.py", "machine": describe(), "runs": runs}
    (HERE / "demo_seeds.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for run in runs:
        gold = run["rewards"]["gold"]
        low, high = gold["ci95"]
        print(
            f"seed {run['seed']}: gold {gold['before']:.3f} → {gold['after']:.3f}, gain {gold['gain']:+.3f} "
            f"[{low:+.3f}, {high:+.3f}], {run['process_s']:.0f} s, {run['peak_pss_gib']:.1f} GiB, "
            f"scoring exposed {run['scoring_exposed_fraction']:.1%}, after the first step "
            f"{run['scoring_exposed_fraction_after_the_first_step']:.1%}"
        )


if __name__ == "__main__":
    main()

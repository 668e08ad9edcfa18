"""The demo over several seeds: gain with its interval, wall-clock, peak memory. Writes demo_seeds.json.

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
from pathlib import Path
from typing import Any

import psutil
from machine import StolenTime, describe

HERE = Path(__file__).resolve().parent
KEPT = (
    *("status", "steps", "reward_initial", "reward_final", "reward_gain", "reward_gain_ci95", "kl_final"),
    *("lag_max", "lag_mean", "groups_dropped", "padding_fraction", "sync_probe_max_abs_diff", "sync_s_mean"),
    *("trainer_wait_fraction", "rollout_wait_fraction", "wall_s"),
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
    process = subprocess.Popen(
        [*command, "--set", f"run.seed={seed}", "--set", f"task.seed={seed}"], cwd=HERE.parent
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, family_memory(psutil.Process(process.pid)))
        time.sleep(2)
    seconds = time.monotonic() - started
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        **{key: summary[key] for key in KEPT},
        "process_s": seconds,
        "peak_pss_gib": peak / GIB,
        "cpu_stolen_fraction": stolen.share(started + seconds),
    }


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
        low, high = run["reward_gain_ci95"]
        print(
            f"seed {run['seed']}: {run['reward_initial']:.3f} → {run['reward_final']:.3f}, gain "
            f"{run['reward_gain']:+.3f} [{low:+.3f}, {high:+.3f}], {run['process_s']:.0f} s, "
            f"{run['peak_pss_gib']:.1f} GiB"
        )


if __name__ == "__main__":
    main()

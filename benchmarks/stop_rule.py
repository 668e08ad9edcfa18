"""PPO on a reward that likes length: does a stop rule keep what the end of the run has lost?

    python -m benchmarks.stop_rule [--seeds 5] [--keep FOLDER]

The demo, with an annotator who likes each further character (`--length-bias 0.3`), a last stage of 28 steps,
and a held-out twin from which length was taken out (`loss = "residual"`): one that shares the bias could not
see it. `heldout_decline` only warns, so each run goes on to its end and gives both figures: gold at the best
evaluation after the first by held-out reward when the rule fires (what `"stop"` would have kept), and gold at
the end. No rule sees gold. Where the rule does not fire, both are the end's. Each finished run is added to
stop_rule.json at once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from scipy import stats

from benchmarks.machine import StolenTime, describe
from cluster.monitor import read_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "stop_rule.json"
LENGTH_BIAS, STEPS, EVERY = 0.3, 28, 4
OVERRIDES = (
    "heldout-reward-model/reward_model.loss=residual",
    f"run.steps={STEPS}",
    f"run.evaluate_every={EVERY}",
    "run.evaluate_samples=2",
    "stop.heldout_decline=warn",
    "stop.normalised_gap=off",
    "stop.disagreement=off",
    "ppo.kl_coef=0.02",
    "monitor.wandb=disabled",
)


def one_run(seed: int, folder: Path) -> dict[str, Any]:
    """One demo in a process of its own, and what its evaluations say."""
    command = [sys.executable, "-m", "cluster.cli", "demo", "--run-dir", str(folder), "--seed", str(seed)]
    command += ["--length-bias", f"{LENGTH_BIAS:g}"]
    for override in OVERRIDES:
        command += ["--set", override]
    started = time.monotonic()
    stolen = StolenTime(started)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        subprocess.run(command, cwd=HERE.parent, check=True, stdout=log, stderr=subprocess.STDOUT)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row.get("heldout/gold") is not None]
    curve = [
        [row["learner_step"], row["heldout/reward"], row["heldout/twin"], row["heldout/gold"]] for row in rows
    ]
    fired = next((one["step"] for one in summary["verdicts"] if one["rule"] == "heldout_decline"), None)
    seen = [point for point in curve if fired is None or point[0] <= fired]
    kept = max(seen[1:], key=lambda point: point[2]) if fired is not None else curve[-1]
    return {
        "seed": seed,
        "curve": curve,
        "fired_at": fired,
        "kept_step": kept[0],
        "gold_kept": kept[3],
        "gold_final": curve[-1][3],
        "gold_before": curve[0][3],
        "process_s": time.monotonic() - started,
        "cpu_stolen_fraction": stolen.share(time.monotonic()),
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Gold kept less gold at the end, paired over seeds, with a 95 % t interval."""
    gains = [run["gold_kept"] - run["gold_final"] for run in runs]
    half = float(stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)) if len(gains) > 1 else None
    return {
        "seeds": len(runs),
        "fired": sum(run["fired_at"] is not None for run in runs),
        "gold_before": mean(run["gold_before"] for run in runs),
        "gold_kept": mean(run["gold_kept"] for run in runs),
        "gold_final": mean(run["gold_final"] for run in runs),
        "kept_less_final": mean(gains),
        "ci95_half": half,
    }


def main() -> None:
    """Run the seeds that are missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"runs": []}
    done = {run["seed"] for run in results["runs"]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for seed in range(options.seeds):
            if seed in done:
                continue
            print(f"seed {seed} …", flush=True)
            results["runs"].append(one_run(seed, folder / f"seed-{seed}"))
            results |= {"command": "python -m benchmarks.stop_rule", "machine": describe()}
            results["summary"] = summarise(results["runs"])
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results.get("summary"), indent=1))


if __name__ == "__main__":
    main()

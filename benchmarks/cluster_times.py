"""A cluster of three hosts: time to the first step, weights to one host and to two, the cost of a lost host.

    python -m benchmarks.cluster_times

The hosts are namespaces of this machine (tests/cluster/namespaces.py), which share its cores; root is needed.
Everything that a step needs is installed already. Writes cluster_times.json:

- `up_s`: `ray up`; `first_step_s`: from its start to the end of the first learner step of a job submitted to
  the cluster, hence with model, engines, warm-up and the evaluation before training;
- `sync_s` by number of hosts: median of `timing_s/sync` (publishing until every actor proved the weights) of
  synchronous steps, where no engine samples meanwhile; the weights are 100 MB;
- `lost_host`: the longest time between two steps from the loss of a host on, against the median step before
  it, and the groups that were left out.
"""

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from namespaces import hosts  # noqa: E402 - the tests' own hosts
from test_multi_host import HEAD, ROLLOUT, Cluster, _plan, wait_for  # noqa: E402

from benchmarks.machine import describe  # noqa: E402
from cluster.monitor import read_rows  # noqa: E402

RESULTS = ROOT / "benchmarks" / "cluster_times.json"
STEPS_BEFORE, STEPS_AFTER, SYNC_STEPS = 6, 4, 12
ENDING_S = 400  # of an interrupted run: its step, an evaluation and a checkpoint on what hosts are left
JOB = """
[run]
steps = {steps}
batch_size = {batch}
evaluate_prompts = 8
checkpoint_every = 0
[model.scratch]
hidden_size = {hidden}
layers = {layers}
heads = 2
max_length = 64
[task]
kind = "reversal"
length = 16
train_size = 512
heldout_size = 16
demonstrations = 256
[warmup]
steps = 5
batch_size = 16
[[reward]]
kind = "task"
name = "gold"
[rollout]
actors = {actors}
cores = 1.2
group_size = 4
max_new_tokens = 24
start_timeout_s = 300
[scheduler]
window = {window}
[optimizer]
lr = 1e-5
[monitor]
wandb = "disabled"
[cluster]
start_timeout_s = 300
"""


def first_step(cluster: Cluster, began: float) -> float:
    """Seconds from `began` to the end of the first step of a small job."""
    job = JOB.format(steps=1, batch=16, hidden=64, layers=2, actors=2, window=1)
    return run(cluster, "first", job, rows=2) - began


def sync_seconds(cluster: Cluster, actors: int) -> float:
    """Median time of a weight sync to so many hosts."""
    job = JOB.format(steps=SYNC_STEPS, batch=8, hidden=512, layers=8, actors=actors, window=0)
    name = f"sync-{actors}"
    run(cluster, name, job, rows=SYNC_STEPS)
    rows = [row for row in metrics(cluster, name) if row.get("timing_s/sync")]
    return median(row["timing_s/sync"] for row in rows[2:])


def lost_host(cluster: Cluster) -> dict[str, Any]:
    """Cut a rollout host off in mid-run: what the run then waits, and what it leaves out."""
    job = JOB.format(steps=10_000, batch=256, hidden=256, layers=4, actors=2, window=4)
    process = start(cluster, "lost", job)
    log = cluster.folder / "submit.log"
    ends: list[float] = []

    def watch(count: int) -> bool:
        done = len(metrics(cluster, "lost")) - 1  # the first row is the evaluation before training
        ends.extend([time.monotonic()] * (done - len(ends)))
        return len(ends) >= count

    try:
        wait_for(lambda: watch(STEPS_BEFORE), 400, "the steps before", process, log)
        cluster.hosts.stop(ROLLOUT)
        lost_at = len(ends)
        wait_for(lambda: watch(lost_at + STEPS_AFTER), 300, "the steps after", process, log)
        cluster.hosts.run(HEAD, "pkill -INT -f 'cluster.cli train'")
        process.wait(ENDING_S)
    finally:
        process.kill()
        process.wait()
    between = [after - before for before, after in pairwise(ends)]
    usual, after = median(between[1 : lost_at - 1]), between[lost_at - 1 :]
    summary = json.loads((cluster.run_folder("lost") / "summary.json").read_text())
    return {
        "step_s_before": usual,
        "steps_s_after": after,
        "longest_over_usual_s": max(after) - usual,
        "cost_in_steps": max(after) / usual - 1,
        "groups_dropped": summary["groups_dropped"],
        "actors_lost": summary["actors_lost"],
    }


def start(cluster: Cluster, name: str, job: str) -> Any:
    """Submit a job."""
    (cluster.hosts.plan.home(HEAD) / "headrace" / "jobs" / f"{name}.toml").write_text(job)
    return cluster.submit("train", f"jobs/{name}.toml", "--run-dir", f"runs/{name}")


def run(cluster: Cluster, name: str, job: str, *, rows: int) -> float:
    """Submit a job and wait until it has so many rows of metrics; gives that moment, and lets it end."""
    process = start(cluster, name, job)
    log = cluster.folder / "submit.log"
    wait_for(lambda: len(metrics(cluster, name)) >= rows, 400, f"{rows} rows of {name}", process, log)
    moment = time.monotonic()
    assert process.wait(200) == 0, log.read_text()[-4000:]
    return moment


def metrics(cluster: Cluster, name: str) -> list[dict[str, Any]]:
    """The rows that a run has written so far."""
    path = cluster.run_folder(name) / "metrics.jsonl"
    return list(read_rows(path)) if path.exists() else []


def main() -> None:
    """Build the cluster, measure, write the results."""
    with tempfile.TemporaryDirectory() as temporary, hosts(_plan("10.84.0.0/24")) as made:
        cluster = Cluster(made, Path(temporary))
        began = time.monotonic()
        up = cluster.ray("up", "--yes", str(cluster.file))
        assert up.returncode == 0, up.stdout
        results: dict[str, Any] = {
            "command": "python -m benchmarks.cluster_times",
            "machine": describe(),
            "up_s": time.monotonic() - began,
            "first_step_s": first_step(cluster, began),
            "sync_s": {str(actors): sync_seconds(cluster, actors) for actors in (1, 2)},
        }
        results["sync_ratio"] = results["sync_s"]["2"] / results["sync_s"]["1"]
        print(json.dumps(results, indent=1), flush=True)
        results["lost_host"] = lost_host(cluster)
        cluster.ray("down", "--yes", str(cluster.file))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

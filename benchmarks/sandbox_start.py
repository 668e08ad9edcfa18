"""How long a sandbox takes to start, and a program in it. Writes sandbox_start.json.

    python benchmarks/sandbox_start.py [--runs 200]

`first` starts a sandbox from nothing and runs its first program, an empty one, to the end. `next` runs an
empty program, in namespaces of its own like every other, where the sandbox's keeper already waits: what each
program of a training run costs. `interpreter` starts a bare Python that does nothing, for comparison.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from machine import StolenTime, describe

from rewards.sandbox import Sandbox

HERE = Path(__file__).resolve().parent


def first() -> None:
    """A new sandbox and one program."""
    with Sandbox() as sandbox:
        run_empty(sandbox)


def run_empty(sandbox: Sandbox) -> None:
    """A program that does nothing."""
    outcome = sandbox.run("")
    if outcome.reason != "ok":
        raise RuntimeError(f"an empty program ended with {outcome}")


def interpreter() -> None:
    """A Python that does nothing, without site packages."""
    subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True, env={})


def measure(action: Callable[[], None], runs: int) -> dict[str, float]:
    """Milliseconds of wall clock over `runs`, after three that are not counted."""
    times = []
    for number in range(-3, runs):
        began = time.perf_counter()
        action()
        if number >= 0:
            times.append(1000 * (time.perf_counter() - began))
    times.sort()
    return {
        "median_ms": statistics.median(times),
        "p95_ms": times[int(0.95 * (len(times) - 1))],
        "max_ms": times[-1],
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    stolen = StolenTime(time.monotonic())
    rows = {"first": measure(first, runs)}
    with Sandbox() as sandbox:
        rows["next"] = measure(lambda: run_empty(sandbox), runs)
    rows["interpreter"] = measure(interpreter, runs)
    for name, row in rows.items():
        print(f"{name:12s} " + ", ".join(f"{key} {value:.1f}" for key, value in row.items()), flush=True)
    result = {
        "command": f"python benchmarks/sandbox_start.py --runs {runs}",
        "machine": describe(),
        "stolen_share": stolen.share(time.monotonic()),
        "runs": runs,
        **rows,
    }
    (HERE / "sandbox_start.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

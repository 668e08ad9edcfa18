"""`headrace demo`: the main job on a model made from scratch, and its answers before and after."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.config_file import parse_config
from cluster.job import run_job
from cluster.monitor import read_rows

# Spell eight letters backwards. A 0.8M-parameter Llama learns the task from demonstrations of which 30 % are
# wrong, then PPO raises the gold reward: the share of letters that are right before the first wrong one.
DEMO_CONFIG = """
objective = "ppo"

[run]
name = "demo"
steps = 40
batch_size = 256
checkpoint_every = 20

[model.scratch]
hidden_size = 128
layers = 4
heads = 4
max_length = 64

[task]
kind = "reversal"
length = 8
train_size = 8192
heldout_size = 256
demonstrations = 8192
corruption = 0.3

[warmup]
steps = 160
batch_size = 128
lr = 2.5e-3

[[reward]]
kind = "task"
name = "gold"

[rollout]
actors = 1
group_size = 8
max_new_tokens = 12
max_groups_in_flight = 64
max_num_seqs = 256

[scheduler]
window = 1

[learner]
threads = 2

[optimizer]
lr = 2e-4
critic_lr = 5e-4
warmup_updates = 10
schedule = "linear"

[ppo]
minibatches = 2
value_coef = 0.5
kl_coef = 0.05
"""
_SHOWN = 8


def run_demo(overrides: Sequence[str], run_dir: Path) -> dict[str, Any]:
    """Run the demo, then print what it changed. Gives the run's summary."""
    summary = run_job(parse_config(DEMO_CONFIG, overrides, source="demo"), run_dir)
    console = Console(file=sys.stdout)
    if summary["status"] == "completed":
        show_samples(console, run_dir)
        show_gain(console, summary, run_dir)
    return summary


def show_samples(console: Console, run_dir: Path) -> None:
    """Held-out answers before and after training, side by side."""
    by_phase: dict[str, dict[str, dict[str, Any]]] = {"before": {}, "after": {}}
    for row in read_rows(run_dir / "samples.jsonl"):
        if row.get("phase") in by_phase:
            by_phase[row["phase"]][row["prompt_id"]] = row
    table = Table(title="Held-out prompts, before and after PPO", title_justify="left")
    for name in ("prompt", "before", "reward", "after", "reward"):
        table.add_column(name, justify="right" if name == "reward" else "left", no_wrap=True)
    common = [key for key in by_phase["before"] if key in by_phase["after"]]
    for key in common[:_SHOWN]:
        before, after = by_phase["before"][key], by_phase["after"][key]
        table.add_row(
            _plain(before["prompt"]),
            _plain(before["completion"]),
            f"{before['reward']:.2f}",
            _plain(after["completion"]),
            f"{after['reward']:.2f}",
        )
    console.print(table, markup=False)


def show_gain(console: Console, summary: dict[str, Any], run_dir: Path) -> None:
    """The gain with its interval, and where everything is."""
    low, high = summary["reward_gain_ci95"]
    console.print(
        f"Held-out gold reward: {summary['reward_initial']:.3f} before, {summary['reward_final']:.3f} after; "
        f"gain {summary['reward_gain']:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}] over "
        f"{summary['heldout_prompts']} prompts, in {summary['wall_s']:.0f} s.",
        highlight=False,
        soft_wrap=True,
    )
    pointer = json.loads((run_dir / "checkpoints" / "latest.json").read_text(encoding="utf-8"))
    console.print(f"Report: {run_dir / 'report.html'}", highlight=False, soft_wrap=True)
    console.print(
        f"Model:  {run_dir / 'checkpoints' / pointer['folder'] / 'policy'}", highlight=False, soft_wrap=True
    )


def _plain(text: str) -> str:
    """Model output as one printable line: control characters could steer a terminal."""
    return "".join(c if c.isprintable() else "·" for c in text)

"""The arguments of `headrace evaluate-reward`. Nothing heavy is imported here."""

import argparse
from pathlib import Path
from typing import Any


def add_evaluate_reward(commands: Any) -> None:
    """Add the command to the sub-parsers of the command line."""
    command = commands.add_parser(
        "evaluate-reward",
        help="a trained reward model on pairs that came after it: hotter, longer, after PPO",
        description="Score the pairs of each file with a trained reward model and say how often, how "
        "surely and how length-bound it orders them, against its held-out accuracy. Pairs on prompts that it "
        "learned from are left out. Writes a JSON file.",
    )
    command.add_argument("model", type=Path, metavar="FOLDER", help="the folder `reward_model` of a run")
    command.add_argument("pairs", nargs="+", metavar="FILE", help="preference pairs, as preferences.train")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write, a new file")
    command.add_argument("--device", default="cpu", help="torch device (cpu)")
    command.add_argument("--seed", type=int, default=0, help="seed of bootstrap intervals (0)")
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="section.key=value",
        help="a setting of [preferences] or [evaluation]; may be given many times",
    )
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from cluster.reward_job.later import run_evaluate_reward

    return run_evaluate_reward(options)

"""`headrace demo`: from demonstrations and noisy preferences to a better policy, in public commands."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.config_file import ConfigError, parse_job
from cluster.demo_stages import HELDOUT_MODEL, IMITATION, LABELS, PPO, REWARD_MODEL, STAGES, Plan
from cluster.evaluation import Evaluation, paired_gain
from cluster.heldout import EVALUATION_AFTER, EVALUATION_BEFORE
from cluster.monitor import read_rows
from rewards.settings import TaskSettings
from rewards.tasks.registry import get_task

_SHOWN = 8
_WIDTH = 110  # of what is no terminal
_PROMPTS = 512  # whose candidate responses are labelled; those of held-out evaluations are others
_MEANING = {
    "proxy": "the reward model that PPO optimises",
    "twin": "its held-out twin, of other labels",
    "gold": "what is truly wanted",
}
Command = Callable[[list[str]], int]


def run_demo(options: argparse.Namespace, run_dir: Path, command: Command) -> int:
    """Run every stage with `command`, which takes the words of a headrace command; gives the exit status.

    Raises ValueError for what the user can mend, before anything starts.
    """
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ConfigError(f"--run-dir {run_dir}: is not an empty folder; name a new one")
    plan = Plan(run_dir, options.seed, options.pairs, options.length_bias)
    overrides = by_stage(options.overrides)
    _check(plan, overrides)
    _make_folders(plan)
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    policy = _placeholder(plan)
    for number, stage in enumerate(STAGES, start=1):
        if stage == LABELS:
            policy = _policy(plan)
            _write_prompts(plan)
            words = plan.labelling(policy, overrides[LABELS])
        else:
            _write(plan.file(stage), plan.configurations(policy)[stage])
            words = [plan.train(stage, overrides[stage])]
        console.rule(f"{number} of {len(STAGES)}: {stage}", align="left")
        for one in words:
            console.print(f"$ headrace {' '.join(one)}", style="dim", soft_wrap=True, markup=False)
            if status := command(one):
                console.print(f"The demo ends here: stage {stage} did not complete.", markup=False)
                return status
    _show_samples(console, run_dir)
    _show_rewards(console, plan)
    return 0


def by_stage(overrides: list[str]) -> dict[str, list[str]]:
    """`STAGE/section.key=value` by stage; without a stage an override is PPO's."""
    found: dict[str, list[str]] = {stage: [] for stage in STAGES}
    for override in overrides:
        stage, slash, rest = override.partition("/")
        if not slash or "=" in stage:  # the stroke is part of the value
            stage, rest = PPO, override
        if stage not in STAGES:
            raise ConfigError(f"--set {override}: {stage!r} is no stage; use one of {', '.join(STAGES)}")
        found[stage].append(rest)
    return found


def _check(plan: Plan, overrides: dict[str, list[str]]) -> None:
    """Refuse now what a later stage would refuse."""
    if plan.pairs < 20:
        raise ConfigError(f"--pairs {plan.pairs}: two reward models need more labels; use 20 or more")
    for stage, text in plan.configurations(_placeholder(plan)).items():
        parse_job(text, overrides[stage], source=f"demo, stage {stage}")


def _make_folders(plan: Plan) -> None:
    for folder in (plan.run_dir, plan.stages, plan.folder(LABELS)):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _placeholder(plan: Plan) -> Path:
    return plan.folder(IMITATION) / "policy"


def _policy(plan: Plan) -> Path:
    """What the imitation left: the policy in its last checkpoint."""
    root = plan.folder(IMITATION) / "checkpoints"
    pointer = json.loads((root / "latest.json").read_text(encoding="utf-8"))
    return root / str(pointer["folder"]) / "policy"


def _write(path: Path, text: str) -> None:
    with os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)


def _write_prompts(plan: Plan) -> None:
    """Training prompts of the task whose candidates are labelled."""
    settings = parse_job(plan.file(IMITATION).read_text(encoding="utf-8")).model_dump()["task"]
    rows = get_task(settings["kind"]).generate(TaskSettings(**settings)).train[:_PROMPTS]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    _write(plan.folder(LABELS) / "prompts.jsonl", text)


# ---- what came of it --------------------------------------------------------------------------------------


def _show_samples(console: Console, run_dir: Path) -> None:
    """Held-out answers before and after PPO, side by side."""
    by_phase: dict[str, dict[str, dict[str, Any]]] = {"before": {}, "after": {}}
    for row in read_rows(run_dir / "samples.jsonl"):
        if row.get("phase") in by_phase:
            by_phase[row["phase"]][row["prompt_id"]] = row
    table = Table(title="Held-out prompts, before and after PPO", title_justify="left")
    for name in ("prompt", "before", "proxy", "after", "proxy"):
        table.add_column(name, justify="right" if name == "proxy" else "left", no_wrap=True)
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


def _show_rewards(console: Console, plan: Plan) -> None:
    """Each reward before and after with the interval of its gain, and where everything is."""
    run_dir = plan.run_dir
    before, after = (Evaluation.load(run_dir / name) for name in (EVALUATION_BEFORE, EVALUATION_AFTER))
    table = Table(title=f"Means over {len(after.rewards)} held-out prompts", title_justify="left")
    for name in ("reward", "before", "after", "gain, 95 % interval", ""):
        table.add_column(name, justify="left" if name in ("reward", "") else "right", no_wrap=True)
    for label, meaning in _MEANING.items():
        gain = paired_gain(_alone(before, label), _alone(after, label))
        table.add_row(
            label,
            f"{before.mean_of(label):.3f}",
            f"{after.mean_of(label):.3f}",
            f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]",
            meaning,
        )
    console.print(table, markup=False)
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    rate = summary["win_rates"]["gold"]
    controlled = "unidentified, as length alone decides every one"
    if rate["identified"]:
        low, high = rate["length_controlled_ci95"]
        controlled = f"{rate['length_controlled']:.1%} [{low:.1%}, {high:.1%}]"
    console.print(
        f"By gold, responses after PPO beat those before on {rate['raw']:.1%} of prompts; with length "
        f"controlled {controlled}.",
        markup=False,
    )
    for verdict in summary["verdicts"]:
        console.print(f"Step {verdict['step']}, {verdict['rule']}: {verdict['reason']}", markup=False)
    models = ((REWARD_MODEL, "reward model"), (HELDOUT_MODEL, "held-out reward model"))
    for stage, name in models:
        accuracy = json.loads((plan.folder(stage) / "summary.json").read_text(encoding="utf-8"))["accuracy"]
        console.print(f"Held-out accuracy of the {name}: {accuracy:.3f}", markup=False)
    pointer = json.loads((run_dir / "checkpoints" / "latest.json").read_text(encoding="utf-8"))
    policy = run_dir / "checkpoints" / pointer["folder"] / "policy"
    console.print(f"Report: {run_dir / 'report.html'}\nModel:  {policy}", soft_wrap=True, markup=False)


def _alone(evaluation: Evaluation, label: str) -> Evaluation:
    """The evaluation as if this were its only reward."""
    return replace(evaluation, rewards=evaluation.components[label])


def _plain(text: str) -> str:
    """Model output as one printable line: control characters could steer a terminal."""
    return "".join(c if c.isprintable() else "·" for c in text)

"""A whole run on reward models: trained on one, judged by another, stopped by a rule, resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_reward_model import save_reward_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

JOB = """
[run]
name = "judged"
steps = 4
batch_size = 16
evaluate_prompts = 8
evaluate_samples = 8
evaluate_every = 1
checkpoint_every = 0
keep_checkpoints = 1

[model.scratch]
hidden_size = 32
layers = 1
heads = 1
max_length = 32

[task]
kind = "reversal"
length = 4
train_size = 64
heldout_size = 8
demonstrations = 0

[[reward]]
kind = "model"
name = "proxy"
path = "proxy"

[[reward]]
kind = "model"
name = "judge"
path = "judge"
role = "evaluate"

[[reward]]
kind = "task"
name = "gold"
role = "evaluate"

[stop]
heldout_decline = "off"
normalised_gap = "off"
disagreement = "off"
kl_budget = "stop"
kl_limit = 0.005

[rollout]
group_size = 4
max_new_tokens = 8

[optimizer]
lr = 2e-2

[monitor]
wandb = "disabled"
hosts_every_s = 0
"""
ALPHABET = "abcdefghijklmnopqrstuvwxyz>"


def train(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "cluster.cli", "train", "job.toml", "--run-dir", "run", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "NO_COLOR": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_rule_stops_a_run_which_keeps_its_best_and_can_go_on(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    save_reward_model(tmp_path / "proxy", alphabet=ALPHABET, members=2, prompts=["a"])
    save_reward_model(tmp_path / "judge", alphabet=ALPHABET, seed=5, prompts=["b"])
    run = tmp_path / "run"
    output = train(tmp_path)
    assert output.startswith("0\n"), output
    summary = json.loads((run / "summary.json").read_text())
    stopped = summary["steps"]
    assert summary["status"] == "completed"
    assert summary["stop_rule"] == "kl_budget"
    assert 1 <= stopped <= 4
    assert "above the budget" in summary["stop_reason"]
    assert summary["reward_models"]["judge"]["role"] == "evaluate"
    assert summary["heldout_final"].keys() == {"judge", "gold"}
    assert 0 <= summary["scoring_exposed_fraction"] < 1
    metrics = rows(run / "metrics.jsonl")
    # Each evaluation beside training has a row of its own; the last one comes after the step it stopped in.
    measured = [row for row in metrics if "heldout/judge" in row]
    assert [row["learner_step"] for row in measured] == list(range(stopped + 1))
    trained = [row for row in metrics if "reward/proxy" in row]
    assert [row["learner_step"] for row in trained] == list(range(1, stopped + 1))
    for row in measured:
        assert row["monitor/unknown_metrics"] == 0
        assert row.keys() >= {"heldout/gold", "overoptimisation/gap"}
        assert row["overoptimisation/disagreement"] > 0
    for row in trained:
        assert "reward/judge" not in row  # training groups were not judged
        assert "reward/proxy/std" in row
        assert "perf/scoring_exposed_fraction" in row
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert (run / "checkpoints" / best["folder"] / "policy").is_dir()
    kept = {path.name for path in (run / "checkpoints").glob("step_*")}
    assert kept == {best["folder"], f"step_{stopped:06d}"}
    decisions = [row for row in rows(run / "decisions.jsonl") if row["setting"] == "stop"]
    verdict = next(row["learner_step"] for row in decisions if row["action"] == "stop")
    assert stopped - 1 <= verdict <= stopped  # training may have gone on for a step beside the evaluation
    assert {row["rule"] for row in decisions if row["action"] == "stop"} == {"kl_budget"}
    page = (run / "report.html").read_text()
    assert 'id="overoptimisation"' in page
    assert "kl budget stopped the run" in page

    # With the rule off the run goes on to its end; with another model in the same place it does not.
    output = train(tmp_path, "--resume", "--set", "run.steps=5", "--set", 'stop.kl_budget="off"')
    assert output.startswith("0\n"), output
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["stop_rule"]) == ("completed", 5, None)
    assert {one["rule"] for one in summary["verdicts"]} == {"kl_budget"}  # remembered
    state = json.loads((run / "checkpoints" / "step_000005" / "state.json").read_text())
    assert state["overoptimisation"]["last_step"] == 4
    save_reward_model(tmp_path / "proxy", alphabet=ALPHABET, seed=8, members=2, prompts=["a"])
    output = train(tmp_path, "--resume", "--set", "run.steps=6")
    assert output.startswith("2\n"), output
    assert "the run was started with" in output

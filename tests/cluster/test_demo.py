"""The demo: which stage an override is for, and all stages in short, through the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.config_file import ConfigError, parse_job
from cluster.demo import by_stage
from cluster.demo_stages import HELDOUT_MODEL, IMITATION, LABELS, PPO, REWARD_MODEL, Plan

ROOT = Path(__file__).resolve().parents[2]
SHORT = (
    *("imitation/run.steps=10", "imitation/run.batch_size=32", "imitation/model.scratch.layers=2"),
    *("imitation/task.demonstrations=400", "labels/data.max_rows=40"),
    *("reward-model/run.epochs=1", "heldout-reward-model/run.epochs=1"),
    *("run.steps=2", "run.evaluate_every=1", "run.batch_size=32", "run.evaluate_prompts=16"),
    "monitor.wandb=disabled",
)


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "demo", *words],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_an_override_is_for_the_stage_that_it_names_and_else_for_ppo() -> None:
    found = by_stage(["run.steps=3", "imitation/run.steps=4", "labels/data.max_rows=5", "model.path=a/b"])
    assert found == {
        IMITATION: ["run.steps=4"],
        LABELS: ["data.max_rows=5"],
        REWARD_MODEL: [],
        HELDOUT_MODEL: [],
        PPO: ["run.steps=3", "model.path=a/b"],
    }
    with pytest.raises(ConfigError, match=r"'reward' is no stage; use one of imitation, labels"):
        by_stage(["reward/run.steps=3"])


def test_the_two_reward_models_have_other_halves_and_gold_is_never_trained_on() -> None:
    texts = Plan(Path("run"), seed=0, pairs=100, length_bias=0.3).configurations(Path("policy"))
    jobs: dict[str, Any] = {stage: parse_job(text) for stage, text in texts.items()}
    assert {jobs[stage].preferences.part for stage in (REWARD_MODEL, HELDOUT_MODEL)} == {"a", "b"}
    assert {one.name: one.role for one in jobs[PPO].reward} == {
        "proxy": "train",
        "twin": "evaluate",
        "gold": "evaluate",
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--pairs", "3"), "--pairs 3"),
        (("--set", "run.stepz=3"), "run.stepz"),
        (("--set", "imitation/ppo.clip=0.1"), "ppo"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = run("--run-dir", str(tmp_path / "run"), *words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.integration
def test_all_stages_in_short(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [word for override in SHORT for word in ("--set", override)]
    done = run("--run-dir", str(run_dir), "--pairs", "60", *overrides)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("completed", 2)
    assert summary["heldout_final"].keys() == {"twin", "gold"}
    assert summary["win_rates"].keys() == {"proxy", "twin", "gold"}
    labels = [json.loads(line) for line in (run_dir / "stages/2-labels/preferences.jsonl").open()]
    assert len(labels) == 60
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    evaluated = [row["learner_step"] for row in rows if "overoptimisation/gold" in row]
    assert evaluated == [0, 1, 2]
    # Both models, on labels of prompts that they do not share.
    keys = [
        set((run_dir / "stages" / stage / "reward_model" / "label_keys.txt").read_text().split())
        for stage in ("3-reward-model", "4-heldout-reward-model")
    ]
    assert keys[0]
    assert keys[1]
    assert not keys[0] & keys[1]
    for said in ("$ headrace train", "$ headrace label generate", "gain, 95 % interval", "Report:"):
        assert said in done.stdout

"""Supervised fine-tuning as a job: the split, what is refused, a real run on DeepSpeed that is resumed."""

import json
import math
import shutil
from pathlib import Path

import pytest

from cluster.config_file import ConfigError, parse_job
from cluster.job import run_job
from cluster.monitor import read_rows
from cluster.scratch import build_tokenizer
from cluster.supervised_job.config import SupervisedJobConfig
from cluster.supervised_job.inputs import prepare_supervised_job, split_by_prompt
from rewards.tasks.registry import get_task

JOB = """
objective = "supervised"
[run]
steps = 12
batch_size = 16
evaluate_every = 6
evaluate_demonstrations = 32
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
demonstrations = 200
[supervised]
lr = 5e-3
[monitor]
console = "plain"
wandb = "disabled"
"""


def job(*overrides: str) -> SupervisedJobConfig:
    config = parse_job(JOB, list(overrides))
    assert isinstance(config, SupervisedJobConfig)
    return config


def test_no_prompt_is_on_both_sides() -> None:
    pairs = [((number % 10, 1), (number,)) for number in range(40)]  # ten prompts, four answers each
    train, heldout = split_by_prompt(pairs, 0.2, seed=0)
    assert (len(train), len(heldout)) == (32, 8)  # two of the ten prompts, with all their answers
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in heldout}
    assert split_by_prompt(pairs, 0.2, seed=0) == (train, heldout)
    assert len(split_by_prompt(pairs, 0.999, seed=0)[0]) == 4  # one prompt stays to train on
    with pytest.raises(ValueError, match=r"data\.heldout"):
        split_by_prompt(pairs[:1], 0.5, seed=0)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("model.path=somewhere", "model.path"),
        ("model.reference=somewhere", "model.reference"),
        ("task.demonstrations=1", "task.demonstrations"),
        ("learner.ranks=32", "run.batch_size"),
        ("ppo.clip=0.1", "ppo"),
        ("supervised.learning_rate=1", "learning_rate"),
    ],
)
def test_what_cannot_work_is_refused(override: str, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        job(override)


def test_a_users_file_is_split_and_its_bad_rows_are_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    rows = [{"prompt": f"say {n}", "completion": str(n)} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "no answer"}\n')
    text = JOB[: JOB.index("[task]")] + f'[data]\ntrain = "{path}"\nheldout_fraction = 0.25\n'
    config = parse_job(text)
    assert isinstance(config, SupervisedJobConfig)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    inputs = prepare_supervised_job(config, run_dir)
    assert (len(inputs.train), len(inputs.heldout)) == (15, 5)
    assert inputs.quarantine.counts.total() == 1


@pytest.mark.integration
def test_a_run_learns_and_a_resumed_one_ends_the_same(tmp_path: Path) -> None:
    often = ("run.keep_checkpoints=2", "monitor.hosts_every_s=0.05")
    whole = run_job(job("run.checkpoint_every=6", *often), tmp_path / "whole")
    assert whole["status"] == "completed", whole["error"]
    # Before training the policy knows nothing: about the logarithm of the vocabulary's size.
    vocabulary = len(build_tokenizer(get_task("reversal").alphabet(), 32))
    assert whole["heldout_loss_initial"] == pytest.approx(math.log(vocabulary), abs=0.1)
    assert whole["heldout_loss_final"] < whole["heldout_loss_initial"] - 0.2

    watched = {
        name.rpartition("/")[2] for row in read_rows(tmp_path / "whole" / "metrics.jsonl") for name in row
    }
    assert "cpu_fraction" in watched  # the load of the host is in the rows

    part = tmp_path / "part"
    # As a run that was killed after its sixth update: its checkpoint is there, the rest is not.
    shutil.copytree(tmp_path / "whole", part, symlinks=True)
    for path in (part / "checkpoints").glob("step_000012*"):
        shutil.rmtree(path)
    (part / "checkpoints" / "latest.json").write_text(json.dumps({"folder": "step_000006"}))
    resumed = run_job(job("run.checkpoint_every=6"), part, resume=True)
    assert resumed["status"] == "completed", resumed["error"]
    assert resumed["heldout_loss_final"] == pytest.approx(whole["heldout_loss_final"], abs=1e-9)
    steps = [row["learner_step"] for row in read_rows(part / "metrics.jsonl") if "supervised/loss" in row]
    assert steps == [float(step) for step in range(1, 13)]

    from transformers import AutoModelForCausalLM

    policy = tmp_path / "whole" / "checkpoints" / "step_000012" / "policy"
    assert AutoModelForCausalLM.from_pretrained(policy).config.hidden_size == 32
    with pytest.raises(ConfigError, match="already has 12"):
        run_job(job("run.checkpoint_every=6"), part, resume=True)

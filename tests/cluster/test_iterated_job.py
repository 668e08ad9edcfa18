"""SPIN and imitation of the best of K: what is refused, what is learned from, real runs that are resumed."""

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from actors.records import Completion, Group, Prompt, RewardFailure, SampledGroup, Trajectory
from cluster.config_file import ConfigError, dump_config, parse_job
from cluster.iterated_job.config import (
    RejectionJobConfig,
    RejectionSettings,
    SpinJobConfig,
)
from cluster.iterated_job.examples import Lessons, contrast, select
from cluster.iterated_job.inputs import prepare_iterated_job
from cluster.iterated_job.sampling import RewardsFailedError, scored_groups
from cluster.job import run_job
from cluster.metrics import SECTIONS
from cluster.monitor import read_rows

COMMON = """
[run]
iterations = 2
prompts = 24
updates = 4
batch_size = 16
evaluate_prompts = 16
[model.scratch]
hidden_size = 64
layers = 1
heads = 2
max_length = 32
[warmup]
steps = 10
batch_size = 32
lr = 5e-3
[rollout]
group_size = 4
max_new_tokens = 10
[optimizer]
lr = 1e-3
[monitor]
console = "plain"
wandb = "disabled"
"""
TASK = """
[task]
kind = "modes"
length = 3
train_size = 64
heldout_size = 32
demonstrations = 300
"""
GOLD = """
[[reward]]
kind = "task"
"""
REJECTION = f'objective = "rejection"\n{COMMON}{TASK}{GOLD}'
SPIN = f'objective = "spin"\n{COMMON}{TASK}{GOLD}'


def job(text: str, *overrides: str) -> SpinJobConfig | RejectionJobConfig:
    config = parse_job(text, list(overrides))
    assert isinstance(config, SpinJobConfig | RejectionJobConfig)
    return config


# ---- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [REJECTION, SPIN, SPIN.replace(GOLD, "")])
def test_a_resolved_configuration_is_the_same_job(text: str) -> None:
    config = job(text)
    assert parse_job(dump_config(config)) == config
    assert config.policy_job().run.steps == config.total_updates == 8


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        (REJECTION, "rollout.group_size=1", "rollout.group_size = 1"),
        (REJECTION, "rejection.keep=4", "rejection.keep = 4"),
        (REJECTION, "spin.beta=0.2", "spin"),
        (REJECTION, "learner.ranks=32", "run.batch_size = 16"),
        (REJECTION, "rollout.max_new_tokens=32", "rollout.max_new_tokens = 32"),
        (REJECTION, "rollout.dynamic_sampling=true", "rollout.dynamic_sampling"),
        (REJECTION, "model.path=somewhere", "model.path"),
        (REJECTION, "model.critic=somewhere", "model.critic"),
        (REJECTION, "task.kind=unheard", "task.kind"),
        (REJECTION, "reward.0.kind=discriminator", "reward.kind = 'discriminator'"),
        (REJECTION.replace(GOLD, ""), "run.seed=1", "reward"),
        (SPIN, "task.demonstrations=1", "task.demonstrations = 1"),
        (SPIN, "warmup.data=file.jsonl", "warmup.data"),
        (SPIN, "rejection.keep=2", "rejection"),
        (SPIN, "spin.beta=0", "spin.beta"),
        (SPIN, "ppo.clip=0.1", "ppo"),
    ],
)
def test_what_cannot_work_is_refused(text: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(text, override)


# ---- what is learned from ----------------------------------------------------------------------------------


def completion(*tokens: int, finished: bool = True) -> Completion:
    count = len(tokens)
    return Completion(tokens, (-1.0,) * count, (0,) * count, str(tokens), "stop" if finished else "length")


def group(number: int, *rewarded: tuple[Completion, float]) -> Group:
    trajectories = tuple(Trajectory(one, reward, {}, (0.0,) * len(one.token_ids)) for one, reward in rewarded)
    return Group(number, Prompt(f"p:{number}", (1, number), ""), trajectories, "a", 0.0, 0.0)


GROUPS = [
    # The best was cut off; of the others the first of two equally good ones is kept.
    group(
        7,
        (completion(5), 0.2),
        (completion(6), 0.6),
        (completion(8), 0.6),
        (completion(9, finished=False), 1.0),
    ),
    # The two best are the same response.
    group(8, (completion(5), 0.9), (completion(5), 0.9), (completion(6), 0.4), (completion(7), 0.1)),
    # Nothing here is good.
    group(9, (completion(5), 0.0), (completion(6), 0.0), (completion(7), 0.0), (completion(8), -1.0)),
]


@pytest.mark.parametrize(
    ("keep", "minimum", "kept"),
    [
        (1, None, [(7, 6), (8, 5), (9, 5)]),
        (2, None, [(7, 6), (7, 8), (8, 5), (8, 6), (9, 5), (9, 6)]),
        (1, 0.5, [(7, 6), (8, 5)]),
        (3, 0.5, [(7, 6), (7, 8), (8, 5)]),
        (1, 2.0, []),
    ],
)
def test_the_best_of_each_prompt_are_kept(
    keep: int, minimum: float | None, kept: list[tuple[int, int]]
) -> None:
    lessons, figures = select(GROUPS, RejectionSettings(keep=keep, minimum=minimum))
    assert [(prompt[1], chosen[0]) for prompt, chosen in lessons.pairs()] == kept
    assert figures["rejection/kept"] == len(kept)
    assert figures["rejection/kept_fraction"] == len(kept) / 12
    assert figures["rejection/prompts_fraction"] == len({prompt for prompt, _ in kept}) / 3
    # (0.2 + 0.6 + 0.6 + 1) + (0.9 + 0.9 + 0.4 + 0.1) + (0 + 0 + 0 − 1) = 3.7
    assert figures["reward/mean"] == pytest.approx(3.7 / 12)
    assert figures["rejection/best_reward"] == pytest.approx((1.0 + 0.9 + 0.0) / 3)
    if (keep, minimum) == (1, None):
        assert figures["rejection/kept_reward"] == pytest.approx((0.6 + 0.9 + 0.0) / 3)
    assert ("rejection/kept_reward" in figures) == bool(kept)


def test_demonstrations_stand_against_every_sample(tmp_path: Path) -> None:
    sampled = [
        SampledGroup(
            0, Prompt("d:0", (1, 4), ""), (completion(5, 2), completion(6, finished=False)), "a", 0.0
        ),
        SampledGroup(1, Prompt("d:1", (1,), ""), (completion(7, 2), completion(8, 9, 2)), "a", 0.0),
    ]
    lessons, figures = contrast(sampled, [((1, 4), (5, 2)), ((1,), (6, 6, 2))])
    assert lessons.prompts == ((1, 4), (1, 4), (1,), (1,))
    assert lessons.chosen == ((5, 2), (5, 2), (6, 6, 2), (6, 6, 2))
    assert lessons.rejected == ((5, 2), (6,), (7, 2), (8, 9, 2))
    assert figures == {
        "spin/same_fraction": 0.25,
        "spin/finished_fraction": 0.75,
        "spin/sampled_tokens": 2.0,
        "spin/demonstrated_tokens": 2.5,
    }
    data = lessons.contrasts()
    responses = [data.responses[number] for number in range(8)]
    assert responses[1] == ([1, 4], [5, 2])
    assert responses[4 + 1] == ([1, 4], [6])
    assert [data.train.chosen[3], data.train.rejected[3]] == [3, 7]
    whole = lessons.with_reference([-0.1 * number for number in range(8)])
    whole.write(tmp_path / "iterations" / "000.jsonl")
    assert Lessons.read(tmp_path / "iterations" / "000.jsonl") == whole
    imitated = Lessons(lessons.prompts, lessons.chosen)
    imitated.write(tmp_path / "iterations" / "001.jsonl")
    assert Lessons.read(tmp_path / "iterations" / "001.jsonl") == imitated
    with pytest.raises(ValueError, match=r"002\.jsonl"):
        Lessons.read(tmp_path / "iterations" / "002.jsonl")


def test_failed_rewards_are_left_out_up_to_a_share() -> None:
    failure = RewardFailure(3, "p:3", "mine", "it raised")
    assert scored_groups([*GROUPS, failure], 0.5) == GROUPS
    with pytest.raises(RewardsFailedError, match=r"1 of 4 .*p:3.*'mine': it raised"):
        scored_groups([*GROUPS, failure], 0.2)
    with pytest.raises(RewardsFailedError, match="1 of 1"):
        scored_groups([failure], 1.0)


def test_every_figure_is_explained() -> None:
    known = {metric.name for metrics in SECTIONS.values() for metric in metrics}
    _, chosen = select(GROUPS, RejectionSettings())
    demonstrations = [(one.prompt.token_ids, (5,)) for one in GROUPS]
    sampled = [
        SampledGroup(one.group_id, one.prompt, tuple(t.completion for t in one.trajectories), "a", 0.0)
        for one in GROUPS
    ]
    _, contrasted = contrast(sampled, demonstrations)
    assert {*chosen, *contrasted, "iteration"} <= known


def test_a_users_demonstrations_are_split_and_bad_rows_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": f"say {n}", "completion": str(n)} for n in range(20)]
    rows += [{"prompt": "say 3", "completion": "three"}, {"prompt": "no answer"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f'objective = "spin"\n{COMMON}[data]\ntrain = "{path}"\nheldout_fraction = 0.25\n'
    config = job(text)
    assert isinstance(config, SpinJobConfig)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    inputs = prepare_iterated_job(config, run_dir)
    sides = [{tuple(prompt) for prompt, _ in side} for side in (inputs.demonstrations, inputs.heldout)]
    assert len(sides[0]) + len(sides[1]) == 20
    assert len(sides[1]) in (4, 5)  # a quarter of 21 prompts, of which one has no answer
    assert not sides[0] & sides[1]
    assert len(inputs.demonstrations) + len(inputs.heldout) == 21  # "say 3" has two, on one side
    assert inputs.quarantine.counts.total() == 1
    assert inputs.heldout_prompts == []  # nothing could judge samples of them
    assert [prompt.token_ids for prompt in inputs.prompts] == [prompt for prompt, _ in inputs.demonstrations]


# ---- runs --------------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.timeout(200)
def test_rejection_on_live_actors(tmp_path: Path) -> None:
    """On two learner ranks, which share optimizer state and gradients."""
    run_dir = tmp_path / "run"
    ranks = ("learner.ranks=2", "learner.zero_stage=2")
    summary = run_job(job(REJECTION, "rejection.keep=2", *ranks), run_dir)
    assert summary["status"] == "completed", summary["error"]
    assert (summary["steps"], summary["iterations"]) == (8, 2)
    assert summary["reward_initial"] is not None
    assert summary["reward_final"] == pytest.approx(summary["reward_initial"] + summary["reward_gain"])
    assert summary["sync_probe_max_abs_diff"] < 0.01
    rows = {row["learner_step"]: row for row in read_rows(run_dir / "metrics.jsonl")}
    assert sorted(rows) == [float(step) for step in range(9)]
    assert [rows[step]["iteration"] for step in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert {"heldout/reward", "heldout/kl_sequence"} <= rows[0].keys() & rows[4].keys() & rows[8].keys()
    assert abs(rows[0]["heldout/kl_sequence"]) < 1e-3  # the policy is its own reference
    assert {"rejection/best_reward", "reward/mean", "supervised/loss"} <= rows[5].keys()
    # Two samples at most are kept of each of 24 prompts, and 4 are drawn.
    lessons = Lessons.read(run_dir / "iterations" / "001.jsonl")
    assert 0 < len(lessons) == rows[5]["rejection/kept"] <= 48
    assert (run_dir / "report.html").is_file()
    from transformers import AutoModelForCausalLM

    policy = run_dir / "checkpoints" / "step_000008" / "policy"
    assert AutoModelForCausalLM.from_pretrained(policy).config.hidden_size == 64


def interrupt_after(step: int, metrics: Path) -> threading.Thread:
    """Send this process a Ctrl-C once the metrics have a row of that step."""

    def watch() -> None:
        for _ in range(4000):
            if any(row["learner_step"] >= step for row in read_rows(metrics)):
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_spin_goes_on_inside_the_iteration_in_which_it_was_stopped(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = job(SPIN.replace(GOLD, ""), "run.updates=60", "rollout.group_size=2")
    watching = interrupt_after(70, run_dir / "metrics.jsonl")
    stopped = run_job(config, run_dir)
    watching.join()
    assert stopped["status"] == "interrupted", stopped["error"]
    assert 70 <= stopped["steps"] < 120
    assert stopped["reward_initial"] is None
    sampled = (run_dir / "iterations" / "001.jsonl").read_bytes()

    summary = run_job(config, run_dir, resume=True)
    assert summary["status"] == "completed", summary["error"]
    assert (run_dir / "iterations" / "001.jsonl").read_bytes() == sampled  # nothing was sampled anew
    assert summary["tokens_generated"] == stopped["tokens_generated"]
    rows = {row["learner_step"]: row for row in read_rows(run_dir / "metrics.jsonl")}
    assert sorted(rows) == [float(step) for step in range(121)]
    for first in (1, 61):  # an iteration begins at its own reference: every log-ratio is 0
        assert rows[first]["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
        assert rows[first]["preference/margin"] == pytest.approx(0.0, abs=1e-5)
        assert rows[first + 59]["preference/margin"] > 0
        assert rows[first + 59]["loss/preference"] < math.log(2)
    # It may rise or fall: the loss is about the difference of the two sides. It is measured, and it moves.
    assert math.isfinite(summary["heldout_loss_final"])
    assert summary["heldout_loss_final"] != summary["heldout_loss_initial"]
    assert summary["heldout_loss_initial"] == stopped["heldout_loss_initial"]
    lessons = Lessons.read(run_dir / "iterations" / "000.jsonl")
    assert (len(lessons), len(lessons.reference)) == (24 * 2, 24 * 4)
    assert all(one < 0 for one in lessons.reference)
    with pytest.raises(ConfigError, match=r"run\.iterations = 2"):
        run_job(config, run_dir, resume=True)

"""Online DPO: labels from rewards, its gradient against plain transformers, ranks, steps of ties alone."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_ranks import run_ranks
from tiny_learner import in_one_rank, make_groups, make_job, save_model, take_steps, weights_of

from actors.records import Group
from learner.batch import Sample, flatten
from learner.online_dpo import label_groups
from learner.preference_settings import OnlineDPOSettings
from learner.presets import PRESETS
from learner.worker import LearnerJob, LearnerWorker


def sample(group: int, reward: float) -> Sample:
    return Sample((1,), (2,), (0.0,), (0.0,), (0,), reward, finished=True, group=group)


def test_the_best_of_a_group_is_labelled_better_than_its_worst() -> None:
    """Group 0: rewards 1, 3, 3, 0: the first 3 over 0. Group 1 is tied. Group 2 differs by ½ only."""
    samples = [sample(0, 1.0), sample(1, 2.0), sample(0, 3.0), sample(0, 3.0)]
    samples += [sample(1, 2.0), sample(0, 0.0), sample(2, 0.0), sample(2, 0.5)]
    assert label_groups(samples, 0.0) == [(2, 5), (7, 6)]
    assert label_groups(samples, 0.5) == [(2, 5)]
    assert label_groups(samples[:1], 0.0) == []


def online_job(path: str, *, online: dict[str, Any], **changes: Any) -> LearnerJob:
    preset = PRESETS["online_dpo"]
    tables = {name: values | changes.pop(name, {}) for name, values in preset.items()}
    job = make_job(path, **tables, **changes)
    return dataclasses.replace(job, online_dpo=OnlineDPOSettings(**online))


def with_rewards(group: Group, rewards: list[float]) -> Group:
    trajectories = tuple(
        dataclasses.replace(trajectory, reward=reward)
        for trajectory, reward in zip(group.trajectories, rewards, strict=True)
    )
    return dataclasses.replace(group, trajectories=trajectories)


def by_hand(path: str, groups: list[Group], pairs: list[tuple[int, int]], beta: float) -> tuple[float, float]:
    """(loss, norm of its gradient) of −log σ(β(h_w − h_l)), averaged over pairs, by plain transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    samples = flatten(groups, 0)

    def height(number: int) -> torch.Tensor:
        one = samples[number]
        logits = model(torch.tensor([[*one.prompt, *one.response]])).logits[0, len(one.prompt) - 1 : -1]
        chosen = torch.log_softmax(logits, -1)[torch.arange(len(one.response)), torch.tensor(one.response)]
        return chosen.sum() - sum(one.reference_logprobs)

    losses = [-torch.nn.functional.logsigmoid(beta * (height(a) - height(b))) for a, b in pairs]
    loss = torch.stack(losses).mean()
    loss.backward()
    squares = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    return float(loss), math.sqrt(squares)


@pytest.mark.integration
def test_a_step_is_that_of_the_formula(tmp_path: Path) -> None:
    """Two groups have a pair, one is tied. log π_ref = log π + 0.3 a token, so h = −0.3·|y|."""
    path = save_model(tmp_path / "model")
    groups = make_groups(path, groups=3, size=3, reference_shift=0.3)
    rewards = [[0.0, 1.0, 0.5], [0.7, 0.7, 0.7], [2.0, 1.0, -1.0]]
    groups = [with_rewards(group, row) for group, row in zip(groups, rewards, strict=True)]
    pairs = [(1, 0), (6, 8)]
    loss, norm = by_hand(path, groups, pairs, 0.5)
    lengths = [len(one.response) for one in flatten(groups, 0)]
    job = online_job(path, online={"beta": 0.5}, learner={"micro_batch_tokens": 16})
    (metrics,) = in_one_rank(job, lambda worker: take_steps(worker, [groups]))
    assert metrics["loss/preference"] == pytest.approx(loss, abs=1e-5)
    assert metrics["optimizer/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert (metrics["online_dpo/pairs"], metrics["online_dpo/tied_groups"]) == (2.0, 1.0)
    assert metrics["online_dpo/reward_gap"] == pytest.approx((1.0 + 3.0) / 2)
    assert metrics["online_dpo/length_gap"] == (lengths[1] - lengths[0] + lengths[6] - lengths[8]) / 2
    margin = -0.5 * 0.3 * (lengths[1] - lengths[0] + lengths[6] - lengths[8]) / 2
    assert metrics["preference/margin"] == pytest.approx(margin, abs=1e-5)
    assert metrics["kl/token"] == pytest.approx(-0.3, abs=1e-5)
    assert metrics["mismatch/ess"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["optimizer/updates"] == 1.0


@pytest.mark.integration
def test_ties_alone_leave_the_policy_as_it_is(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    groups = [with_rewards(group, [1.0, 1.0]) for group in make_groups(path, groups=2, size=2)]

    def work(worker: LearnerWorker) -> Any:
        before = weights_of(worker)
        take_steps(worker, [make_groups(path, groups=2, size=2, seed=1)])  # Adam has momentum now
        moved = weights_of(worker)
        metrics = worker.step(groups, 1)
        return metrics, before, moved, weights_of(worker)

    metrics, before, moved, after = in_one_rank(online_job(path, online={}), work)
    assert metrics["online_dpo/pairs"] == 0.0
    assert "loss/preference" not in metrics
    assert all(np.array_equal(moved[name], after[name]) for name in after)
    assert not all(np.array_equal(before[name], moved[name]) for name in after)


def train(rank: int, world_size: int, jobs: list[LearnerJob], batches: list[list[Group]]) -> Any:
    results = []
    for job in jobs:
        worker = LearnerWorker(rank, world_size, job)
        worker.start("", 0)  # the group is there already
        worker.finish_warmup()
        results.append((take_steps(worker, batches), weights_of(worker)))
        worker.stop()
    return results


@pytest.mark.integration
def test_ranks_and_micro_batches_change_nothing(tmp_path: Path) -> None:
    """Two epochs of two minibatches, the second step with a tie; micro-batches large or small."""
    path = save_model(tmp_path / "model")
    batches = [
        make_groups(path, groups=3, size=3, seed=seed, version=seed, sampler_shift=0.05) for seed in range(2)
    ]
    batches[1][0] = with_rewards(batches[1][0], [0.5, 0.5, 0.5])
    updates = {"epochs": 2, "minibatches": 2}
    large, small = (
        online_job(path, online={"label_smoothing": 0.1}, ppo=updates, learner={"micro_batch_tokens": size})
        for size in (4096, 16)
    )
    sharded = online_job(path, online={"label_smoothing": 0.1}, ppo=updates, learner={"zero_stage": 3})
    (alone,) = run_ranks(train, 1, [large, small], batches, timeout_s=200)
    together = run_ranks(train, 2, [small, sharded], batches, timeout_s=200)
    rows, weights = alone[0]
    for other_rows, other_weights in [alone[1], *together[0], *together[1]]:
        for number, (row, other) in enumerate(zip(rows, other_rows, strict=True)):
            assert row.keys() == other.keys()
            # In the first step h = 0 up to rounding, which alone decides who is ahead.
            unlike = ("timing_s/", "memory/", "perf/", *(["preference/accuracy"] * (number == 0)))
            for key in row:
                if not key.startswith(unlike):
                    assert row[key] == pytest.approx(other[key], rel=2e-3, abs=2e-5), key
        for name, weight in weights.items():
            np.testing.assert_allclose(weight, other_weights[name], atol=5e-5, err_msg=name)
    assert rows[1]["online_dpo/tied_groups"] == 1.0

"""Corrections in the learner's real step: each does to the update what it should, and nothing on-policy."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_ranks import run_ranks
from tiny_learner import in_one_rank, make_groups, make_job, save_model, take_steps, weights_of

from actors.records import Group
from learner.batch import flatten, make_share
from learner.ppo import PPO, Totals
from learner.settings import CorrectionSettings
from learner.worker import LearnerJob, LearnerWorker

pytestmark = pytest.mark.integration

OPTIONS: list[dict[str, Any]] = [
    {"weights": "none"},
    {"weights": "tis"},
    {"weights": "icepop"},
    {"weights": "sequence"},
    {"mask": "sequence"},
    {"mask": "geometric"},
    {"mask": "m2po"},
    {"ratio": "behaviour", "weights": "none"},
    {"value_target": "vtrace"},
    {"clip_by_lag": 1.0},
    {"damp_lr_by_ess": "token"},
    {"damp_lr_by_ess": "sequence"},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("llama"))


def with_sampler(
    groups: list[Group], change: Callable[[int, tuple[float, ...]], tuple[float, ...]]
) -> list[Group]:
    """The groups with other sampler log-probabilities, given each sample's number and its present ones."""
    number, result = 0, []
    for group in groups:
        trajectories = []
        for trajectory in group.trajectories:
            logprobs = change(number, trajectory.completion.logprobs)
            completion = dataclasses.replace(trajectory.completion, logprobs=logprobs)
            trajectories.append(dataclasses.replace(trajectory, completion=completion))
            number += 1
        result.append(dataclasses.replace(group, trajectories=tuple(trajectories)))
    return result


def test_on_policy_every_option_is_the_plain_update_to_the_last_bit(llama: str, tmp_path: Path) -> None:
    """The sampler's log-probabilities are the learner's own, bit for bit; four updates move the policy."""
    job = make_job(llama, ppo={"epochs": 2, "minibatches": 2, "clip": 0.02}, optimizer={"lr": 1e-2})

    def work(worker: LearnerWorker) -> list[Any]:
        groups = make_groups(llama, reference_shift=-0.1)
        share = make_share(flatten(groups, 0))
        engine = worker._engines[0]
        ppo = PPO(engine, None, job.ppo, job.correction, job.learner.micro_batch_tokens, 0, 1)
        own = ppo.score(share, Totals())[0]
        groups = with_sampler(groups, lambda number, old: tuple(own[number, : len(old)].tolist()))
        worker.save(str(tmp_path))
        results = []
        for options in OPTIONS:
            worker.restore(str(tmp_path))
            worker._job = dataclasses.replace(job, correction=CorrectionSettings(**options))
            results.append((take_steps(worker, [groups])[0], weights_of(worker)))
        return results

    (plain, weights), *others = in_one_rank(job, work)
    assert plain["ppo/clip_fraction"] > 0.05  # the clip range matters
    assert plain["mismatch/kl"] == 0.0
    assert plain["mismatch/sequence_ess"] == 1.0
    for options, (row, other) in zip(OPTIONS[1:], others, strict=True):
        for name in ("loss/policy", "loss/value", "loss/total", "optimizer/grad_norm", "optimizer/lr"):
            assert row[name] == plain[name], (options, name)
        for name, weight in weights.items():
            assert np.array_equal(weight, other[name]), (options, name)


ALONE = {"value_coef": 0.0, "kl_coef": 0.0, "gae_lambda": 1.0, "whiten_advantages": False}
"""The policy's loss by itself: the value head starts at 0, so a token's advantage is its sample's reward."""


def update(path: str, groups: list[Group], **correction: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """One update from these groups: its row and the weights after it."""
    job = make_job(path, ppo=ALONE, correction=correction, optimizer={"max_grad_norm": 1e6})
    return in_one_rank(job, lambda worker: (take_steps(worker, [groups])[0], weights_of(worker)))


@pytest.mark.parametrize(
    "correction",
    [
        {"weights": "none", "mask": "sequence"},
        {"weights": "none", "mask": "geometric"},
        {"weights": "none", "mask": "m2po"},
        {"weights": "icepop"},
    ],
)
def test_what_is_masked_adds_no_gradient_and_still_counts(llama: str, correction: dict[str, Any]) -> None:
    """Three samples get ℓ = 2 a token, w = e² > 5: beyond every limit. The update is that of a batch in which
    nothing is known of their sampler, which also has weight 0 and counts in the denominator; it is not the
    update that includes them.
    """
    groups, chosen = make_groups(llama), (1, 5, 6)

    def replaced(change: Callable[[float], float]) -> list[Group]:
        return with_sampler(groups, lambda number, old: tuple(map(change, old)) if number in chosen else old)

    far = replaced(lambda logprob: logprob - 2.0)
    masked, weights = update(llama, far, **correction)
    unknown, expected = update(llama, replaced(lambda _: math.nan), weights="none")
    whole, included = update(llama, far, weights="none")
    assert masked["optimizer/grad_norm"] == pytest.approx(unknown["optimizer/grad_norm"], rel=1e-5)
    assert masked["loss/policy"] == pytest.approx(unknown["loss/policy"], rel=1e-5)
    assert max(np.abs(weights[name] - expected[name]).max() for name in weights) < 1e-5
    assert max(np.abs(weights[name] - included[name]).max() for name in weights) > 1e-4
    samples = [t for group in groups for t in group.trajectories]
    lengths = [len(t.completion.token_ids) for t in samples]
    rewarded = sum(lengths[i] for i in chosen if samples[i].reward > 0)  # M2PO: A = 0 does no harm
    share = (rewarded if correction.get("mask") == "m2po" else sum(lengths[i] for i in chosen)) / sum(lengths)
    name = "correction/cut_fraction" if correction["weights"] == "icepop" else "correction/masked_tokens"
    assert masked[name] == pytest.approx(share)
    assert whole["correction/masked_tokens"] == 0.0


def test_against_the_sampler_the_clip_stops_what_decoupled_weighs(llama: str) -> None:
    """All A ≥ 0. With ℓ = −0.1 both forms have the gradient e^−0.1 of the plain one; with ℓ = 1 the coupled
    ratio is e > 1.2: clipped, no gradient at all, while the decoupled form weighs with 2, the cap.
    """
    plain, _ = update(llama, make_groups(llama), weights="none")
    for shift, coupled, decoupled in ((0.1, math.exp(-0.1), math.exp(-0.1)), (-1.0, 0.0, 2.0)):
        groups = make_groups(llama, sampler_shift=shift)
        row, _ = update(llama, groups, ratio="behaviour", weights="none")
        assert row["optimizer/grad_norm"] / plain["optimizer/grad_norm"] == pytest.approx(coupled, rel=1e-4)
        assert row["ppo/first_ratio_deviation"] < 1e-5  # of the two forward passes, whatever the ratio
        row, _ = update(llama, groups, weights="tis")
        assert row["optimizer/grad_norm"] / plain["optimizer/grad_norm"] == pytest.approx(decoupled, rel=1e-4)


def test_vtrace_shrinks_the_return_of_what_the_learner_does_less_often(llama: str) -> None:
    """w = e^−0.1 on every token, γ = λ = 1, V = 0 and R on the last of n: v_t = e^{−0.1·(n − t)}·R."""
    groups = make_groups(llama, sampler_shift=0.1)
    row, _ = update(llama, groups, value_target="vtrace")
    expected = [
        trajectory.reward * math.exp(-0.1 * (n - t))
        for group in groups
        for trajectory in group.trajectories
        for n in [len(trajectory.completion.token_ids)]
        for t in range(n)
    ]
    assert row["return/mean"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert row["return/std"] == pytest.approx(np.std(expected), abs=1e-5)


def test_lag_contracts_the_clip_range_and_is_measured(llama: str) -> None:
    """Tokens of versions 0 to 4 at step 4: ε falls to 0.2/(1 + 4·κ); every lag has its row."""
    groups = make_groups(llama, version=4, oldest=0, sampler_noise=0.3)
    fractions = []
    for rate in (0.0, 5.0):
        job = make_job(llama, ppo={"epochs": 4}, optimizer={"lr": 3e-3}, correction={"clip_by_lag": rate})

        def work(worker: LearnerWorker) -> dict[str, float]:
            worker._state = worker._state.changed(steps=4)
            return worker.step(groups, 4)

        row = in_one_rank(job, work)
        assert row["correction/clip_range_min"] == pytest.approx(0.2 / (1 + 4 * rate))
        fractions.append(row["ppo/clip_fraction"])
    assert fractions[1] > fractions[0]
    tokens = [row[f"mismatch/tokens_by_lag/{lag}"] for lag in range(5)]
    assert (
        sum(tokens)
        == row["mismatch/tokens"]
        == sum(len(t.completion.token_ids) for group in groups for t in group.trajectories)
    )
    means = [row[f"mismatch/kl_by_lag/{lag}"] for lag in range(5)]
    assert np.dot(tokens, means) / sum(tokens) == pytest.approx(row["mismatch/kl"])
    assert all(row[f"mismatch/kl_se_by_lag/{lag}"] > 0 for lag in range(5))


def test_the_learning_rate_falls_with_the_effective_samples(llama: str) -> None:
    groups = make_groups(llama, sampler_noise=0.5)
    for kind, name in (("token", "mismatch/ess"), ("sequence", "mismatch/sequence_ess")):
        row, _ = update(llama, groups, damp_lr_by_ess=kind, damp_ess_target=0.95)
        assert row[name] < 0.9
        assert row["correction/lr_factor"] == pytest.approx((row[name] / 0.95) ** 0.5)
        assert row["optimizer/lr"] == pytest.approx(1e-3 * row["correction/lr_factor"])
        assert row["optimizer/critic_lr"] == 1e-3


SHARDED: list[dict[str, Any]] = [
    {"weights": "icepop", "mask": "sequence", "sequence_cap": 1.5, "value_target": "vtrace"},
    {"weights": "sequence", "mask": "m2po", "m2_budget": 0.02, "clip_by_lag": 0.5},
    {"ratio": "behaviour", "weights": "none", "mask": "geometric", "damp_lr_by_ess": "sequence"},
]


def train(rank: int, world_size: int, jobs: list[LearnerJob], batches: list[Any]) -> Any:
    results = []
    for job in jobs:
        worker = LearnerWorker(rank, world_size, job)
        worker.start("", 0)  # the group is there already
        results.append((take_steps(worker, batches)[-1], weights_of(worker)))
        worker.stop()
    return results


def test_shards_change_nothing_with_corrections_on(llama: str) -> None:
    """Two ranks and one: every metric of mismatch and correction, the losses and the weights are the same."""
    batches = [
        make_groups(llama, seed=seed, version=seed, oldest=0, sampler_noise=0.3, reference_shift=-0.1)
        for seed in range(2)
    ]
    jobs = [
        make_job(
            llama, learner={"micro_batch_tokens": 16}, ppo={"epochs": 2, "minibatches": 3}, correction=options
        )
        for options in SHARDED
    ]
    alone = [
        in_one_rank(job, lambda worker: (take_steps(worker, batches)[-1], weights_of(worker))) for job in jobs
    ]
    together = run_ranks(train, 2, jobs, batches, timeout_s=100)
    for options, one, rank_0, rank_1 in zip(SHARDED, alone, *together, strict=True):
        names = [name for name in one[0] if name.startswith(("mismatch/", "correction/"))]
        assert "mismatch/kl_se_by_lag/1" in names
        for name in (
            *names,
            "loss/policy",
            "loss/value",
            "optimizer/grad_norm",
            "optimizer/lr",
            "return/std",
        ):
            assert one[0][name] == pytest.approx(rank_0[0][name], rel=2e-3, abs=2e-5), (options, name)
            assert rank_0[0][name] == pytest.approx(rank_1[0][name], rel=1e-9), (options, name)
        for name, weight in one[1].items():
            np.testing.assert_allclose(weight, rank_0[1][name], atol=5e-5, err_msg=f"{options}: {name}")
    assert alone[0][0]["correction/masked_sequences"] > 0
    assert alone[1][0]["correction/masked_tokens"] > 0
    assert alone[2][0]["correction/lr_factor"] < 1

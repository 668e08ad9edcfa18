"""Every objective of the family in the learner's real step: the paper's loss and gradient, ranks, resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_ranks import run_ranks
from published_losses import OBJECTIVES, Response, published_loss
from tiny_learner import in_one_rank, make_groups, make_job, save_model, take_steps, weights_of

from actors.language_model import load_causal_model
from actors.records import Completion, Group, Prompt, Trajectory
from learner.presets import PRESETS
from learner.worker import LearnerJob, LearnerWorker

pytestmark = pytest.mark.integration

LIMIT = 6  # the longest response of `make_groups`


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("llama"))


def job_of(path: str, objective: str, **changes: Any) -> LearnerJob:
    ppo = PRESETS[objective].get("ppo", {}) | changes.pop("ppo", {})
    return make_job(path, ppo=ppo, max_new_tokens=LIMIT, **changes)


def published(path: str, groups: list[Group], objective: str) -> tuple[float, float]:
    """The paper's loss and the norm of its gradient, from a plain forward pass of transformers; ρ = π/μ."""
    model = load_causal_model(path, dtype="float32", attention="sdpa", device="cpu")
    model.requires_grad_(True)
    responses = []
    for number, group in enumerate(groups):
        for trajectory in group.trajectories:
            tokens = trajectory.completion.token_ids
            ids = torch.tensor([[*group.prompt.token_ids, *tokens]])
            rows = model(ids).logits[0].log_softmax(-1)[len(group.prompt.token_ids) - 1 : -1]
            logprobs = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            responses.append(
                Response(
                    logprobs,
                    torch.tensor(trajectory.completion.logprobs),
                    torch.tensor(trajectory.reference_logprobs),
                    logprobs.detach(),
                    trajectory.reward,
                    number,
                )
            )
    loss = published_loss(objective, responses, LIMIT)
    loss.backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return float(loss), float(torch.stack(norms).norm())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_first_update_has_the_loss_and_gradient_of_the_paper(llama: str, objective: str) -> None:
    """With ρ taken against the sampler, whose log-probabilities are noisy copies of the learner's, clips are
    at work from the first update on. No value model: no metric of one, and no such parameters.
    """
    groups = make_groups(llama, sampler_noise=0.3, reference_shift=-0.2)
    job = job_of(
        llama,
        objective,
        correction={"ratio": "behaviour", "weights": "none"},
        optimizer={"max_grad_norm": 1e6},
    )

    def work(worker: LearnerWorker) -> Any:
        (row,) = take_steps(worker, [groups])
        return row, worker._engines[0].module.value_head

    row, head = in_one_rank(job, work)
    loss, norm = published(llama, groups, objective)
    assert row["loss/total"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
    assert row["optimizer/grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert row["ppo/clip_fraction"] > 0.0 or objective == "cispo"
    assert row["ppo/first_ratio_deviation"] < 1e-5
    assert head is None
    assert not [name for name in row if name.startswith(("value/", "return/")) or "critic" in name]
    assert "loss/value" not in row
    assert ("loss/kl" in row) == (objective in {"grpo", "reinforce++_baseline"})
    assert ("length/overlong_penalty" in row) == (objective == "dapo")


def test_groups_of_equal_rewards_teach_nothing(llama: str) -> None:
    """And are counted: three of four groups are uniform, then all."""
    groups = make_groups(llama)

    def with_rewards(number: int, rewards: list[float]) -> Group:
        group = groups[number]
        trajectories = tuple(
            Trajectory(t.completion, reward, {}, t.reference_logprobs)
            for t, reward in zip(group.trajectories, rewards, strict=True)
        )
        return Group(number, group.prompt, trajectories, "a", 0.0, 0.0)

    equal = [with_rewards(number, [0.1, 0.1, 0.1]) for number in range(4)]
    (row,) = in_one_rank(job_of(llama, "dr_grpo"), lambda worker: take_steps(worker, [equal]))
    assert row["optimizer/grad_norm"] == 0.0
    assert row["group/uniform_fraction"] == 1.0
    some = [with_rewards(0, [0.0, 0.1, 0.1]), *equal[1:]]
    (row,) = in_one_rank(job_of(llama, "dr_grpo"), lambda worker: take_steps(worker, [some]))
    assert row["optimizer/grad_norm"] > 0.0
    assert row["group/uniform_fraction"] == 0.75


def train(rank: int, world_size: int, jobs: list[LearnerJob], batches: list[Any]) -> Any:
    results = []
    for job in jobs:
        worker = LearnerWorker(rank, world_size, job)
        worker.start("", 0)  # the group is there already
        results.append((take_steps(worker, batches)[-1], weights_of(worker)))
        worker.stop()
    return results


def test_shards_change_nothing_in_any_objective(llama: str) -> None:
    """Two ranks and one: groups of three are split over ranks and minibatches, and nothing changes by it."""
    batches = [
        make_groups(llama, seed=seed, version=seed, oldest=0, sampler_noise=0.2, reference_shift=-0.1)
        for seed in range(2)
    ]
    options = {"epochs": 2, "minibatches": 3, "entropy_coef": 0.01}
    jobs = [
        job_of(
            llama,
            objective,
            learner={"micro_batch_tokens": 16, "zero_stage": 3 if objective == "gspo" else 0},
            ppo=options | ({"kl_coef": 0.1, "kl_in": "loss"} if objective == "gspo" else {}),
        )
        for objective in OBJECTIVES
    ]
    alone = [
        in_one_rank(job, lambda worker: (take_steps(worker, batches)[-1], weights_of(worker))) for job in jobs
    ]
    together = run_ranks(train, 2, jobs, batches, timeout_s=100)
    for objective, one, rank_0, rank_1 in zip(OBJECTIVES, alone, *together, strict=True):
        names = [n for n in one[0] if n.startswith(("loss/", "advantage/", "ppo/clip", "length/", "kl/"))]
        for name in (*names, "optimizer/grad_norm", "policy/entropy"):
            assert one[0][name] == pytest.approx(rank_0[0][name], rel=2e-3, abs=2e-5), (objective, name)
            assert rank_0[0][name] == pytest.approx(rank_1[0][name], rel=1e-9), (objective, name)
        for name, weight in one[1].items():
            np.testing.assert_allclose(weight, rank_0[1][name], atol=5e-5, err_msg=f"{objective}: {name}")


def test_resume_without_a_value_model_is_bitwise(llama: str, tmp_path: Path) -> None:
    batches = [make_groups(llama, seed=seed, version=seed, reference_shift=-0.3) for seed in range(2)]
    job = job_of(llama, "grpo", ppo={"kl_control": "adaptive", "kl_horizon": 50})
    folder = tmp_path / "checkpoint"

    def straight(worker: LearnerWorker) -> Any:
        take_steps(worker, batches[:1])
        worker.save(str(folder))
        return take_steps(worker, batches[1:], first=1)[-1], weights_of(worker)

    def resumed(worker: LearnerWorker) -> Any:
        assert worker.restore(str(folder)) == 1
        return take_steps(worker, batches[1:], first=1)[-1], weights_of(worker)

    (first, expected), (second, got) = in_one_rank(job, straight), in_one_rank(job, resumed)
    assert not (folder / "value_head.safetensors").exists()
    assert first["kl/coef"] == second["kl/coef"] != job.ppo.kl_coef
    for name in expected:
        assert np.array_equal(expected[name], got[name]), name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_raises_the_expected_reward_of_an_enumerable_task(llama: str, objective: str) -> None:
    """One-token responses after a fixed prompt, so E[R] = Σ_a π(a)·R(a) is exact; R is 1 for three of the 19
    tokens. Fresh samples of the learner's own probabilities at every step; no KL penalty, and ranges as wide
    as PPO's, since GSPO's own is made for long responses.
    """
    prompt, good = (1, 2), [4, 9, 14]
    ppo = {"kl_coef": 0.0, "minibatches": 2, "epochs": 2, "overlong_fraction": 0.0}
    if objective == "gspo":
        ppo |= {"clip": 0.2, "clip_high": 0.2}
    job = job_of(llama, objective, ppo=ppo, optimizer={"lr": 3e-3})
    draw = torch.Generator().manual_seed(0)

    def distribution(worker: LearnerWorker) -> torch.Tensor:
        rows = worker.probe([[*prompt, token] for token in range(19)])
        return torch.tensor([row[-1] for row in rows]).exp()

    def work(worker: LearnerWorker) -> tuple[float, float]:
        before = float(distribution(worker)[good].sum())
        for version in range(12):
            chances = distribution(worker)
            tokens = torch.multinomial(chances, 32, replacement=True, generator=draw).tolist()
            trajectories = tuple(
                Trajectory(
                    Completion((token,), (float(chances[token].log()),), (version,), "", "stop"),
                    float(token in good),
                    {},
                    (0.0,),
                )
                for token in tokens
            )
            worker.step([Group(version, Prompt("p", prompt, ""), trajectories, "a", 0.0, 0.0)], version)
        return before, float(distribution(worker)[good].sum())

    before, after = in_one_rank(job, work)
    assert after > before + 0.4

"""The learner's step on the real engine, in one process: what PPO must satisfy, save and resume, refusals."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_learner import in_one_rank, make_groups, make_job, save_model, take_steps, weights_of

from actors.language_model import load_causal_model, response_logprobs
from actors.records import Completion, Group, Prompt, Trajectory
from learner.engine import NonFiniteGradientError
from learner.worker import LearnerWorker

pytestmark = pytest.mark.integration

TWO_EPOCHS = {"epochs": 2, "minibatches": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.mark.parametrize("value_model", ["head", "critic"])
def test_first_step_of_an_on_policy_batch(llama: str, value_model: str) -> None:
    """Sampler and reference are the policy itself, moved by known constants, so the metrics are known.

    log π_ref = log π + 0.5 makes k1 = −0.5 a token; log μ = log π + 0.1 makes every raw weight e^−0.1, so
    the ESS is 1 and KL(μ‖π) = e^−0.1 − 1 + 0.1. The value head starts at 0, so with λ = 1 a return is the
    reward-to-go, and nothing of it is explained.
    """
    groups = make_groups(llama, reference_shift=0.5, sampler_shift=0.1)
    job = make_job(llama, ppo={"value_model": value_model, "kl_coef": 0.2, "gae_lambda": 1.0, **TWO_EPOCHS})
    (metrics,) = in_one_rank(job, lambda worker: take_steps(worker, [groups]))
    assert metrics["ppo/first_ratio_deviation"] < 1e-5
    assert metrics["kl/token"] == pytest.approx(-0.5, abs=1e-5)
    assert metrics["kl/token_k3"] == pytest.approx(math.exp(0.5) - 1.5, abs=1e-5)
    tokens = [len(t.completion.token_ids) for g in groups for t in g.trajectories]
    assert metrics["kl/sequence"] == pytest.approx(-0.5 * sum(tokens) / len(tokens), abs=1e-4)
    assert metrics["mismatch/ess"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["mismatch/kl"] == pytest.approx(math.exp(-0.1) - 0.9, abs=1e-6)
    to_go = [
        t.reward + 0.2 * 0.5 * (n - k)
        for g in groups
        for t in g.trajectories
        for n in [len(t.completion.token_ids)]
        for k in range(n)
    ]
    assert metrics["return/mean"] == pytest.approx(np.mean(to_go), abs=1e-5)
    assert metrics["return/std"] == pytest.approx(np.std(to_go), abs=1e-5)
    assert metrics["value/explained_variance"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["optimizer/updates"] == 4.0
    assert metrics["optimizer/grad_norm"] > 0
    assert ("optimizer/critic_grad_norm" in metrics) == (value_model == "critic")


def test_log_probabilities_are_those_at_the_sampling_temperature(llama: str) -> None:
    """Sampler and reference are the policy at 0.7, so a learner at 0.7 sees no difference, one at 1 does."""
    groups = make_groups(llama, temperature=0.7)
    (same,) = in_one_rank(make_job(llama, temperature=0.7), lambda worker: take_steps(worker, [groups]))
    assert same["mismatch/abs_logprob_difference"] == pytest.approx(0.0, abs=1e-5)
    assert same["kl/token"] == pytest.approx(0.0, abs=1e-5)
    assert same["ppo/first_ratio_deviation"] < 1e-5
    (other,) = in_one_rank(make_job(llama), lambda worker: take_steps(worker, [groups]))
    assert other["mismatch/abs_logprob_difference"] > 0.05
    assert abs(other["kl/token"]) > 0.01


def gradient_norm(path: str, groups: list[Group], **correction: Any) -> float:
    """Of the first update, by the policy's loss alone."""
    alone = {"value_coef": 0.0, "kl_coef": 0.0, "whiten_advantages": False}
    job = make_job(path, ppo=alone, correction=correction, optimizer={"max_grad_norm": 1e6})
    (metrics,) = in_one_rank(job, lambda worker: take_steps(worker, [groups]))
    return metrics["optimizer/grad_norm"]


def test_importance_weights_reach_the_loss(llama: str) -> None:
    """log μ = log π + 0.1 weighs every token with e^−0.1, and so the gradient; `none` is no weight.

    log μ = log π − 1 would weigh with e, cut off at 2.
    """
    plain = gradient_norm(llama, make_groups(llama))
    shifted = make_groups(llama, sampler_shift=0.1)
    assert plain > 0
    assert gradient_norm(llama, shifted) / plain == pytest.approx(math.exp(-0.1), rel=1e-4)
    assert gradient_norm(llama, shifted, weights="none") / plain == pytest.approx(1.0, rel=1e-4)
    assert gradient_norm(llama, make_groups(llama, sampler_shift=-1.0)) / plain == pytest.approx(2, rel=1e-4)


def test_packing_and_micro_batches_change_nothing(llama: str) -> None:
    """All in one micro-batch, or (almost) every sequence in one of its own; logits of 3 tokens at a time
    and activations recomputed: the same loss and weights.
    """
    groups = make_groups(llama)
    results = []
    ways = (
        {"micro_batch_tokens": 4096},
        {"micro_batch_tokens": 8},
        {"micro_batch_tokens": 4096, "logprob_chunk_tokens": 3, "gradient_checkpointing": True},
    )
    for learner in ways:
        job = make_job(llama, learner=learner, ppo={"entropy_coef": 0.01})

        def work(worker: LearnerWorker) -> Any:
            return take_steps(worker, [groups])[0], weights_of(worker)

        results.append(in_one_rank(job, work))
    whole, weights = results[0]
    for parts, other in results[1:]:
        for name in ("loss/policy", "loss/value", "loss/total", "policy/entropy", "optimizer/grad_norm"):
            assert whole[name] == pytest.approx(parts[name], rel=1e-4, abs=1e-6), name
        assert largest_difference(weights, other) < 1e-5


BFLOAT16 = {"precision": "bfloat16"}


@pytest.mark.parametrize(
    ("learner", "value_model"),
    [
        ({"zero_stage": 0}, "head"),
        ({"zero_stage": 0}, "critic"),
        ({"zero_stage": 2}, "head"),
        ({"zero_stage": 3}, "critic"),
        ({"zero_stage": 0, **BFLOAT16}, "head"),
        ({"zero_stage": 2, **BFLOAT16}, "head"),
        ({"zero_stage": 3, "cpu_offload": True, **BFLOAT16}, "head"),
    ],
)
def test_resume_is_bitwise(llama: str, tmp_path: Path, learner: dict[str, Any], value_model: str) -> None:
    batches = [make_groups(llama, seed=seed, version=seed, reference_shift=-0.3) for seed in range(3)]
    job = make_job(
        llama,
        learner=learner,
        ppo={"value_model": value_model, "kl_control": "adaptive", "kl_horizon": 50, **TWO_EPOCHS},
        optimizer={"schedule": "cosine"},
    )

    def straight(worker: LearnerWorker) -> Any:
        take_steps(worker, batches[:1])
        worker.save(str(tmp_path / "checkpoint"))
        rows = take_steps(worker, batches[1:], first=1)
        return weights_of(worker), rows[-1]

    def resumed(worker: LearnerWorker) -> Any:
        assert worker.restore(str(tmp_path / "checkpoint")) == 1
        rows = take_steps(worker, batches[1:], first=1)
        return weights_of(worker), rows[-1]

    expected, last = in_one_rank(job, straight)
    got, last_again = in_one_rank(job, resumed)
    for name in expected:
        assert np.array_equal(expected[name], got[name]), name
    timeless = [name for name in last if not name.startswith(("timing_s/", "memory/"))]
    assert {name: last[name] for name in timeless} == {name: last_again[name] for name in timeless}
    assert last["kl/coef"] != job.ppo.kl_coef


def test_offloading_compiles_nothing_and_changes_nothing(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own AdamW with master weights and moments in float32; the same two steps as without it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    results = []
    for offload in (False, True):
        learner = {"zero_stage": 3, "cpu_offload": offload, **BFLOAT16}

        def work(worker: LearnerWorker) -> Any:
            rows = take_steps(worker, [make_groups(llama, seed=seed, version=seed) for seed in range(2)])
            optimizer = worker._engines[0]._engine.basic_optimizer
            return rows, weights_of(worker), optimizer

        results.append(in_one_rank(make_job(llama, learner=learner, ppo=TWO_EPOCHS), work))
    (rows, weights, _), (rows_too, weights_too, optimizer) = results
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"]
    kinds = {
        (value.dtype, value.device.type)
        for state in optimizer.state.values()
        for value in state.values()
        if value.ndim
    }
    assert kinds == {(torch.float32, "cpu")}
    assert {parameter.dtype for parameter in optimizer.state} == {torch.float32}
    assert not (tmp_path / "extensions").exists()
    assert rows_too[1]["optimizer/grad_norm"] == pytest.approx(rows[1]["optimizer/grad_norm"], rel=0.02)
    # bfloat16 holds 8 bits: the kernels' rounding may move a weight (below 1) by a few of its last ones.
    assert largest_difference(weights, weights_too) < 2**-6


def test_a_checkpoint_of_other_settings_is_refused(llama: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    job = make_job(llama)
    in_one_rank(job, lambda worker: worker.save(folder))
    changed = make_job(llama, learner={"zero_stage": 1})
    with pytest.raises(ValueError, match=r"learner\.zero_stage = 0, this run has 1"):
        in_one_rank(changed, lambda worker: worker.restore(folder))
    with pytest.raises(ValueError, match=r"no learner\.json"):
        in_one_rank(job, lambda worker: worker.restore(str(tmp_path)))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_exported_policy_and_probe_agree(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    (Path(path) / "tokenizer.json").write_text("{}", encoding="utf-8")
    groups = make_groups(path)
    probe = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]

    def work(worker: LearnerWorker) -> Any:
        take_steps(worker, [groups])
        worker.export(str(tmp_path / "policy"))
        return worker.probe(probe), list(weights_of(worker))

    # The sampling temperature must not touch the probe.
    logprobs, names = in_one_rank(make_job(path, temperature=0.5), work)
    assert ("lm_head.weight" in names) == (kind == "llama")
    model = load_causal_model(str(tmp_path / "policy"), dtype="float32", attention="sdpa", device="cpu")
    expected = response_logprobs(
        model, [(ids[:1], ids[1:]) for ids in probe], temperature=1.0, micro_batch_tokens=64, chunk_tokens=8
    )
    for mine, theirs in zip(logprobs, expected, strict=True):
        assert mine == pytest.approx(theirs.tolist(), abs=1e-5)
    assert (tmp_path / "policy" / "tokenizer.json").read_text() == "{}"
    original = load_causal_model(path, dtype="float32", attention="sdpa", device="cpu")
    moved = (
        model.state_dict()["model.embed_tokens.weight"] - original.state_dict()["model.embed_tokens.weight"]
    )
    assert moved.abs().max() > 1e-4


def test_published_weights_are_the_present_ones_and_come_with_their_probe(qwen2: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def work(worker: LearnerWorker) -> Any:
        worker.open_publisher("shared", "test", [[1, 2, 3]], {"root": tmp_path})
        take_steps(worker, [make_groups(qwen2)])
        update = worker.publish(1)
        assert update is not None
        return update, load_file(update.payload["path"]), weights_of(worker), worker.probe([[1, 2, 3]])

    update, published, weights, probe = in_one_rank(make_job(qwen2), work)
    assert (update.version, update.probe_token_ids) == (1, ((1, 2, 3),))
    assert update.probe_logprobs == tuple(map(tuple, probe))
    assert published.keys() == weights.keys()
    for name, weight in weights.items():
        assert np.array_equal(published[name].numpy(), weight), name
    assert not Path(update.payload["path"]).exists()  # `stop` left nothing behind


def test_over_nccl_the_publisher_gives_the_address_that_other_nodes_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    import learner.publish

    given: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.1.2.3")
    monkeypatch.setattr(learner.publish, "WeightPublisher", lambda _, **options: given.append(options))
    worker = LearnerWorker(0, 1, make_job("nowhere"))
    worker.open_publisher("nccl", "test", [[1, 2]], {"engines": 2})
    worker.open_publisher("shared", "test", [[1, 2]])
    assert (given[0]["address"], given[0]["engines"]) == ("10.1.2.3", 2)
    assert "address" not in given[1]


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_bad_gradient_is_refused_and_leaves_the_weights(llama: str, zero_stage: int) -> None:
    """An infinite advantage (a reward beyond float32) makes an infinite gradient."""
    (group,) = make_groups(llama, groups=1, size=2)
    broken = dataclasses.replace(group.trajectories[0], reward=3e38)
    worse = dataclasses.replace(group.trajectories[1], reward=-3e38)
    groups = [dataclasses.replace(group, trajectories=(broken, worse))]
    job = make_job(llama, learner={"zero_stage": zero_stage}, ppo={"whiten_advantages": False})

    def work(worker: LearnerWorker) -> Any:
        before = weights_of(worker)
        with pytest.raises(
            NonFiniteGradientError, match=r"policy: the gradient of update 0 is not finite.*earlier updates"
        ):
            worker.step(groups, 0)
        return before, weights_of(worker)

    before, after = in_one_rank(job, work)
    assert largest_difference(before, after) == 0.0


def test_bfloat16_takes_the_same_step_up_to_rounding(llama: str) -> None:
    groups = make_groups(llama)
    rows = [
        in_one_rank(make_job(llama, learner={"precision": precision}), lambda w: take_steps(w, [groups])[0])
        for precision in ("float32", "bfloat16")
    ]
    assert rows[1]["ppo/first_ratio_deviation"] < 0.1
    for name in ("loss/value", "policy/entropy", "optimizer/grad_norm", "advantage/std"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.05), name


def test_steps_come_in_order(llama: str) -> None:
    groups = make_groups(llama)
    with pytest.raises(ValueError, match="step 3 was asked for, but the learner has taken 0"):
        in_one_rank(make_job(llama), lambda worker: worker.step(groups, 3))


def test_warmup_learns_and_leaves_fresh_optimizer_state(llama: str) -> None:
    """Loss on a constant demonstration falls; its first value is the model's own −mean log π.

    That is at temperature 1, whatever the sampling temperature.
    """
    batch = [((1, 2), (3, 4, 5)), ((6,), (7, 8))]
    job = make_job(llama, warmup={"steps": 20, "lr": 1e-2}, ppo={"value_model": "critic"}, temperature=0.5)

    def work(worker: LearnerWorker) -> Any:
        rows = worker.warmup_updates([batch] * 12) + worker.warmup_updates([batch] * 8)
        worker.finish_warmup()
        moments = [
            float(value.abs().sum())
            for state in worker._engines[0]._engine.basic_optimizer.state.values()
            for value in state.values()
        ]
        critic = {
            name: tensor.numpy().copy()
            for name, tensor in worker._engines[1].full_parameters(worker._engines[1].module.model)
        }
        return rows, moments, weights_of(worker), critic

    rows, moments, weights, critic = in_one_rank(job, work)
    model = load_causal_model(llama, dtype="float32", attention="sdpa", device="cpu")
    own = response_logprobs(model, batch, temperature=1.0, micro_batch_tokens=64, chunk_tokens=64)
    assert rows[0]["warmup/loss"] == pytest.approx(-float(torch.cat(own).mean()), rel=1e-5)
    assert rows[-1]["warmup/loss"] < 0.2 * rows[0]["warmup/loss"]
    assert [row["warmup/step"] for row in rows] == list(range(1, 21))
    assert sum(moments) == 0.0
    # The critic starts from the policy that the warm-up left, not from the one on disk.
    assert np.array_equal(critic["embed_tokens.weight"], weights["model.embed_tokens.weight"])


def test_ppo_raises_the_expected_reward_of_an_enumerable_task(llama: str) -> None:
    """One-token responses after a fixed prompt, so E[R] = Σ_a π(a)·R(a) is exact before and after.

    R(a) = 1 for the three tokens 4, 9, 14 and 0 for the others. Every step samples from the learner's own
    probabilities; the KL coefficient is 0.
    """
    prompt, good = (1, 2), (4, 9, 14)
    job = make_job(llama, ppo={"kl_coef": 0.0, "minibatches": 2, "epochs": 2}, optimizer={"lr": 3e-3})
    draw = torch.Generator().manual_seed(0)

    def distribution(worker: LearnerWorker) -> torch.Tensor:
        rows = worker.probe([[*prompt, token] for token in range(19)])
        return torch.tensor([row[-1] for row in rows]).exp()

    def work(worker: LearnerWorker) -> Any:
        expected = []
        for version in range(15):
            probabilities = distribution(worker)
            expected.append(float(probabilities[list(good)].sum()))
            tokens = torch.multinomial(probabilities, 32, replacement=True, generator=draw).tolist()
            trajectories = tuple(
                Trajectory(
                    Completion((token,), (float(probabilities[token].log()),), (version,), "", "stop"),
                    float(token in good),
                    {},
                    (0.0,),
                )
                for token in tokens
            )
            worker.step([Group(version, Prompt("p", prompt, ""), trajectories, "a", 0.0, 0.0)], version)
        return expected, float(distribution(worker)[list(good)].sum())

    expected, final = in_one_rank(job, work)
    assert final > expected[0] + 0.4
    assert final > 0.8

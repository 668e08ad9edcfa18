"""Tiny models on disk, groups to learn from, and jobs, for the learner's tests."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from learner_ranks import free_port

from actors.language_model import load_causal_model, response_logprobs
from actors.records import Completion, Group, Prompt, Trajectory
from learner.settings import (
    CorrectionSettings,
    LearnerSettings,
    ModelSettings,
    OptimizerSettings,
    PPOSettings,
    WarmupSettings,
)
from learner.worker import LearnerJob, LearnerWorker

VOCABULARY = 19


def save_model(folder: Path, kind: str = "llama", *, seed: int = 3) -> str:
    """A model of random weights, wide enough apart that distributions are not all uniform."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    configs = {"llama": LlamaConfig(**shape), "qwen2": Qwen2Config(**shape, tie_word_embeddings=True)}
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(configs[kind]).save_pretrained(folder)
    return str(folder)


def make_groups(
    path: str,
    *,
    groups: int = 4,
    size: int = 3,
    version: int = 0,
    seed: int = 0,
    reference_shift: float = 0.0,
    sampler_shift: float = 0.0,
    temperature: float = 1.0,
    sampler_noise: float = 0.0,
    oldest: int | None = None,
) -> list[Group]:
    """Groups of random responses; sampler and reference are the model itself, moved by constants.

    `sampler_noise` is the spread of a further change of each sampler log-probability. With `oldest`, every
    token is of some version from that one to `version`.
    """
    draw = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, count: int) -> tuple[int, ...]:
        return tuple(torch.randint(low, high, (count,), generator=draw).tolist())

    drawn = []
    for _ in range(groups):
        prompt = integers(0, VOCABULARY, integers(1, 5, 1)[0])
        drawn.append((prompt, [integers(0, VOCABULARY, integers(1, 7, 1)[0]) for _ in range(size)]))
    model = load_causal_model(path, dtype="float32", attention="sdpa", device="cpu")
    pairs = [(prompt, response) for prompt, responses in drawn for response in responses]
    logprobs = response_logprobs(
        model, pairs, temperature=temperature, micro_batch_tokens=512, chunk_tokens=64
    )
    flat = iter(logprobs)
    result = []
    for number, (prompt, responses) in enumerate(drawn):
        trajectories = []
        for response in responses:
            own = next(flat)
            noise = sampler_noise * torch.randn(len(response), generator=draw)
            versions = torch.randint(
                version if oldest is None else oldest, version + 1, (len(response),), generator=draw
            )
            completion = Completion(
                response,
                tuple((own + sampler_shift + noise).tolist()),
                tuple(versions.tolist()),
                "",
                "stop" if response[-1] % 2 else "length",
            )
            reward = sum(token % 5 for token in response) / 10.0
            trajectories.append(
                Trajectory(completion, reward, {"r": reward}, tuple((own + reference_shift).tolist()))
            )
        result.append(Group(number, Prompt(f"p:{number}", prompt, ""), tuple(trajectories), "a", 0.0, 0.0))
    return result


def make_job(path: str, **changes: Any) -> LearnerJob:
    """A job whose settings tables are given as keyword dictionaries."""
    return LearnerJob(
        model_path=path,
        model=ModelSettings(**{"path": path} | changes.get("model", {})),
        learner=LearnerSettings(**{"micro_batch_tokens": 64, "device": "cpu"} | changes.get("learner", {})),
        optimizer=OptimizerSettings(**{"lr": 1e-3} | changes.get("optimizer", {})),
        ppo=PPOSettings(**changes.get("ppo", {})),
        correction=CorrectionSettings(**changes.get("correction", {})),
        warmup=WarmupSettings(**changes.get("warmup", {})),
        temperature=changes.get("temperature", 1.0),
        seed=changes.get("seed", 0),
        total_updates=changes.get("total_updates", 100),
        max_length=64,
        max_new_tokens=changes.get("max_new_tokens", 0),
    )


def weights_of(worker: LearnerWorker) -> dict[str, Any]:
    """The policy's whole weights as numpy arrays."""
    return {name: tensor.float().numpy().copy() for name, tensor in worker.parameters_for_publish()}


def in_one_rank(job: LearnerJob, work: Callable[[LearnerWorker], Any]) -> Any:
    """Start a learner in this process, work with it, stop it."""
    worker = LearnerWorker(0, 1, job)
    worker.start("127.0.0.1", free_port())
    try:
        return work(worker)
    finally:
        worker.stop()


def take_steps(
    worker: LearnerWorker, batches: Sequence[list[Group]], first: int = 0
) -> list[dict[str, float]]:
    """One learner step a batch."""
    return [worker.step(groups, first + number) for number, groups in enumerate(batches)]

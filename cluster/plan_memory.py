"""How much memory a job needs, by place: a stated formula, not a measurement.

N parameters, w bytes each (4 in float32, 2 in bfloat16), R learner ranks, G samples a group:

- learner, a rank: weights N·w, gradients N·w, Adam 8·N and in bfloat16 a float32 copy 4·N more; Adam's part
  is split over ranks from ZeRO 1, gradients from ZeRO 2, weights from ZeRO 3; all of it once more with a
  critic, and once more with a discriminator
- rollout actor: weights N·w, and key-value cache for all sequences at full length, at most `kv_cache_gib`
- scoring actor: weights of the reference N·w, and of a discriminator as many
- shared memory: the published weights, N·w, and a discriminator's
- object store: 32 bytes a token (id, log μ, version, log π_ref) of (S + 1)·P groups, and of a step's batch

Activations, logits and the runtime's own needs come on top.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.config import JobConfig
from cluster.plan_model import Workload
from rewards.discriminator_settings import trains_discriminator

FORMULA = " ".join((__doc__ or "").split())
_GIB = 1024**3
_BYTES_PER_TOKEN = 32
_WIDTH = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Memory:
    """GiB, all processes of a kind together."""

    learner: float
    rollout: float
    scoring: float
    shared: float
    object_store: float

    @property
    def total(self) -> float:
        """Of the whole job."""
        return self.learner + self.rollout + self.scoring + self.shared + self.object_store


@dataclass(frozen=True, slots=True)
class Sizes:
    """GiB of each part: of one learner rank, one rollout actor, and what all share."""

    parameters: float  # a count, not GiB
    weights: float  # one whole copy: an actor's, the reference's, the published one
    rank_weights: float
    rank_gradients: float
    rank_optimizer: float
    kv_cache: float
    object_store: float

    @property
    def rank(self) -> float:
        """Of one learner rank."""
        return self.rank_weights + self.rank_gradients + self.rank_optimizer


def derive_sizes(config: JobConfig, workload: Workload, *, window: int) -> Sizes | None:
    """The parts of which a job's memory is made up; None where the model's size is not known."""
    count = workload.size.parameters
    if not count:
        return None
    learner, rollout = config.learner, config.rollout
    width = _WIDTH[learner.precision]
    weights = count * width / _GIB
    weight_split, gradient_split, adam_split = (
        learner.ranks if learner.zero_stage >= stage else 1 for stage in (3, 2, 1)
    )
    adam = count * (8 if width == 4 else 12) / _GIB
    models = config.trained_models
    prompt = workload.generation.prompt_tokens
    per_token = workload.size.kv_values_per_token * width
    cache = rollout.max_num_seqs * (prompt + rollout.max_new_tokens) * per_token / _GIB
    median = float(workload.lengths.at(np.array([0.5]))[0])
    tokens = rollout.group_size * (prompt + min(median, rollout.max_new_tokens))
    groups = (window + 2) * config.groups_per_step
    return Sizes(
        parameters=count,
        weights=weights,
        rank_weights=models * weights / weight_split,
        rank_gradients=models * weights / gradient_split,
        rank_optimizer=models * adam / adam_split,
        kv_cache=min(cache, rollout.kv_cache_gib),
        object_store=groups * tokens * _BYTES_PER_TOKEN / _GIB,
    )


def estimate(config: JobConfig, workload: Workload, *, actors: int, window: int) -> Memory | None:
    """Memory of a job with so many actors and such a window; None where the model's size is not known."""
    sizes = derive_sizes(config, workload, window=window)
    if sizes is None:
        return None
    scored = sizes.weights * (1 + trains_discriminator(config.reward))
    return Memory(
        learner=config.learner.ranks * sizes.rank,
        rollout=actors * (sizes.weights + sizes.kv_cache),
        scoring=config.scoring.actors * scored,
        shared=scored,
        object_store=sizes.object_store,
    )


def model_size(folder: Path) -> dict[str, float]:
    """`[size]` of a model's folder, from its safetensors files and its config.json; {} if there are none."""
    parameters = sum(_parameters(path) for path in sorted(folder.glob("*.safetensors")))
    if not parameters:
        return {}
    try:
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads = int(shape["num_attention_heads"])
        key_value = int(shape.get("num_key_value_heads") or heads)
        width = int(shape.get("head_dim") or int(shape["hidden_size"]) // heads)
        cache = 2.0 * int(shape["num_hidden_layers"]) * key_value * width
    except (OSError, ValueError, KeyError, TypeError):
        cache = 0.0  # another architecture: the weights are known, the cache is not
    return {"parameters": float(parameters), "kv_values_per_token": cache}


def _parameters(path: Path) -> int:
    """Numbers in a safetensors file: its first 8 bytes are the length of a JSON head with every shape."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        head = json.loads(file.read(length))
    total = 0
    for name, tensor in head.items():
        if name != "__metadata__":
            count = 1
            for extent in tensor["shape"]:
                count *= int(extent)
            total += count
    return total

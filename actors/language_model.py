"""Causal language models: loading them safely, and log-probabilities that never hold all logits at once.

The learner and the scoring actors go through this one file, so that the policy and its reference are the
same function of the same tokens. What it relies on (that packing changes nothing, and that the head alone
gives the model's logits) is checked on the loaded model itself, which is refused if it does not hold.

Legend: R rows, L tokens of a row, N predicted response tokens, H hidden size, V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from actors.packing import MicroBatch, Pair, pack, scatter
from rewards.models.attention import exact_attention
from rewards.models.foreign import opening, refuse_nonfinite
from rewards.models.weights import unsafe_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Differences that rounding explains, in nats, when the same tokens go another way through a model: in a
# large model, and in a tiny one.
ROUNDING = {"float32": 1e-3, "bfloat16": 0.25}
SMALL_ROUNDING = {"float32": 1e-5, "bfloat16": 0.02}


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What some architectures do to logits after the output layer: scale, then softcap·tanh(·/softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "LogitTransform":
        """Read it from the configuration; `check_model` proves that nothing else was done."""
        config = model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(scale, float(softcap) if softcap else None)


# --- Loading ---------------------------------------------------------------------------------------------


def load_causal_model(
    path: str, *, dtype: str, attention: str, device: str, revision: str | None = None
) -> "PreTrainedModel":
    """Load a folder or hub name for training or scoring: dropout off, no cache, safetensors only.

    Code that comes with a model is never run. The model is in eval mode; all weights it needs must be in
    the files (a missing one would be random).
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if dtype not in DTYPES:
        raise ValueError(f"precision = {dtype!r}: use one of {', '.join(DTYPES)}")
    logging.disable_progress_bar()
    refuse_unusable_folder(path)
    config = _config_without_dropout(path, revision)
    with opening(f"model path = {path!r}: cannot be opened"):
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            revision=revision,
            dtype=DTYPES[dtype],
            attn_implementation=exact_attention(config, attention),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
    if missing:
        raise ValueError(
            f"model path = {path!r}: its files lack {len(missing)} weights of a {config.model_type} causal "
            f"language model ({', '.join(missing[:3])}): use a folder that was saved from one"
        )
    refuse_nonfinite(f"model path = {path!r}", model)
    prepare_for_training(model)
    model = model.to(device)
    check_model(model, dtype)
    return model


def refuse_unusable_folder(path: str) -> None:
    """Say in plain words what is wrong with a local folder, before a library says it in its own."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or not path
        if looks_local:
            raise ValueError(
                f"model path = {path!r}: no such folder; give a folder with config.json or a hub name"
            )
        return
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(
            f"model path = {path!r}: the folder has no config.json, so it is not a transformers model"
        )
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model path = {path!r}: config.json is not valid JSON ({error})") from error
    if unsafe := unsafe_weights(folder):
        raise ValueError(f"model path = {path!r}: {unsafe}")


def prepare_for_training(model: "PreTrainedModel") -> None:
    """Dropout and cache off, eval mode: the same weights must always give the same probabilities."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    model.eval()


def _config_without_dropout(path: str, revision: str | None) -> Any:
    """The model's configuration with every source of randomness in it at zero."""
    from transformers import AutoConfig

    with opening(
        f"model path = {path!r}: its configuration cannot be read",
        "give a folder or hub name of an architecture that this transformers version knows",
    ):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        text = config.get_text_config()
        for name, value in list(vars(text).items()):
            random = "drop" in name or name.endswith("jitter_noise")
            if random and isinstance(value, float):
                setattr(text, name, 0.0)
    return config


def check_model(model: "PreTrainedModel", dtype: str) -> None:
    """Refuse a model for which packing or the chunked head would give other probabilities.

    Two sequences are scored three ways: alone (through the model's own logits), packed in a row, and run
    together as if they were one. Packed must equal alone; running together shows how large the error of an
    architecture that looks across sequences (a recurrent state, say) would be.
    """
    kind = model.config.model_type
    vocabulary = model.get_output_embeddings().weight.shape[0]
    ids = [(7 * i * i + 3 * i + 1) % vocabulary for i in range(24)]
    pairs: list[Pair] = [(ids[:1], ids[1:13]), (ids[13:14], ids[14:])]
    alone = [_own_logprobs(model, (*prompt, *response)) for prompt, response in pairs]
    with torch.no_grad():
        chunked = [
            response_logprobs(model, [pair], temperature=1.0, micro_batch_tokens=64, chunk_tokens=5)[0]
            for pair in pairs
        ]
        packed = response_logprobs(model, pairs, temperature=1.0, micro_batch_tokens=64, chunk_tokens=64)
    together = _own_logprobs(model, ids)[13:]
    head_error = max(_distance(a, b) for a, b in zip(alone, chunked, strict=True))
    if not head_error <= ROUNDING[dtype]:
        raise ValueError(
            f"model type {kind!r} is not supported: its logits differ by {head_error:.2g} nats from those "
            "of its output layer, so it does more after that layer than is known here"
        )
    packing_error = max(_distance(a, b) for a, b in zip(alone, packed, strict=True))
    leak = _distance(together, alone[1])
    # Where little depends on the context at all, as in a model from scratch, the leak sets the scale.
    if not packing_error <= max(SMALL_ROUNDING[dtype], min(ROUNDING[dtype], leak / 4)):
        raise ValueError(
            f"model type {kind!r} is not supported: packing sequences in a row changes its probabilities "
            f"by {packing_error:.2g} nats (it does not keep apart what position_ids keep apart)"
        )


def _own_logprobs(model: "PreTrainedModel", ids: Sequence[int]) -> Tensor:
    """(len(ids) − 1,) log-probabilities of each next token from the model's own logits."""
    row = torch.tensor([list(ids)], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
    return torch.log_softmax(logits, -1).gather(-1, row[0, 1:, None])[:, 0]


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a.cpu() - b.cpu()).abs().max())


# --- Log-probabilities -----------------------------------------------------------------------------------


def last_hidden(backbone: nn.Module, input_ids: Tensor, position_ids: Tensor, positions: Tensor) -> Tensor:
    """(N, H) last hidden states at `positions` of the flattened (R, L) rows."""
    config: Any = backbone.config
    if str(config._attn_implementation).startswith("flash"):
        # Flash attention recognises packed sequences in a single row only; a new row starts at position 0.
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    output = backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])[positions]


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    transform: LogitTransform,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """log π(target | hidden) and the entropy of π, both (N,) float32, for π = softmax(logits/temperature).

    hidden: (N, H); weight: (V, H); targets: (N,). At most (chunk_tokens, V) logits exist at one time: each
    chunk's are recomputed in the backward pass. The entropy carries no gradient unless asked for.
    """

    def one_chunk(states: Tensor, chunk_targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = transform(F.linear(states, weight, bias).float()) / temperature
        logprobs = torch.log_softmax(logits, dim=-1)
        chosen = logprobs.gather(-1, chunk_targets[:, None]).squeeze(-1)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return chosen, entropy

    chosen: list[Tensor] = []
    entropies: list[Tensor] = []
    for start in range(0, max(1, hidden.shape[0]), chunk_tokens):
        part = (hidden[start : start + chunk_tokens], targets[start : start + chunk_tokens])
        if torch.is_grad_enabled():
            logprob, entropy = checkpoint(
                one_chunk, *part, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
            )
        else:
            logprob, entropy = one_chunk(*part)
        chosen.append(logprob)
        entropies.append(entropy)
    return torch.cat(chosen), torch.cat(entropies)


def token_logprobs(
    model: "PreTrainedModel", micro_batch: MicroBatch, *, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, both (N,), of the micro-batch's response tokens."""
    head = model.get_output_embeddings()
    return chunked_logprobs(
        last_hidden(model.base_model, micro_batch.input_ids, micro_batch.position_ids, micro_batch.positions),
        head.weight,
        getattr(head, "bias", None),
        micro_batch.targets,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        transform=LogitTransform.of(model),
    )


@torch.no_grad()
def response_logprobs(
    model: "PreTrainedModel",
    pairs: Sequence[Pair],
    *,
    temperature: float,
    micro_batch_tokens: int,
    chunk_tokens: int,
) -> list[Tensor]:
    """Log-probabilities of every response token of (prompt, response) pairs, one CPU tensor a pair."""
    if not pairs:
        return []
    batches = pack(pairs, micro_batch_tokens=micro_batch_tokens)
    values = [
        token_logprobs(model, batch.to(model.device), temperature=temperature, chunk_tokens=chunk_tokens)[0]
        for batch in batches
    ]
    return scatter(batches, [value.cpu() for value in values], len(pairs))

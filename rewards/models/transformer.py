"""Transformers under a scalar head: opening them safely, and scores that padding and batching do not change.

The head reads the last hidden state of a sequence's last token. Sequences of like length go together, padded
on the right; what stands behind a sequence's end cannot reach it in a causal model.

Legend: N sequences, L longest of a batch, H hidden size, K members.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rewards.models.attention import exact_attention
from rewards.models.card import RewardCard, member_folder
from rewards.models.foreign import opening, refuse_nonfinite
from rewards.models.weights import unsafe_files, unsafe_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD = "score"


# --- Opening ---------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; code that comes with it is never run."""
    from transformers import AutoTokenizer

    what = f"reward model {str(folder)!r}"
    with opening(f"{what}: its tokenizer cannot be loaded", "save it beside the model"):
        if unsafe := unsafe_files(folder):
            raise ValueError(unsafe)
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def load_classifier(
    folder: str | Path,
    *,
    precision: str,
    device: str,
    attention: str = "sdpa",
    pad_token_id: int | None = None,
) -> "PreTrainedModel":
    """A transformer with one output, in eval mode and without dropout, from a folder of safetensors.

    The weights of the head may be missing, as they are in a language model: they are then 0. With
    `pad_token_id`, the model looks for the end of a padded sequence by that token.

    Raises ValueError for pickled weights, an architecture without such a head, and missing weights.
    """
    from transformers import AutoModelForSequenceClassification

    model, info = _open(
        AutoModelForSequenceClassification,
        Path(folder),
        precision=precision,
        attention=attention,
        num_labels=1,
    )
    if pad_token_id is not None:  # only now: it may be a new token, for which the embeddings have yet to grow
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_token_id
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
        raise ValueError(
            f"model {str(folder)!r}: as a sequence classifier, {model.config.model_type!r} has no plain "
            f"linear head named {HEAD!r} on its last token; use a causal model such as Llama, Qwen2, Mistral "
            'or Gemma, or kind = "embedding"'
        )
    missing = {str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]]}
    if others := sorted(missing - {f"{HEAD}.weight"}):
        raise ValueError(
            f"model {str(folder)!r}: its files lack {len(others)} weights of a {model.config.model_type} "
            f"({', '.join(others[:3])}): use a folder that was saved from one"
        )
    if missing:
        nn.init.zeros_(head.weight)
    return model.to(device)


def load_language_model(
    folder: str | Path, *, precision: str, device: str, attention: str = "sdpa"
) -> "PreTrainedModel":
    """A causal language model to score with, in eval mode; raises as `load_classifier`."""
    from transformers import AutoModelForCausalLM

    model, info = _open(AutoModelForCausalLM, Path(folder), precision=precision, attention=attention)
    missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
    if missing:
        raise ValueError(
            f"model {str(folder)!r}: its files lack {len(missing)} weights of a {model.config.model_type} "
            f"causal language model ({', '.join(missing[:3])}): use a folder that was saved from one"
        )
    opened: PreTrainedModel = model.to(device)
    return opened


def load_backbone(folder: str | Path, *, precision: str, device: str, attention: str = "sdpa") -> Any:
    """A language model without its output layer, for embeddings; raises as `load_classifier`."""
    from transformers import AutoModel

    model, info = _open(AutoModel, Path(folder), precision=precision, attention=attention)
    if info["missing_keys"]:
        raise ValueError(
            f"model {str(folder)!r}: its files lack {len(info['missing_keys'])} weights of a "
            f"{model.config.model_type}: use a folder that was saved from one"
        )
    return model.to(device)


def _open(factory: Any, folder: Path, *, precision: str, attention: str, **settings: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig
    from transformers.utils import logging

    if precision not in DTYPES:
        raise ValueError(f"precision = {precision!r}: use one of {', '.join(DTYPES)}")
    refuse_pickles(folder)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a head that is not there yet is what training begins with
    what = f"model {str(folder)!r}"
    try:
        with opening(f"{what}: cannot be opened"):
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
            for name, value in settings.items():
                setattr(config, name, value)
            _without_dropout(config)
            model, info = factory.from_pretrained(
                str(folder),
                config=config,
                dtype=DTYPES[precision],
                attn_implementation=exact_attention(config, attention),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(verbosity)
    refuse_nonfinite(what, model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    return model.eval(), info


def _without_dropout(config: Any) -> None:
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if ("drop" in name or name.endswith("jitter_noise")) and isinstance(value, float):
            setattr(text, name, 0.0)


def refuse_pickles(folder: Path) -> None:
    """ValueError unless the folder has a configuration, and weights that are safetensors and nothing else."""
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"model {str(folder)!r}: no config.json there; give a folder saved by transformers")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"model {str(folder)!r}: config.json cannot be read ({error})") from None
    if unsafe := unsafe_weights(folder):
        raise ValueError(f"model {str(folder)!r}: {unsafe}")


# --- The padding token -----------------------------------------------------------------------------------


def choose_padding(tokenizer: Any) -> int:
    """The tokenizer's padding token, chosen so that no sequence ends in it, and put on the right; its id.

    transformers takes the last token that is not padding for the end of a sequence. Where padding is the end
    token too, that would be the token before the end. So another stands in: the tokenizer's own if it is not
    the end token, else its first token (which only begins texts), else a new one, for which the embeddings
    must grow.
    """
    end, pad, begin = tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id
    if pad is None or pad == end:
        if begin is not None and begin != end:
            tokenizer.pad_token = tokenizer.bos_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    tokenizer.padding_side = "right"
    return int(tokenizer.pad_token_id)


# --- Scores ----------------------------------------------------------------------------------------------


def padded_batches(
    sequences: Sequence[Sequence[int]], micro_batch_tokens: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(which sequences, ids (n, L), mask (n, L)), longest first, at most `micro_batch_tokens` of n·L.

    A sequence that is longer than that comes alone. Padding has id 0 and mask 0.
    """
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    start = 0
    while start < len(order):
        width = len(sequences[order[start]])
        members = order[start : start + max(1, micro_batch_tokens // width)]
        start += len(members)
        ids = torch.zeros((len(members), width), dtype=torch.long)
        mask = torch.zeros((len(members), width), dtype=torch.long)
        for row, index in enumerate(members):
            sequence = sequences[index]
            ids[row, : len(sequence)] = torch.tensor(list(sequence), dtype=torch.long)
            mask[row, : len(sequence)] = 1
        yield members, ids, mask


@torch.no_grad()
def hidden_at_end(
    backbone: Any, sequences: Sequence[Sequence[int]], *, device: str, micro_batch_tokens: int
) -> Tensor:
    """(N, H) float32 on the CPU: the last hidden state of each sequence's last token."""
    width = int(backbone.config.get_text_config().hidden_size)
    hidden = torch.zeros((len(sequences), width), dtype=torch.float32)
    for members, ids, mask in padded_batches(sequences, micro_batch_tokens):
        output = backbone(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        last = (mask.sum(dim=1) - 1).to(device)
        states = output.last_hidden_state[torch.arange(len(members), device=device), last]
        hidden[torch.tensor(members)] = states.float().cpu()
    return hidden


class TransformerScorer:
    """The members of a reward model of kind "transformer"."""

    def __init__(self, models: Sequence[Any], device: str, micro_batch_tokens: int) -> None:
        self._models = models
        self._device = device
        self._tokens = micro_batch_tokens

    @classmethod
    def load(
        cls, folder: Path, card: RewardCard, device: str, precision: str, micro_batch_tokens: int
    ) -> "TransformerScorer":
        """Open every member's folder."""
        folders = [member_folder(folder, member, card.members) for member in range(card.members)]
        models = [load_classifier(one, precision=precision, device=device) for one in folders]
        return cls(models, device, micro_batch_tokens)

    def raw(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """(K, N): hidden state times the head's weights, multiplied out in float32."""
        rows = [self._hidden(model, sequences) @ _head(model) for model in self._models]
        return torch.stack(rows).double().numpy()

    def features(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """(N, H): what the first member's head is applied to."""
        return self._hidden(self._models[0], sequences).numpy()

    def _hidden(self, model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
        return hidden_at_end(
            model.base_model, sequences, device=self._device, micro_batch_tokens=self._tokens
        )


def _head(model: Any) -> Tensor:
    """(H,) float32 on the CPU."""
    weight: Tensor = getattr(model, HEAD).weight
    return weight.detach()[0].float().cpu()

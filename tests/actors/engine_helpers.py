"""Tiny models, an event loop in a thread, and the learner's side of a sync, for tests with a real vLLM."""

import asyncio
import threading
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

T = TypeVar("T")
VOCAB = 32
END = 1


class LoopThread:
    """An event loop that lives as long as a test module, so that tests can share an engine."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], seconds: float = 120) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)


def wait_gone(pid: int, seconds: float = 20) -> bool:
    """Whether a process ends in time; a zombie has ended."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def save_tokenizer(folder: Path) -> None:
    """Characters a–z and the space, after <pad> 0, <eos> 1 and <unk> 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "]
    tokenizer = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_model(
    folder: Path, kind: str = "llama", *, tied: bool = False, seed: int = 0, rare_end: bool = False
) -> Any:
    """A random model with peaked distributions, saved with its tokenizer; returned for comparison."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    save_tokenizer(folder)
    torch.manual_seed(seed)
    ids = {"eos_token_id": END, "pad_token_id": 0, "bos_token_id": None, "tie_word_embeddings": tied}
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB, n_positions=256, n_embd=64, n_layer=2, n_head=2, initializer_range=0.3, **ids
        )
        model = GPT2LMHeadModel(config)
    else:
        shape = {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
        }
        if kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**shape, **ids))
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**shape, **ids))
    if rare_end:
        # A logit of 0 among logits of deviation 2.4: about one token in 250 ends a response.
        with torch.no_grad():
            model.lm_head.weight[END] = 0
    model.eval().save_pretrained(folder)
    return model


def make_worker(
    folder: Path, name: str = "rollout-0", *, sync: dict[str, Any] | None = None, **rollout: Any
) -> Any:
    """A worker with small limits on a model folder."""
    from actors.rollout import RolloutWorker
    from actors.settings import RolloutSettings, SyncSettings

    settings = RolloutSettings(
        **{"kv_cache_gib": 0.05, "max_num_seqs": 64, "start_timeout_s": 180.0} | rollout
    )
    return RolloutWorker(
        name,
        str(folder),
        settings,
        SyncSettings(**(sync or {})),
        dtype="float32",
        max_length=256,
        seed=1,
        device="cpu",
    )


def request(group_id: int, *ids: int, size: int = 4, new: int = 16, temperature: float = 1.0) -> Any:
    """A request for samples of a prompt of those tokens."""
    from actors.records import Prompt, SampleRequest

    return SampleRequest(group_id, Prompt(f"train:{group_id}", ids, "text"), size, new, temperature)


def probe_of(model: Any) -> tuple[tuple[tuple[int, ...], ...], list[list[float]]]:
    """The probe's sequences and the model's log-probabilities of them."""
    return PROBE, [logprobs(model, ids) for ids in PROBE]


@torch.no_grad()
def logprobs(model: Any, ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """log softmax(logits / temperature) of every token but the first."""
    row = torch.tensor([list(ids)])
    scores = (model(row).logits[0, :-1].double() / temperature).log_softmax(-1)
    return scores.gather(1, row[0, 1:, None])[:, 0].tolist()


@torch.no_grad()
def perturb(model: Any, seed: int, scale: float = 0.05) -> None:
    """Move every weight, the norms' too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


PROBE = ((3, 4, 5, 6, 7, 8), (20, 19, 18), tuple(range(3, 28)) * 3)

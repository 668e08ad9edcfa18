"""Loading, chunked log-probabilities and the claim that packing changes nothing, on real tiny models."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    Qwen2Config,
)

from actors.language_model import (
    LogitTransform,
    check_model,
    chunked_logprobs,
    last_hidden,
    load_causal_model,
    response_logprobs,
)
from actors.packing import Pair, pack
from rewards.models.transformer import load_backbone, load_classifier, load_language_model

VOCABULARY = 37
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL),
    "qwen2-tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gemma2-softcap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
    "granite-scaled": GraniteConfig(**SMALL, logits_scaling=4.0),
}
PAIRS: list[Pair] = [([3, 5], [7, 9, 11]), ([1], [2, 4, 8, 16, 32]), ([30, 20, 10, 5, 1], [6]), ([9], [9, 9])]


def saved(config: Any, folder: Path) -> Path:
    """A model of random weights, saved as a user would."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load(folder: Path, **overrides: str) -> Any:
    return load_causal_model(
        str(folder), **({"dtype": "float32", "attention": "sdpa", "device": "cpu"} | overrides)
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(saved(CONFIGS["llama"], tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_and_chunked_equals_each_sequence_by_itself(name: str, attention: str, tmp_path: Path) -> None:
    model = load(saved(CONFIGS[name], tmp_path), attention=attention)
    expected = []
    for prompt, response in PAIRS:
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.7
        logprobs = torch.log_softmax(logits, -1)
        expected.append(logprobs[range(len(response)), list(response)])
    for limit in (9, 20, 64):  # several micro-batches; several rows; one row
        got = response_logprobs(model, PAIRS, temperature=0.7, micro_batch_tokens=limit, chunk_tokens=3)
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_capped_attention_scores_stay_capped(tmp_path: Path) -> None:
    """Fused attention leaves the cap out: policy, reference and rewards would be other models."""
    config = Gemma2Config(**SMALL, head_dim=8, attn_logit_softcapping=1.0)
    folder = saved(config, tmp_path)
    pair: Pair = (list(range(9)), list(range(20, 30)))
    ids = torch.tensor([[*pair[0], *pair[1]]])
    exact, fused = (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kind).eval()
        for kind in ("eager", "sdpa")
    )
    with torch.no_grad():
        wanted, other = (torch.log_softmax(model(ids).logits[0, 8:-1], -1) for model in (exact, fused))
    wanted, other = (law[range(10), list(pair[1])] for law in (wanted, other))
    assert float((wanted - other).abs().max()) > 0.1
    (found,) = response_logprobs(load(folder), [pair], temperature=1.0, micro_batch_tokens=64, chunk_tokens=8)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    loaded = (
        load_language_model(folder, precision="float32", device="cpu"),
        load_classifier(folder, precision="float32", device="cpu"),
        load_backbone(folder, precision="float32", device="cpu"),
    )
    assert [one.config._attn_implementation for one in loaded] == ["eager"] * 3


def test_chunks_change_neither_values_nor_gradients(llama: Any) -> None:
    (batch,) = pack(PAIRS, micro_batch_tokens=64)
    head = llama.get_output_embeddings()
    results = []
    for chunk in (2, 1000):
        llama.zero_grad()
        logprobs, entropy = chunked_logprobs(
            last_hidden(llama.base_model, batch.input_ids, batch.position_ids, batch.positions),
            head.weight,
            None,
            batch.targets,
            temperature=0.9,
            chunk_tokens=chunk,
            transform=LogitTransform(),
            entropy_gradient=True,
        )
        (logprobs.sin().sum() + 0.3 * entropy.square().sum()).backward()
        gradient = {name: p.grad.clone() for name, p in llama.named_parameters() if p.grad is not None}
        results.append((logprobs.detach(), entropy.detach(), gradient))
    llama.zero_grad()
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_entropy_and_temperature_by_hand() -> None:
    # Logits (log 4, 0) at temperature 2 are (log 2, 0): π = (2/3, 1/3), entropy = log 3 − (2/3) log 2.
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[math.log(4)], [0.0]])
    logprob, entropy = chunked_logprobs(
        hidden,
        weight,
        None,
        torch.tensor([1]),
        temperature=2.0,
        chunk_tokens=8,
        transform=LogitTransform(),
    )
    assert logprob.item() == pytest.approx(math.log(1 / 3))
    assert entropy.item() == pytest.approx(math.log(3) - 2 / 3 * math.log(2))


class LargestTensor(TorchDispatchMode):
    """Remembers the largest last-axis-V tensor that any operation made, forward or backward."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize(("chunk", "largest"), [(16, 16), (1000, 300)])
def test_the_full_logits_never_exist(chunk: int, largest: int) -> None:
    """300 tokens, V = 101, H = 8: with chunks of 16 no (more than 16, V) tensor in either direction.

    The second case shows that the measurement would see them.
    """
    hidden = torch.randn(300, 8, requires_grad=True)
    weight = torch.randn(101, 8, requires_grad=True)
    targets = torch.arange(300) % 101
    with LargestTensor(101) as seen:
        logprobs, entropy = chunked_logprobs(
            hidden,
            weight,
            None,
            targets,
            temperature=1.0,
            chunk_tokens=chunk,
            transform=LogitTransform(),
            entropy_gradient=True,
        )
        (logprobs.sum() + entropy.sum()).backward()
    assert seen.rows == largest


def test_logits_kept_for_backward_are_only_recomputed() -> None:
    """What autograd keeps between forward and backward has no vocabulary axis but the weight's."""
    kept: list[torch.Size] = []
    hidden = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(101, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        chunked_logprobs(
            hidden,
            weight,
            None,
            torch.zeros(64, dtype=torch.long),
            temperature=1.0,
            chunk_tokens=16,
            transform=LogitTransform(),
        )
    assert not [shape for shape in kept if shape and shape[-1] == 101]


def test_dropout_is_off(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL, attention_dropout=0.5)
    model = load(saved(config, tmp_path)).train()
    twice = [
        response_logprobs(model, PAIRS, temperature=1.0, micro_batch_tokens=64, chunk_tokens=8)[0]
        for _ in range(2)
    ]
    assert torch.equal(*twice)


def test_a_recurrent_model_is_refused(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(ValueError, match="'mamba' is not supported"):
        load(saved(config, tmp_path), attention="eager")


def test_a_model_that_changes_its_logits_unknown_to_us_is_refused(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = llama.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    monkeypatch.setattr(llama, "forward", changed)
    with pytest.raises(ValueError, match="does more after that layer"):
        check_model(llama, "float32")


def test_bad_folders_are_refused_in_plain_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load(tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load(empty)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="only pickled weights"):
        load(pickled)
    with pytest.raises(ValueError, match="precision = 'float16'"):
        load(empty, dtype="float16")


def test_weights_that_are_missing_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(CONFIGS["llama"], tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load(folder)

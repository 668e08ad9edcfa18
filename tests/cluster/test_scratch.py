"""A model from scratch: exact text round trip, stable weights, and that transformers and vLLM open it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.scratch import alphabet_of, build_scratch_model, build_tokenizer, check_shape
from learner.settings import ScratchSettings

# "<eos>" can be spelled with these, and white space of every kind, a combining accent and an emoji.
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789=+- <>/\n\r\t\u00a0\u0301\U0001f600"


def shape(**values: Any) -> ScratchSettings:
    small = {"hidden_size": 64, "heads": 2, "layers": 1, "max_length": 32}
    return ScratchSettings.model_validate(small | values)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scratch") / "model"
    return build_scratch_model(shape(tied_embeddings=request.param), ALPHABET, place, seed=5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(ALPHABET, 32).save_pretrained(place)
    return AutoTokenizer.from_pretrained(place)


@settings(deadline=None, max_examples=200)
@given(text=st.text(alphabet=ALPHABET, max_size=60))
def test_text_comes_back_exactly(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *ids]
    assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == text


def test_ids_and_special_tokens(tokenizer: Any) -> None:
    special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert special == ("<pad>", "<bos>", "<eos>", "<unk>")
    assert tokenizer.convert_tokens_to_ids(list(special)) == [0, 1, 2, 3]
    assert len(tokenizer) == 4 + len(ALPHABET)
    assert tokenizer("Z")["input_ids"] == [1, 3]  # not in the alphabet
    spelled = tokenizer("<eos>", add_special_tokens=False)["input_ids"]
    assert len(spelled) == 5  # characters, so no prompt can end itself
    assert 2 not in spelled


def test_the_folder_opens_with_transformers(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(loaded) == model.get_input_embeddings().weight.shape[0]
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not list(folder.glob("*.bin"))
    defaults = json.loads((folder / "generation_config.json").read_text())
    assert defaults.keys() <= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}


def test_the_shape_is_the_one_that_was_asked_for(folder: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(folder).config
    # The inner width is 8/3 · 64 = 170.67, rounded up to a multiple of 32: 192.
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 1, 2)
    assert (config.intermediate_size, config.max_position_embeddings) == (192, 32)


def test_the_seed_gives_the_weights_and_leaves_torch_alone(tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    folders = [build_scratch_model(shape(), "abc", tmp_path / str(n), seed=n // 2) for n in range(3)]
    assert torch.equal(torch.random.get_rng_state(), before)
    first, same, other = ((place / "model.safetensors").read_bytes() for place in folders)
    assert first == same
    assert first != other


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"hidden_size": 100, "heads": 3}, r"heads = 3 does not divide .*hidden_size = 100.*heads = 2"),
        ({"hidden_size": 64, "heads": 4}, r"64 / 4 = 16.*32, 64.*hidden_size = 128"),
    ],
)
def test_a_shape_that_cannot_run_is_refused(values: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_shape(shape(**values))


def test_alphabets() -> None:
    assert alphabet_of(["ba", "", "cab d"]) == " abcd"
    assert alphabet_of([]) == ""
    with pytest.raises(ValueError, match="alphabet"):
        build_tokenizer("", 32)


_GENERATE = """
import json, sys
from vllm import LLM, SamplingParams

engine = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=32, max_num_seqs=4)
ids = [int(i) for i in sys.argv[2].split(",")]
sampling = SamplingParams(max_tokens=6, temperature=1.0, logprobs=0, ignore_eos=True)
out = engine.generate([{"prompt_token_ids": ids}], sampling)[0].outputs[0]
logprobs = [entry[i].logprob for i, entry in zip(out.token_ids, out.logprobs, strict=True)]
print("RESULT" + json.dumps({"ids": list(out.token_ids), "logprobs": logprobs, "text": out.text}))
"""


@pytest.mark.integration
def test_vllm_opens_the_folder_and_agrees_with_transformers(tmp_path: Path) -> None:
    """vLLM runs in a process of its own, which ends with everything that it started."""
    place = build_scratch_model(shape(), ALPHABET, tmp_path / "model", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(place)
    prompt = tokenizer("reverse a")["input_ids"]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCH_COMPILE_DISABLE": "1",  # else a helper of its sampler is compiled, eager or not
    }
    done = subprocess.run(
        [sys.executable, "-c", _GENERATE, str(place), ",".join(map(str, prompt))],
        env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results, done.stderr[-3000:]
    result = json.loads(results[0].removeprefix("RESULT"))
    assert result["text"] == tokenizer.decode(result["ids"], skip_special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + result["ids"]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(result["ids"])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(result["logprobs"]), expected, atol=1e-4, rtol=0)

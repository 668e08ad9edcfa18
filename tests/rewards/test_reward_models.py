"""Reward models on disk: cards, tokens, and scores that padding, batching and companions do not change."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.data import Encoder
from cluster.data_settings import DataSettings
from cluster.scratch import build_tokenizer
from rewards.models.card import (
    RewardCard,
    TextFormat,
    read_card,
    read_label_keys,
    write_card,
)
from rewards.models.embedding import EmbeddingCache, RewardHead, input_statistics, sequence_key
from rewards.models.loading import load_reward_model, scores_from_raw
from rewards.models.text import EncodingError, Item, RewardEncoder
from rewards.models.transformer import choose_padding, load_classifier, padded_batches

ALPHABET = "abcdefghijklmnopqrstuvwxyz <>:0123456789"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(template: str | None = None) -> Any:
    tokenizer = build_tokenizer(ALPHABET, 64)
    tokenizer.chat_template = template
    return tokenizer


def save_classifier(folder: Path, seed: int) -> None:
    """A tiny Llama with one output and random weights, wide enough apart that scores differ."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        num_labels=1,
        pad_token_id=0,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_card(**changes: Any) -> RewardCard:
    values: dict[str, Any] = {
        "kind": "transformer",
        "loss": "bradley-terry",
        "rule": "mean",
        "members": 1,
        "mean": [0.5],
        "std": [2.0],
        "length_slope": [0.0],
        "text": TextFormat(max_length=64),
        "labels": 2,
    }
    return RewardCard(**(values | changes))


# --- tokens ----------------------------------------------------------------------------------------------


def test_tokens_are_those_that_a_policy_sees() -> None:
    """Prompt and completion by the data's own encoder, which makes what a policy reads and writes."""
    messages = [{"role": "user", "content": "two"}]
    for template, prompt in ((None, "add 1 2"), (TEMPLATE, "add 1 2"), (TEMPLATE, messages)):
        tokenizer = make_tokenizer(template)
        policy = Encoder(tokenizer, DataSettings(train="x"), 64)
        row = {"prompt": prompt, "completion": "3 abc"}
        expected = [*policy.prompt(row)[0], *policy.completion(row)]
        encoder = RewardEncoder(tokenizer, TextFormat(max_length=64))
        assert encoder.encode(prompt, "3 abc", True) == expected
        assert encoder.encode(prompt, "3 abc", False) == expected[:-1]
        assert expected[-1] == tokenizer.eos_token_id
        assert encoder.encode_item((prompt, "3 abc", True)).length == 5  # characters, no end token


@pytest.mark.parametrize(
    ("prompt", "completion", "reason"),
    [
        ("a" * 60, "b" * 5, "over-long"),  # 1 + 60 + 5 + 1 tokens
        ("  ", "b", "empty prompt"),
        ("a", "É", "unknown token"),
        ([{"role": "user", "content": "a"}], "b", "no chat template"),
    ],
)
def test_what_cannot_be_read_whole_is_refused(prompt: Any, completion: str, reason: str) -> None:
    encoder = RewardEncoder(make_tokenizer(), TextFormat(max_length=64))
    with pytest.raises(EncodingError) as caught:
        encoder.encode(prompt, completion, True)
    assert caught.value.reason == reason


def test_padding_is_never_the_end_token() -> None:
    tokenizer = make_tokenizer()
    assert choose_padding(tokenizer) == 0  # its own
    tokenizer.pad_token = tokenizer.eos_token
    assert choose_padding(tokenizer) == tokenizer.bos_token_id
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token
    before = len(tokenizer)
    assert choose_padding(tokenizer) == before  # a new one
    assert len(tokenizer) == before + 1


# --- scores ----------------------------------------------------------------------------------------------


def test_batches_hold_every_sequence_once_within_the_limit() -> None:
    sequences = [[1] * n for n in (3, 9, 1, 4, 4, 12)]
    seen: list[int] = []
    for members, ids, mask in padded_batches(sequences, 9):
        assert ids.numel() <= 9 or len(members) == 1
        assert mask.sum(dim=1).tolist() == [len(sequences[i]) for i in members]
        seen += members
    assert sorted(seen) == list(range(6))


def test_scores_are_those_of_plain_transformers_however_they_are_batched(tmp_path: Path) -> None:
    """raw against AutoModelForSequenceClassification on single unpadded rows, and on one padded batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    save_classifier(tmp_path, 5)
    write_card(tmp_path, make_card(), ["b" * 64, "a" * 64])
    items: list[Any] = [
        ("a", "b", True),
        ("abc def", "xyz 123", True),
        ("a" * 20, "q" * 30, False),
        ("z", "", True),
    ]
    model = load_reward_model(tmp_path, micro_batch_tokens=1)
    alone = model.score(items)
    together = load_reward_model(tmp_path, micro_batch_tokens=4096).score(items[::-1])
    np.testing.assert_allclose(alone.raw, together.raw[:, ::-1], atol=1e-5)
    assert np.ptp(alone.raw) > 0.1  # the comparison can fail

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    rows = [one.ids for one in model.encode(items)]
    single = [plain(torch.tensor([ids])).logits[0, 0].item() for ids in rows]
    np.testing.assert_allclose(alone.raw[0], single, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    np.testing.assert_allclose(alone.raw[0], plain(**padded).logits[:, 0].detach(), atol=1e-5)
    # value = (raw − mean)/std, and a transformer's raw score is linear in its features.
    np.testing.assert_allclose(alone.value, (alone.raw[0] - 0.5) / 2.0)
    head = plain.score.weight[0].detach().numpy()
    np.testing.assert_allclose(model.features(items) @ head, alone.raw[0], atol=1e-5)
    assert read_label_keys(tmp_path) == {"a" * 64, "b" * 64}


def test_an_ensemble_is_standardised_less_length_and_combined() -> None:
    """Responses of lengths 0, 1, 2. Member 0: (raw − 1·length − 1)/2, member 1: raw/0.5."""
    card = make_card(members=2, mean=[1.0, 0.0], std=[2.0, 0.5], length_slope=[1.0, 0.0], rule="worst")
    raw = np.array([[3.0, 2.0, 9.0], [1.0, -0.5, 0.25]])
    members = np.array([[1.0, 0.0, 3.0], [2.0, -1.0, 0.5]])
    scores = scores_from_raw(raw, np.array([0.0, 1.0, 2.0]), card)
    np.testing.assert_allclose(scores.members, members)
    np.testing.assert_allclose(scores.value, [1.0, -1.0, 0.5])
    np.testing.assert_allclose(scores.std, [0.5, 0.5, 1.25])
    mean = scores_from_raw(raw, np.array([0.0, 1.0, 2.0]), card.model_copy(update={"rule": "mean"}))
    np.testing.assert_allclose(mean.value, [1.5, -0.5, 1.75])


# --- refusals --------------------------------------------------------------------------------------------


def test_a_changed_folder_is_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path, 1)
    card = write_card(tmp_path, make_card(), ["a" * 64])
    assert read_card(tmp_path) == card
    (tmp_path / "evaluation.json").write_text("{}")  # not part of the version
    for name in ("README.md", "LICENSE", "plot.png", "notes.txt"):  # nothing reads them
        (tmp_path / name).write_text("a reward model")
    assert read_card(tmp_path).version == card.version
    for name in ("adapter_config.json", "merges.txt", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match="changed after training"):
            read_card(tmp_path)
        (tmp_path / name).unlink()
    assert read_card(tmp_path) == card
    save_classifier(tmp_path, 2)
    with pytest.raises(ValueError, match="changed after training"):
        load_reward_model(tmp_path)
    (tmp_path / "label_keys.txt").write_text("c" * 64 + "\n")
    with pytest.raises(ValueError, match="not the file that its training wrote"):
        read_label_keys(tmp_path)


def test_folders_that_are_no_reward_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no reward\.json"):
        load_reward_model(tmp_path)
    (tmp_path / "reward.json").write_text(json.dumps({"kind": "oracle"}))
    with pytest.raises(ValueError, match=r"kind in reward\.json"):
        load_reward_model(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path, 1)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights"):
        load_classifier(tmp_path, precision="float32", device="cpu")


def test_a_model_without_a_plain_head_is_refused(tmp_path: Path) -> None:
    """BERT's classifier stands on another token, under another name, and has a bias."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no plain linear head"):
        load_classifier(tmp_path, precision="float32", device="cpu")


# --- embeddings ------------------------------------------------------------------------------------------


def test_the_cache_gives_back_what_was_put_in_whatever_the_order(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, "m" * 64, "float32")
    keys = [sequence_key([n, 2]) for n in range(4)]
    rows = torch.arange(8.0).reshape(4, 2)
    cache.put(keys[:3], rows[:3])
    assert cache.missing([*keys, keys[3]]) == [keys[3]]
    EmbeddingCache(tmp_path, "m" * 64, "float32").put(keys[3:], rows[3:])
    again = EmbeddingCache(tmp_path, "m" * 64, "float32")
    assert again.missing(keys) == []
    assert torch.equal(again.get([keys[3], keys[0], keys[3]]), rows[[3, 0, 3]])
    assert EmbeddingCache(tmp_path, "m" * 64, "bfloat16").missing(keys) == keys
    assert EmbeddingCache(tmp_path, "n" * 64, "float32").missing(keys) == keys
    next((tmp_path / ("m" * 32 + "-float32")).glob("*.safetensors")).write_bytes(b"broken")
    with pytest.raises(ValueError, match="damaged"):
        EmbeddingCache(tmp_path, "m" * 64, "float32")


def test_the_small_network_is_the_formula() -> None:
    """One hidden unit: 3·max(0, 2·(x₀ − 1)/2 + 0·x₁ − 1) = 3·max(0, x₀ − 2) with input mean 1, scale 2."""
    head = RewardHead(2, [1])
    head.input_mean, head.input_scale = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0])
    with torch.no_grad():
        head.layers[0].weight.copy_(torch.tensor([[2.0, 0.0]]))
        head.layers[0].bias.fill_(-1.0)
        head.score.weight.fill_(3.0)
        assert head(torch.tensor([[5.0, 7.0], [1.0, -2.0]])).tolist() == [9.0, 0.0]
    mean, scale = input_statistics(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert mean.tolist() == [2.0, 5.0]
    assert scale.tolist() == [1.0, 1.0]  # the second does not vary


def test_many_are_encoded_in_one_call_as_one_by_one_are() -> None:
    calls: list[int] = []

    class Counting:
        """The tokenizer, with a count of the texts of each call."""

        def __init__(self, tokenizer: Any) -> None:
            self._tokenizer = tokenizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self._tokenizer, name)

        def __call__(self, texts: list[str], **options: Any) -> Any:
            calls.append(len(texts))
            return self._tokenizer(texts, **options)

    encoder = RewardEncoder(Counting(make_tokenizer()), TextFormat(max_length=8))
    calls.clear()
    items: list[Item] = [
        ("ab", "cd", True),
        ("ab", "cd", False),
        ("ab", "c?", True),
        ("?", "cd", True),
        (" ", "cd", True),
        ("ba", "abcdabcd", True),
        ([{"role": "user", "content": "ab"}], "cd", True),
        ("ba", "dc", True),
    ]
    together = encoder.encode_items(items)
    assert calls == [4, 3], "responses and prompts, each distinct one once"
    for item, found in zip(items, together, strict=True):
        if isinstance(found, EncodingError):
            with pytest.raises(EncodingError) as error:
                encoder.encode_item(item)
            assert (error.value.reason, error.value.detail) == (found.reason, found.detail)
        else:
            assert encoder.encode_item(item) == found
    reasons = [found.reason if isinstance(found, EncodingError) else "" for found in together]
    assert reasons == [
        *("", "", "unknown token", "unknown token", "empty prompt"),
        *("over-long", "no chat template", ""),
    ]

"""Tiny reward models on disk, as a training job would leave them, and what transformers says of them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from cluster.scratch import build_tokenizer
from rewards.models.card import RewardCard, member_folder, write_card
from rewards.models.text import TextFormat
from rewards.preferences.records import prompt_key

ALPHABET = "abcdefghij=:"


def save_reward_model(
    folder: Path,
    *,
    seed: int = 0,
    members: int = 1,
    prompts: Sequence[str] = ("a",),
    mean: float = 0.0,
    std: float = 1.0,
    max_length: int = 32,
    alphabet: str = ALPHABET,
) -> Path:
    """Random Llamas under a scalar head, with a card that says that they learned from these prompts."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = build_tokenizer(alphabet, max_length)
    for member in range(members):
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=max_length,
            initializer_range=0.5,
            num_labels=1,
            pad_token_id=0,
        )
        torch.manual_seed(seed + 100 * member)
        place = member_folder(folder, member, members)
        LlamaForSequenceClassification(config).save_pretrained(place)
        tokenizer.save_pretrained(place)
    card = RewardCard(
        kind="transformer",
        loss="bradley-terry",
        rule="mean",
        members=members,
        mean=[mean] * members,
        std=[std] * members,
        length_slope=[0.0] * members,
        text=TextFormat(max_length=max_length),
        labels=len(prompts),
    )
    write_card(folder, card, [prompt_key(prompt) for prompt in prompts])
    return folder


def plain_score(folder: Path, prompt: str, completion: str, finished: bool) -> float:
    """What transformers' own classifier gives for the begin token, the text, and the end token."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = tokenizer(prompt)["input_ids"] + tokenizer(completion, add_special_tokens=False)["input_ids"]
    ids += [tokenizer.eos_token_id] if finished else []
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])

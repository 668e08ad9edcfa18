"""Open a trained reward model and score responses with it.

    model = load_reward_model("runs/rm/reward_model")
    model.score([("2 + 2 = ", "4", True), ("2 + 2 = ", "5", True)]).value

Only safetensors are read and no code that comes with a model is run. The same item always gets the same
score, up to rounding, whatever stands beside it in a batch.

Legend: N items, K members of the ensemble, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rewards.models.card import RewardCard, member_folder, read_card
from rewards.models.embedding import BACKBONE, EmbeddingScorer
from rewards.models.text import Encoded, EncodingError, Item, RewardEncoder
from rewards.models.transformer import TransformerScorer, load_tokenizer
from rewards.preferences.ensembles import combine, disagreement, standardise

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RewardScores:
    """value (N,): the reward; members (K, N): each member's, standardised; std (N,): √ of their variance.

    raw (K, N) is what the saved weights give by themselves: with one member, the logits of
    AutoModelForSequenceClassification. σ of a raw difference is the modelled probability of a preference.
    `std` is 0 where there is one member only, which then says nothing of its uncertainty.
    """

    value: Array
    members: Array
    std: Array
    raw: Array


class Scorer(Protocol):
    """The weights of a reward model."""

    def raw(self, sequences: Sequence[Sequence[int]]) -> Array:
        """(K, N) raw scores of token sequences."""

    def features(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """(N, D): what the first member's head is applied to."""


class RewardModel:
    """A reward model in memory."""

    def __init__(self, path: Path, card: RewardCard, tokenizer: Any, scorer: Scorer) -> None:
        self.path = path
        self.card = card
        self._encoder = RewardEncoder(tokenizer, card.text)
        self._scorer = scorer

    @property
    def encoder(self) -> RewardEncoder:
        """Makes token ids of prompts and responses, as training did."""
        return self._encoder

    def encode(self, items: Sequence[Item]) -> list[Encoded]:
        """Tokens of each item; EncodingError (a ValueError) for one that the model cannot read whole."""
        encoded = self._encoder.encode_items(items)
        for one in encoded:
            if isinstance(one, EncodingError):
                raise one
        return [one for one in encoded if isinstance(one, Encoded)]

    def score(self, items: Sequence[Item]) -> RewardScores:
        """The reward of each (prompt, response, finished); a prompt is a text or a list of chat messages."""
        encoded = self.encode(items)
        raw = self.raw([one.ids for one in encoded])
        return scores_from_raw(raw, np.array([one.length for one in encoded], dtype=np.float64), self.card)

    def raw(self, sequences: Sequence[Sequence[int]]) -> Array:
        """(K, N) raw scores of token sequences, as `encode` makes them."""
        return self._scorer.raw(sequences)

    def features(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """(N, D) features of the last layer, before the head (of the first member, in an ensemble).

        A transformer's raw score is linear in them without a constant: raw = features · w.
        """
        return self._scorer.features([one.ids for one in self.encode(items)])


def scores_from_raw(raw: Array, lengths: Array, card: RewardCard) -> RewardScores:
    """Standardise and combine (K, N) raw scores of responses with (N,) lengths, as the card says."""
    unbiased = without_length(raw, lengths, card)
    mean, std = (torch.tensor(numbers, dtype=torch.float64) for numbers in (card.mean, card.std))
    members = standardise(torch.from_numpy(unbiased), mean, std)
    value = combine(members, card.rule, card.coefficient)
    return RewardScores(
        value.numpy(), members.numpy(), disagreement(members).numpy(), np.asarray(raw, dtype=np.float64)
    )


def without_length(raw: Array, lengths: Array, card: RewardCard) -> Array:
    """(K, N) raw scores less what the card says that length explains: raw − slope_k·length."""
    slope = np.asarray(card.length_slope, dtype=np.float64)[:, None]
    return np.asarray(raw, dtype=np.float64) - slope * np.asarray(lengths, dtype=np.float64)[None, :]


def load_reward_model(
    path: str | Path, *, device: str = "cpu", precision: str = "float32", micro_batch_tokens: int = 8192
) -> RewardModel:
    """Open the folder that a run with `objective = "reward_model"` left as `reward_model/`.

    `device` is a torch device, `precision` float32 or bfloat16, `micro_batch_tokens` bounds the tokens of one
    forward pass, padding included. ValueError where the folder is no reward model, its weights are pickled,
    or they are not those that its card was written for.
    """
    folder = Path(path).expanduser()
    card = read_card(folder)
    scorer: Scorer
    if card.kind == "embedding":
        tokenizer = load_tokenizer(folder / BACKBONE)
        scorer = EmbeddingScorer.load(folder, card, device, precision, micro_batch_tokens)
    else:
        tokenizer = load_tokenizer(member_folder(folder, 0, card.members))
        scorer = TransformerScorer.load(folder, card, device, precision, micro_batch_tokens)
    return RewardModel(folder, card, tokenizer, scorer)

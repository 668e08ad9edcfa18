"""How much more likely fine-tuning has made a response: d* = log π_tuned(y|x) − log π_initial(y|x).

This is the closed form of the reward that is learned by telling samples of the fine-tuned model from samples
of the initial one: the best discriminator's logit is the log-ratio of the two densities (Sun & van der
Schaar, "Inverse-RLignment", arXiv 2405.15624). It needs no training, so it is the baseline of a reward model
that was trained on such pairs (docs/imitation_iterated.md).

    [[reward]] ─▶ LogRatioReward: folders and tokenizers, checked everywhere ─▶ load: in the scoring actor

Both models read prompt and response as a policy does, with the end token where the response is finished: the
one that the policy sampled, where it is known.
The sum over tokens is the log-ratio of the sequence; with `per_token` it is divided by their number.

Legend: N sequences, L longest of a batch, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rewards.base import RewardError, RewardRequest, Score
from rewards.model_reward import ModelPlace
from rewards.models.card import TextFormat
from rewards.models.text import EncodingError, RewardEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = NDArray[np.float64]
_MOST_LOGITS = 1 << 28  # elements that exist at one time
_READS_ANY = 1 << 30  # where a configuration states no limit


class LogRatioReward:
    """Two language models as a `rewards.base.Reward`; the components are the two log-probabilities."""

    def __init__(self, label: str, tuned: Path, initial: Path, *, per_token: bool = False) -> None:
        """Check both folders; ValueError names the field where one is no model, or their tokens differ."""
        self.label = label
        self._folders = {"path": tuned, "initial": initial}
        self._per_token = per_token
        tokenizers = {field: self._tokenizer(field) for field in self._folders}
        first, second = tokenizers.values()
        if first.get_vocab() != second.get_vocab():
            raise ValueError(
                f"reward.initial = {str(initial)!r} of {label!r} has another vocabulary than reward.path = "
                f"{str(tuned)!r}: give the model that the fine-tuning started from"
            )
        self._size = len(first)
        longest = min(self._longest(field) for field in self._folders)
        self._encoder = RewardEncoder(first, TextFormat(max_length=longest))
        self._models: dict[str, PreTrainedModel] = {}
        self._place: ModelPlace | None = None

    def load(self, place: ModelPlace) -> None:
        """Load the weights. Until then `score` may not be called."""
        from rewards.models.transformer import load_language_model

        for field, folder in self._folders.items():
            try:
                self._models[field] = load_language_model(
                    folder, precision=place.precision, device=place.device
                )
            except ValueError as error:
                raise self._bad(field, error) from None
        self._place = place

    def close(self) -> None:
        """Drop the weights; safe to call twice."""
        self._models = {}

    def score(self, requests: Sequence[RewardRequest]) -> list[Score | RewardError]:
        """One answer for each request, all of them in one batch."""
        assert self._place is not None, "load() comes first"
        answers: dict[int, Score | RewardError] = {}
        encoded: dict[int, tuple[list[int], int]] = {}
        for place, request in enumerate(requests):
            try:
                encoded[place] = self._encode(request)
            except EncodingError as error:
                answers[place] = RewardError(self.label, str(error))
        items = list(encoded.values())
        tuned, initial = (
            sequence_logprobs(model, items, micro_batch_tokens=self._place.micro_batch_tokens)
            for model in self._models.values()
        )
        for place, (_, count), a, b in zip(encoded, items, tuned, initial, strict=True):
            answers[place] = self._scored(float(a), float(b), count)
        return [answers[place] for place in range(len(requests))]

    def _scored(self, tuned: float, initial: float, count: int) -> Score | RewardError:
        if not np.isfinite([tuned, initial]).all():
            return RewardError(self.label, f"the models' log-probabilities are {tuned:g} and {initial:g}")
        ratio = (tuned - initial) / (count if self._per_token else 1)
        return Score(ratio, {"tuned": tuned, "initial": initial})

    def _encode(self, request: RewardRequest) -> tuple[list[int], int]:
        """Token ids of prompt and response, and how many of them are the response's, the end token too."""
        item = self._encoder.encode_item((request.prompt, request.completion, request.finished))
        count = item.length + int(request.finished)
        if not count:
            raise EncodingError("empty response", "it has no token that could be more or less likely")
        if count == len(item.ids):
            raise EncodingError("empty prompt", "no token comes before the response")
        own = list(request.token_ids)
        if request.finished and own[:-1] == item.ids[:-1] and own[-1] < self._size:
            return own, count  # a policy may end its turns with another token than the tokenizer's
        return item.ids, count

    def _tokenizer(self, field: str) -> Any:
        from rewards.models.transformer import load_tokenizer, refuse_pickles

        try:
            refuse_pickles(self._folders[field])
            return load_tokenizer(self._folders[field])
        except ValueError as error:
            raise self._bad(field, error) from None

    def _longest(self, field: str) -> int:
        """Tokens that a model reads."""
        from transformers import AutoConfig

        from rewards.models.foreign import opening

        folder = str(self._folders[field])
        with opening(f"reward.{field} of {self.label!r}: the configuration of {folder!r} cannot be read"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        return int(limit or _READS_ANY)

    def _bad(self, field: str, error: Exception) -> ValueError:
        return ValueError(f"reward.{field} of {self.label!r}: {error}")


def sequence_logprobs(
    model: "PreTrainedModel", items: Sequence[tuple[Sequence[int], int]], *, micro_batch_tokens: int
) -> Array:
    """(N,) Σ log π of the last `count` tokens of each (ids, count), at temperature 1.

    Sequences of like length go together, padded on the right, which a causal model does not see.
    """
    import torch

    values = np.zeros(len(items))
    width = int(model.get_input_embeddings().weight.shape[0])
    limit = max(1, min(micro_batch_tokens, _MOST_LOGITS // width))
    with torch.no_grad():
        for places in _batches([len(ids) for ids, _ in items], limit):
            longest = max(len(items[place][0]) for place in places)
            rows = torch.zeros((len(places), longest), dtype=torch.long)
            wanted = torch.zeros((len(places), longest), dtype=torch.bool)
            for row, place in enumerate(places):
                ids, count = items[place]
                rows[row, : len(ids)] = torch.tensor(list(ids))
                wanted[row, len(ids) - count : len(ids)] = True
            rows = rows.to(model.device)
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
            chosen = torch.log_softmax(logits, -1).gather(-1, rows[:, 1:, None])[..., 0].double().cpu()
            values[places] = torch.where(wanted[:, 1:], chosen, 0.0).sum(1).numpy()
    return values


def _batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Places of sequences, shortest first, in batches of at most `limit` tokens, padding included."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[place] > limit:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch

"""Scores of prefix∘token for k tokens after each of many growing prefixes, no prefix computed twice.

    prefix ──prefill──► keys, values ─┬─► k candidates in one forward pass ──► k scores a prefix
                            ▲         │
                            └── accept: the chosen candidate's keys and values become the prefix's

A candidate attends to its own prefix and to itself, never to the other candidates, so a step costs k tokens
of the model for each prefix, whatever their lengths. What this relies on (masks of four dimensions, keys and
values that can be laid out anywhere) is checked on the loaded model, which is refused if it does not hold.

Legend: S prefixes, L longest of them, k candidates, H hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from actors.language_model import ROUNDING

_GROW = 64  # columns and rows that buffers grow by, at least
_CHECK = ((5, 3, 8, 6, 2, 7), (4, 1, 9))  # two prefixes and the candidates after them, modulo the vocabulary
_CHECK_CANDIDATES = (3, 1, 6)


class UnsupportedModelError(ValueError):
    """A model whose prefixes cannot be continued in this way."""


class SlotCache(Cache):
    """Keys and values of S prefixes in columns [0, L), and of the candidates after them in [L, L + k)."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []  # a layer: (rows, heads, columns, size)
        self.values: list[Tensor] = []
        self.rows = 0
        self.start = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """The model's layers call this: keep the candidates' own, and give what they may attend to."""
        end = self.start + key_states.shape[2]
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[: self.rows, :, self.start : end] = key_states
        values[: self.rows, :, self.start : end] = value_states
        return keys[: self.rows, :, :end], values[: self.rows, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers are alike
        """Columns before the candidates."""
        return self.start

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        """Columns that candidates look at, and where these begin."""
        return self.start + query_length, 0

    def reserve(self, rows: int, columns: int, like: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Room for so many prefixes and columns; `like` has a layer's keys and values, for their shapes."""
        if not self.keys:
            self.keys = [_empty(keys) for keys, _ in like]
            self.values = [_empty(values) for _, values in like]
        have_rows, _, have_columns, _ = self.keys[0].shape
        if rows <= have_rows and columns <= have_columns:
            return
        rows = max(have_rows, rows + _GROW if rows > have_rows else 0)
        columns = max(have_columns, columns + _GROW if columns > have_columns else 0)
        self.keys = [_grown(one, rows, columns) for one in self.keys]
        self.values = [_grown(one, rows, columns) for one in self.values]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of a row to another."""
        for one in (*self.keys, *self.values):
            one[target, :, :length] = one[source, :, :length]

    def accept(self, lengths: Tensor, choices: Tensor) -> None:
        """Each row's chosen candidate becomes its next column; lengths, choices: (S,)."""
        rows = torch.arange(self.rows, device=lengths.device)
        for one in (*self.keys, *self.values):
            one[rows, :, lengths] = one[rows, :, self.start + choices]


class PrefixModel:
    """A causal transformer under a scalar head. `backbone` gives last hidden states; head: (H,)."""

    def __init__(self, backbone: Any, head: Tensor, bias: float = 0.0) -> None:
        self._backbone = backbone
        self._head = head.detach().float()
        self._bias = bias
        self._device = next(backbone.parameters()).device
        self._head = self._head.to(self._device)
        self._cache = SlotCache()
        self._lengths: list[int] = []

    def __len__(self) -> int:
        """Prefixes that are held."""
        return len(self._lengths)

    @torch.inference_mode()
    def add(self, prefixes: Sequence[Sequence[int]]) -> Tensor:
        """Hold these prefixes in the next places; (n,) their own scores. Equal ones are computed once."""
        distinct = {tuple(ids): number for number, ids in enumerate(dict.fromkeys(map(tuple, prefixes)))}
        which = torch.tensor([distinct[tuple(ids)] for ids in prefixes], device=self._device)
        ids, mask = _padded(list(distinct), self._device)
        output = self._backbone(input_ids=ids, attention_mask=mask, use_cache=True)
        layers = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        first, last = len(self), len(self) + len(prefixes)
        width = ids.shape[1]
        self._cache.reserve(last, width, layers)
        for number, (keys, values) in enumerate(layers):
            self._cache.keys[number][first:last, :, :width] = keys[which]
            self._cache.values[number][first:last, :, :width] = values[which]
        self._lengths += [len(one) for one in prefixes]
        self._cache.rows = last
        ends = mask.sum(dim=1) - 1
        hidden = output.last_hidden_state[torch.arange(len(distinct), device=self._device), ends]
        return self._read(hidden)[which].cpu()

    @torch.inference_mode()
    def remove(self, place: int) -> int:
        """Let a prefix go; the last one takes its place. Gives the place that the last one had."""
        last = len(self) - 1
        if place != last:
            self._cache.move(last, place, self._lengths[last])
            self._lengths[place] = self._lengths[last]
        self._lengths.pop()
        self._cache.rows = last
        return last

    @torch.inference_mode()
    def score(self, candidates: Tensor) -> Tensor:
        """(S, k) scores of every prefix with each of its (S, k) candidates after it."""
        candidates = candidates.to(self._device)
        S, k = candidates.shape
        assert len(self) == S, f"{S} rows of candidates for {len(self)} prefixes"
        lengths = torch.tensor(self._lengths, device=self._device)
        longest = max(self._lengths)
        self._cache.reserve(S, longest + k, [])
        self._cache.start = longest
        past = torch.arange(longest, device=self._device)[None] < lengths[:, None]  # (S, L)
        own = torch.eye(k, dtype=torch.bool, device=self._device)
        mask = torch.cat([past[:, None].expand(S, k, longest), own[None].expand(S, k, k)], dim=2)
        output = self._backbone(
            input_ids=candidates,
            attention_mask=mask[:, None],
            position_ids=lengths[:, None].expand(S, k),
            past_key_values=self._cache,
            use_cache=True,
        )
        return self._read(output.last_hidden_state).cpu()

    @torch.inference_mode()
    def accept(self, choices: Sequence[int | None]) -> None:
        """After `score`: each prefix goes on with the candidate of that number; None: it stays as it is."""
        assert len(choices) == len(self)
        lengths = torch.tensor(self._lengths, device=self._device)
        self._cache.accept(lengths, torch.tensor([choice or 0 for choice in choices], device=self._device))
        self._lengths = [
            length + (choice is not None) for length, choice in zip(self._lengths, choices, strict=True)
        ]

    def _read(self, hidden: Tensor) -> Tensor:
        """(…, H) → (…) float32, multiplied out in float32 as a reward model's scorer does."""
        return hidden.float() @ self._head + self._bias

    @torch.inference_mode()
    def check(self, precision: str) -> None:
        """UnsupportedModelError unless scores agree with those of whole sequences, also after a step."""
        assert not len(self), "checked before the first prefix"
        text = self._backbone.config.get_text_config()
        vocabulary = int(text.vocab_size)
        prefixes = [[token % vocabulary for token in ids] for ids in _CHECK]
        candidates = [token % vocabulary for token in _CHECK_CANDIDATES]
        table = torch.tensor([candidates] * len(prefixes))
        try:
            self.add(prefixes)
            first = self.score(table)
            self.accept([1, None])
            second = self.score(table)
        except (TypeError, AttributeError, ValueError, RuntimeError, IndexError, KeyError) as error:
            raise UnsupportedModelError(
                f"model type {text.model_type!r} cannot continue prefixes token by token: {error}"
            ) from error
        self._lengths, self._cache = [], SlotCache()
        extended = [[*prefixes[0], candidates[1]], prefixes[1]]
        expected = [self._whole(prefixes, candidates), self._whole(extended, candidates)]
        worst = max(float((a - b).abs().max()) for a, b in zip((first, second), expected, strict=True))
        scale = max(1.0, float(torch.stack(expected).abs().max()))
        if not worst <= ROUNDING[precision] * scale:
            raise UnsupportedModelError(
                f"model type {text.model_type!r} cannot continue prefixes token by token: scores differ by "
                f"{worst:.2g} from those of whole sequences"
            )

    def _whole(self, prefixes: Sequence[Sequence[int]], candidates: Sequence[int]) -> Tensor:
        """The same scores without any cache, one sequence at a time."""
        rows = []
        for prefix in prefixes:
            for token in candidates:
                ids = torch.tensor([[*prefix, token]], device=self._device)
                output = self._backbone(input_ids=ids, use_cache=False)
                rows.append(self._read(output.last_hidden_state[0, -1]))
        return torch.stack(rows).reshape(len(prefixes), len(candidates)).cpu()


def _padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, L) ids and mask, padded on the right, where padding reaches nothing in a causal model."""
    width = max(map(len, sequences))
    ids = torch.zeros((len(sequences), width), dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(list(sequence), dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def _empty(like: Tensor) -> Tensor:
    return like.new_zeros((0, like.shape[1], 0, like.shape[3]))


def _grown(one: Tensor, rows: int, columns: int) -> Tensor:
    """A larger copy; what is new is 0, never what happened to be in memory: a mask does not silence NaN."""
    bigger = one.new_zeros((rows, one.shape[1], columns, one.shape[3]))
    bigger[: one.shape[0], :, : one.shape[2]] = one
    return bigger

"""Packing: sequences of different lengths share rows, so that almost nothing that is computed is padding.

A row holds several sequences one after another. `position_ids` start at 0 with each of them, which is how
transformers, given no attention mask, knows where a sequence begins and keeps attention inside it. What is
left of a row is one more segment, of padding, that nothing attends to and nothing reads.

Everything here is a pure, deterministic function.

Legend: R rows, L tokens of a row, N predicted response tokens of a micro-batch.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of its response."""

PADDING_GOAL = 0.04
"""A row length that wastes no more than this share of the tokens is taken at once."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of packed sequences, and where in them the predicted response tokens are.

    input_ids, position_ids: (R, L). The rest are (N,): `positions` is the index into the R·L flattened
    hidden states of a token's *predecessor*, whose state predicts it; `targets` the token itself;
    `sequence` the index of its sequence in the list that was packed and `offset` its place in that
    sequence's response, so that results find their way back. `real_tokens` counts what is not padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    positions: Tensor
    targets: Tensor
    sequence: Tensor
    offset: Tensor
    real_tokens: int

    @property
    def total_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same micro-batch on another device."""
        return MicroBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.positions.to(device),
            self.targets.to(device),
            self.sequence.to(device),
            self.offset.to(device),
            self.real_tokens,
        )


def pack(pairs: Sequence[Pair], *, micro_batch_tokens: int) -> list[MicroBatch]:
    """Pack (prompt, response) pairs of token ids into micro-batches of at most `micro_batch_tokens` tokens.

    A pair that is longer than that gets a micro-batch to itself. Rows are as short as a padding of
    `PADDING_GOAL` allows, because attention costs R·L².
    """
    for index, (prompt, _) in enumerate(pairs):
        if not prompt:
            raise ValueError(f"sequence {index} has no prompt token: its first token has no predecessor")
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    batches: list[MicroBatch] = []
    for rows in plan_micro_batches(lengths, micro_batch_tokens=micro_batch_tokens):
        batches.append(_assemble(pairs, rows))
    return batches


def plan_micro_batches(lengths: Sequence[int], *, micro_batch_tokens: int) -> list[list[list[int]]]:
    """Which sequences share a row, and which rows a micro-batch: `plan[micro_batch][row]` lists indices."""
    if micro_batch_tokens < 1:
        raise ValueError(f"micro_batch_tokens must be at least 1, got {micro_batch_tokens}")
    oversized = [index for index, length in enumerate(lengths) if length > micro_batch_tokens]
    ordinary = [index for index, length in enumerate(lengths) if length <= micro_batch_tokens]
    plan = [[[index]] for index in oversized]
    if not ordinary:
        return plan
    sizes = [lengths[index] for index in ordinary]
    row_length = choose_row_length(sizes, longest_row=micro_batch_tokens)
    rows = [[ordinary[i] for i in row] for row in _fill_rows(sizes, row_length)]
    # Rows of like fill go together: a micro-batch is only as wide as its fullest row.
    rows.sort(key=lambda row: (-sum(lengths[i] for i in row), row))
    rows_each = max(1, micro_batch_tokens // row_length)
    plan.extend(rows[start : start + rows_each] for start in range(0, len(rows), rows_each))
    return plan


def choose_row_length(lengths: Sequence[int], *, longest_row: int) -> int:
    """The shortest of some candidate row lengths that meets `PADDING_GOAL`; else the least wasteful.

    Candidates grow from the longest sequence by an eighth at a time, up to `longest_row` or the total.
    """
    longest, total = max(lengths), sum(lengths)
    limit = max(longest, min(longest_row, total))
    candidate, best, best_padding = longest, longest, float("inf")
    while True:
        padding = _padding(lengths, candidate)
        if padding <= PADDING_GOAL:
            return candidate
        if padding < best_padding:
            best, best_padding = candidate, padding
        if candidate == limit:
            return best
        candidate = min(limit, candidate + max(1, candidate // 8))


def scatter(micro_batches: Sequence[MicroBatch], values: Sequence[Tensor], count: int) -> list[Tensor]:
    """Give each of `count` sequences its values back, in the order of its response tokens.

    values[m] is (N,) of micro-batch m, in the order of its `targets`. Sequences without a response get an
    empty tensor.
    """
    assert count > 0, "nothing was packed"
    flat = torch.cat([value.reshape(-1) for value in values])
    sequence = torch.cat([batch.sequence for batch in micro_batches]).to(flat.device)
    offset = torch.cat([batch.offset for batch in micro_batches]).to(flat.device)
    assert flat.numel() == sequence.numel(), (flat.shape, sequence.shape)
    # One sort by (sequence, offset) brings all tokens into the caller's order.
    stride = int(offset.max()) + 1 if offset.numel() else 1
    ordered = flat[torch.argsort(sequence * stride + offset)]
    sizes = torch.bincount(sequence, minlength=count).tolist()
    return list(torch.split(ordered, sizes))


def padding_fraction(micro_batches: Iterable[MicroBatch]) -> float:
    """Share of the computed tokens that are padding."""
    real = total = 0
    for batch in micro_batches:
        real += batch.real_tokens
        total += batch.total_tokens
    return 1.0 - real / total if total else 0.0


def _fill_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best-fit decreasing: each sequence, longest first, into the fullest row that still has room."""
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (room left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(space, (lengths[index], -1))
        if place < len(space):
            room, row = space.pop(place)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(space, (room - lengths[index], row))
    return rows


def _padding(lengths: Sequence[int], row_length: int) -> float:
    """Share of padding when `lengths` fill rows of `row_length`."""
    computed = len(_fill_rows(lengths, row_length)) * row_length
    return 1.0 - sum(lengths) / computed


def _assemble(pairs: Sequence[Pair], rows: list[list[int]]) -> MicroBatch:
    """Write the planned rows out as tensors."""
    width = max(sum(len(pairs[i][0]) + len(pairs[i][1]) for i in row) for row in rows)
    ids: list[int] = []
    places: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    sequence: list[int] = []
    offset: list[int] = []
    real = 0
    for row_number, row in enumerate(rows):
        for index in row:
            prompt, response = pairs[index]
            positions.extend(range(len(ids) + len(prompt) - 1, len(ids) + len(prompt) - 1 + len(response)))
            targets.extend(response)
            sequence.extend([index] * len(response))
            offset.extend(range(len(response)))
            ids.extend(prompt)
            ids.extend(response)
            places.extend(range(len(prompt) + len(response)))
            real += len(prompt) + len(response)
        missing = (row_number + 1) * width - len(ids)
        ids.extend([0] * missing)
        places.extend(range(missing))
    shape = (len(rows), width)
    return MicroBatch(
        torch.tensor(ids).reshape(shape),
        torch.tensor(places).reshape(shape),
        torch.tensor(positions, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.tensor(sequence, dtype=torch.long),
        torch.tensor(offset, dtype=torch.long),
        real,
    )

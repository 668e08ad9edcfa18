"""Packing: every response token once, in order, with little padding and within the limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.packing import choose_row_length, pack, padding_fraction, plan_micro_batches, scatter

PAIRS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 99), min_size=1, max_size=12),
        st.lists(st.integers(1, 99), min_size=0, max_size=20),
    ),
    min_size=1,
    max_size=25,
)


def test_two_sequences_share_a_row_by_hand() -> None:
    # Rows of 4 would waste a quarter of the second one, a row of 6 wastes nothing. The longest goes first:
    # prompt 21, response 22 23 24 | prompt 11, response 12. Predecessors of 22, 23, 24 and 12 are the
    # tokens at 0, 1, 2 and 4.
    (batch,) = pack([([11], [12]), ([21], [22, 23, 24])], micro_batch_tokens=8)
    assert batch.input_ids.tolist() == [[21, 22, 23, 24, 11, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.positions.tolist() == [0, 1, 2, 4]
    assert batch.targets.tolist() == [22, 23, 24, 12]
    assert batch.sequence.tolist() == [1, 1, 1, 0]
    assert batch.offset.tolist() == [0, 1, 2, 0]
    assert (batch.real_tokens, batch.total_tokens) == (6, 6)


def test_padding_is_a_segment_of_its_own() -> None:
    # Lengths 4, 4, 4, 3 and micro-batches of 8: rows of 4 waste 1 of 16 tokens, and no longer row wastes
    # less. The last row ends with one padding token, whose position starts again at 0.
    pairs = [([1], [2, 3, 4])] * 3 + [([5, 6], [7])]
    first, second = pack(pairs, micro_batch_tokens=8)
    assert first.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert second.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    assert second.input_ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert padding_fraction([first, second]) == 1 / 16


def test_a_sequence_longer_than_a_micro_batch_stands_alone() -> None:
    batches = pack([([1], [2]), ([1] * 5, [2] * 5), ([3], [4])], micro_batch_tokens=4)
    assert [batch.input_ids.shape for batch in batches] == [(1, 10), (2, 2)]


@settings(max_examples=150, deadline=None)
@given(pairs=PAIRS, limit=st.integers(1, 120))
def test_every_response_token_once_and_in_order(pairs: list[tuple[list[int], list[int]]], limit: int) -> None:
    batches = pack(pairs, micro_batch_tokens=limit)
    back = scatter(batches, [batch.targets for batch in batches], len(pairs))
    assert [tokens.tolist() for tokens in back] == [response for _, response in pairs]
    for batch in batches:
        flat, places = batch.input_ids.reshape(-1), batch.position_ids.reshape(-1)
        # The target is the token after its predecessor, in the same sequence and row, and the predecessor's
        # own history is that sequence's prompt and earlier response.
        assert torch.equal(flat[batch.positions + 1], batch.targets)
        assert torch.equal(places[batch.positions + 1], places[batch.positions] + 1)
        width = batch.input_ids.shape[1]
        for where, sequence, offset in zip(
            batch.positions.tolist(), batch.sequence.tolist(), batch.offset.tolist(), strict=True
        ):
            prompt, response = pairs[sequence]
            history = [*prompt, *response[:offset]]
            assert flat[where - len(history) + 1 : where + 1].tolist() == history
            assert places[where - len(history) + 1] == 0
            assert where // width == (where - len(history) + 1) // width
    assert sum(batch.real_tokens for batch in batches) == sum(len(p) + len(r) for p, r in pairs)


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60), limit=st.integers(1, 200))
def test_limits_hold_and_nothing_is_lost(lengths: list[int], limit: int) -> None:
    plan = plan_micro_batches(lengths, micro_batch_tokens=limit)
    assert sorted(i for rows in plan for row in rows for i in row) == list(range(len(lengths)))
    for rows in plan:
        width = max(sum(lengths[i] for i in row) for row in rows)
        alone = len(rows) == 1 and len(rows[0]) == 1
        assert len(rows) * width <= limit or alone


def test_the_same_input_gives_the_same_plan() -> None:
    lengths = [(13 * i) % 29 + 3 for i in range(100)]
    assert plan_micro_batches(lengths, micro_batch_tokens=256) == plan_micro_batches(
        lengths, micro_batch_tokens=256
    )


@pytest.mark.parametrize("shortest", [2, 10, 60])
def test_padding_stays_under_five_percent(shortest: int) -> None:
    generator = torch.Generator().manual_seed(shortest)
    lengths = torch.randint(shortest, 2 * shortest + 5, (256,), generator=generator).tolist()
    pairs = [([1] * (length // 2 + 1), [2] * (length - length // 2)) for length in lengths]
    batches = pack(pairs, micro_batch_tokens=4096)
    assert padding_fraction(batches) < 0.05


def test_rows_are_no_longer_than_they_must_be() -> None:
    # Sixty-four equal sequences fill rows of their own length exactly: longer rows would cost attention.
    assert choose_row_length([20] * 64, longest_row=4096) == 20


def test_a_prompt_is_needed() -> None:
    with pytest.raises(ValueError, match="sequence 1 has no prompt token"):
        pack([([1], [2]), ([], [3])], micro_batch_tokens=16)

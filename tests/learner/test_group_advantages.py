"""Advantages from groups and the penalty for length, by hand."""

import math
import statistics
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.group_advantages import (
    GroupEstimator,
    group_advantages,
    group_mean,
    group_std,
    leave_one_out,
    overlong_penalties,
    uniform_groups,
)

RETURNS = torch.tensor([1.0, 0.0, 2.0, 5.0, 1.0])
GROUPS = torch.tensor([0, 1, 0, 1, 1])


def test_by_hand_in_groups_that_are_mixed_up_and_of_different_size() -> None:
    # Group 0: returns 1 and 2, mean 1.5, s² = (0.25 + 0.25)/1, s = √0.5.
    # Group 1: returns 0, 5 and 1, mean 2, s² = (4 + 9 + 1)/2 = 7.
    centred = [-0.5, -2.0, 0.5, 3.0, -1.0]
    assert group_mean(RETURNS, GROUPS).tolist() == pytest.approx(centred)
    first, second = math.sqrt(0.5) + 0.1, math.sqrt(7) + 0.1
    scaled = [-0.5 / first, -2 / second, 0.5 / first, 3 / second, -1 / second]
    assert group_std(RETURNS, GROUPS, epsilon=0.1).tolist() == pytest.approx(scaled)
    # The others' means: 2; (5 + 1)/2 = 3; 1; (0 + 1)/2 = 0.5; (0 + 5)/2 = 2.5.
    assert leave_one_out(RETURNS, GROUPS).tolist() == pytest.approx([-1.0, -3.0, 1.0, 4.5, -1.5])


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(
        st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=2, max_size=6), min_size=1, max_size=5
    ),
    shuffle=st.randoms(use_true_random=False),
)
def test_any_order_of_the_samples_gives_each_its_groups_statistics(
    groups: list[list[float]], shuffle: Random
) -> None:
    order = [(number, value) for number, group in enumerate(groups) for value in group]
    shuffle.shuffle(order)
    returns = torch.tensor([value for _, value in order], dtype=torch.float64)
    numbers = torch.tensor([number for number, _ in order])
    found = {
        kind: group_advantages(kind, returns, numbers, epsilon=1e-4).tolist()
        for kind in ("group_mean", "group_std", "leave_one_out")
    }
    for place, (number, value) in enumerate(order):
        group = groups[number]
        mean, size = statistics.fmean(group), len(group)
        assert found["group_mean"][place] == pytest.approx(value - mean, abs=1e-9)
        expected = (value - mean) / (statistics.stdev(group) + 1e-4)
        assert found["group_std"][place] == pytest.approx(expected, abs=1e-6)
        others = (sum(group) - value) / (size - 1)
        assert found["leave_one_out"][place] == pytest.approx(value - others, abs=1e-9)


@pytest.mark.parametrize("kind", ["group_mean", "group_std", "leave_one_out"])
def test_a_group_of_equal_returns_is_zero_to_the_last_bit(kind: GroupEstimator) -> None:
    """The mean of seven times 0.1 is not 0.1 in binary, and 1e-17 over a tiny ε would be an advantage."""
    returns = torch.tensor([0.1] * 7 + [0.0, 1.0], dtype=torch.float64)
    groups = torch.tensor([0] * 7 + [1] * 2)
    assert sum([0.1] * 7) / 7 != 0.1
    found = group_advantages(kind, returns, groups, epsilon=1e-20)
    assert found[:7].tolist() == [0.0] * 7
    assert (found[7:] != 0).all()
    assert uniform_groups(returns, groups).tolist() == [True, False]


def test_leaving_one_out_of_one_is_an_error() -> None:
    with pytest.raises(AssertionError, match="group of one"):
        leave_one_out(torch.ones(3), torch.tensor([0, 0, 1]))


def test_the_penalty_for_length_by_hand() -> None:
    # L = 20, C = 5: nothing up to 15 tokens, then a fifth a token, −1 at 20.
    lengths = torch.tensor([1, 15, 16, 18, 20])
    found = overlong_penalties(lengths, limit=20, fraction=0.25)
    assert found.tolist() == pytest.approx([0.0, 0.0, -0.2, -0.6, -1.0])
    # A cushion is at least one token.
    assert overlong_penalties(lengths, limit=20, fraction=0.001).tolist() == [0.0, 0.0, 0.0, 0.0, -1.0]

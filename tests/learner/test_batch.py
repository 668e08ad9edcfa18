"""From groups to a rank's share: nothing lost, nothing twice, the same plan on every rank."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.packing import pack
from actors.records import Completion, Group, Prompt, Trajectory
from learner.batch import (
    assign_owners,
    flatten,
    make_share,
    plan_minibatches,
    sample_metrics,
    scatter_padded,
)


def group(reward: float = 1.0, sampler: float = -1.0, reference: float = -2.0) -> Group:
    first = Completion((5, 6), (sampler, -1.5), (3, 4), "", "stop")
    second = Completion((7,), (-0.5,), (4,), "", "length")
    return Group(
        9,
        Prompt("p", (1, 2), ""),
        (
            Trajectory(first, reward, {}, (reference, -2.5)),
            Trajectory(second, 3.0, {}, (-0.1,)),
        ),
        "actor",
        0.0,
        0.0,
    )


def test_facts_of_a_step_by_hand() -> None:
    # At version 5 the three tokens' lags are 2, 1 and 1; rewards 1 and 3; one of two responses finished.
    metrics = sample_metrics(flatten([group()], 5))
    assert metrics["lag/mean"] == pytest.approx(4 / 3)
    assert metrics["lag/max"] == 2.0
    assert (metrics["reward/mean"], metrics["reward/std"]) == (2.0, 1.0)
    assert (metrics["reward/min"], metrics["reward/max"]) == (1.0, 3.0)
    assert (metrics["length/mean"], metrics["length/max"]) == (1.5, 2.0)
    assert metrics["length/finished_fraction"] == 0.5


def test_tokens_from_the_future_are_an_error() -> None:
    with pytest.raises(AssertionError, match="group 9 has tokens of a version after 3"):
        flatten([group()], 3)


@pytest.mark.parametrize("bad", [{"reward": math.nan}, {"reference": math.inf}])
def test_rewards_and_references_must_be_finite(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="group 9"):
        flatten([group(**bad)], 5)


def test_share_by_hand_distrusts_a_sampler_that_is_not_finite() -> None:
    share = make_share(flatten([group(sampler=-math.inf)], 5))
    assert share.mask.tolist() == [[True, True], [True, False]]
    assert share.trusted.tolist() == [[False, True], [True, False]]
    torch.testing.assert_close(share.sampler_logprobs, torch.tensor([[0.0, -1.5], [-0.5, 0.0]]))
    torch.testing.assert_close(share.reference_logprobs, torch.tensor([[-2.0, -2.5], [-0.1, 0.0]]))
    assert share.lags.tolist() == [[2, 1], [1, 0]]  # at version 5, of versions 3, 4 and 4


def test_a_rank_may_have_nothing() -> None:
    share = make_share([])
    assert share.mask.shape == (0, 1)


def test_values_find_their_way_back() -> None:
    pairs = [([1], [10, 11, 12]), ([2, 3], [20]), ([4], [30, 31])]
    batches = pack(pairs, micro_batch_tokens=5)
    padded = scatter_padded(batches, [batch.targets for batch in batches], torch.zeros(3, 3))
    assert padded.tolist() == [[10, 11, 12], [20, 0, 0], [30, 31, 0]]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=4, max_size=40),
    minibatches=st.integers(1, 4),
    ranks=st.integers(1, 5),
)
def test_plan_and_owners_cover_every_sample_once(lengths: list[int], minibatches: int, ranks: int) -> None:
    plan = plan_minibatches(len(lengths), epochs=2, minibatches=minibatches, seed=4)
    assert plan == plan_minibatches(len(lengths), epochs=2, minibatches=minibatches, seed=4)
    for epoch in plan:
        assert sorted(i for members in epoch for i in members) == list(range(len(lengths)))
        sizes = [len(members) for members in epoch]
        assert max(sizes) - min(sizes) <= 1
    owner = assign_owners(lengths, plan[0], ranks)
    assert set(owner) <= set(range(ranks))
    for members in plan[0]:
        # Greedy, longest first: no two ranks differ by more than one sample's tokens.
        loads = [sum(lengths[i] for i in members if owner[i] == rank) for rank in range(ranks)]
        assert max(loads) - min(loads) <= max(lengths[i] for i in members)


def test_each_epoch_is_shuffled_anew() -> None:
    first, second = plan_minibatches(64, epochs=2, minibatches=2, seed=0)
    assert set(first[0]) != set(second[0])


def test_more_minibatches_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ppo\.minibatches = 5 .* 4 samples"):
        plan_minibatches(4, epochs=1, minibatches=5, seed=0)

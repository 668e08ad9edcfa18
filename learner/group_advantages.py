"""Advantages from the group: what a sample's return is worth beside those of the same prompt.

No value model. The samples of a prompt are each other's baseline, so a group that is split over ranks or
minibatches must still be judged whole: every function takes the returns of *all* samples of a step.

Legend: S samples of a step; `groups`, (S,), holds the number of each one's group. Results are float64, (S,),
one advantage a sample, which all of its tokens share. Where all returns of a group are equal they are 0, to
the last bit.
"""

from typing import Literal

import torch
from torch import Tensor

GroupEstimator = Literal["group_mean", "group_std", "leave_one_out"]


def group_mean(returns: Tensor, groups: Tensor) -> Tensor:
    """A_i = R_i − mean R. Source: Dr. GRPO, Liu et al., arXiv 2503.20783."""
    counts, means = _counts_and_means(returns, groups)
    return _zero_where_equal(returns.double() - means[groups], returns, groups, counts)


def group_std(returns: Tensor, groups: Tensor, *, epsilon: float) -> Tensor:
    """A_i = (R_i − mean R)/(s + ε), with s² = Σ_j (R_j − mean R)²/(G − 1).

    Division by s weighs a prompt that is almost always, or almost never, solved more than one in between.
    Source: GRPO, Shao et al., arXiv 2402.03300. The paper leaves the denominator of s open; G − 1 is what the
    public codes use.
    """
    counts, means = _counts_and_means(returns, groups)
    centred = returns.double() - means[groups]
    squares = torch.zeros_like(means).index_add(0, groups, centred.square())
    spread = (squares / (counts - 1).clamp(min=1)).sqrt()
    return _zero_where_equal(centred / (spread[groups] + epsilon), returns, groups, counts)


def leave_one_out(returns: Tensor, groups: Tensor) -> Tensor:
    """A_i = R_i − mean_{j≠i} R_j = G/(G − 1)·(R_i − mean R): the baseline does not depend on the sample.

    Source: RLOO, Ahmadian et al., arXiv 2402.14740.
    """
    counts, means = _counts_and_means(returns, groups)
    assert bool((counts > 1).all()), "leaving one out of a group of one leaves nothing"
    factor = counts / (counts - 1)
    centred = (returns.double() - means[groups]) * factor[groups]
    return _zero_where_equal(centred, returns, groups, counts)


def group_advantages(kind: GroupEstimator, returns: Tensor, groups: Tensor, *, epsilon: float) -> Tensor:
    """The advantages of all samples by the estimator that is named; `epsilon` is for `group_std`."""
    if kind == "group_mean":
        return group_mean(returns, groups)
    if kind == "group_std":
        return group_std(returns, groups, epsilon=epsilon)
    return leave_one_out(returns, groups)


def uniform_groups(returns: Tensor, groups: Tensor) -> Tensor:
    """(number of groups,) bool: whether all returns of a group are equal, so that it teaches nothing."""
    counts, _ = _counts_and_means(returns, groups)
    return _largest(returns, groups, len(counts)) == -_largest(-returns, groups, len(counts))


def overlong_penalties(lengths: Tensor, *, limit: int, fraction: float) -> Tensor:
    """0 up to L − C tokens, then (L − C − |y|)/C, which is −1 at L; C is `fraction`·L, at least one token.

    `lengths` is (S,), L the longest response that is sampled. Source: DAPO, Yu et al., arXiv 2503.14476,
    equation 13; the paper's C is a fifth of L.
    """
    assert limit > 0, "the longest response must be known"
    cushion = max(1, round(fraction * limit))
    return ((limit - cushion - lengths.double()) / cushion).clamp(min=-1.0, max=0.0)


def _counts_and_means(returns: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Samples and mean return of each group."""
    assert returns.shape == groups.shape
    values = returns.double()
    number = int(groups.max()) + 1
    counts = torch.bincount(groups, minlength=number).double()
    assert bool((counts > 0).all()), "groups are numbered without gaps"
    return counts, torch.zeros(number, dtype=torch.float64).index_add(0, groups, values) / counts


def _largest(returns: Tensor, groups: Tensor, number: int) -> Tensor:
    least = torch.full((number,), -torch.inf, dtype=torch.float64)
    return least.scatter_reduce(0, groups, returns.double(), "amax")


def _zero_where_equal(advantages: Tensor, returns: Tensor, groups: Tensor, counts: Tensor) -> Tensor:
    """Rounding of the mean would leave a trace, which division by a tiny spread could make large."""
    largest, smallest = _largest(returns, groups, len(counts)), -_largest(-returns, groups, len(counts))
    return torch.where((largest == smallest)[groups], 0.0, advantages)

"""The objectives of the policy-gradient family as their papers write them: one response at a time, with the
papers' constants and nothing of the learner's own. What tests compare the learner's path with.

A response has log π (with gradient), log π_old, log π_ref, all (|y|,), its reward and its group.
"""

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

OBJECTIVES = ("reinforce++", "reinforce++_baseline", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo")


@dataclass
class Response:
    """Everything about one response; `start` is log π before the first update, without gradient."""

    logprobs: Tensor
    old: Tensor
    reference: Tensor
    start: Tensor
    reward: float
    group: int

    @property
    def length(self) -> int:
        return len(self.logprobs)


def published_loss(objective: str, responses: list[Response], limit: int) -> Tensor:
    """The loss of a minibatch that is the whole batch; `limit` is the longest response there can be."""
    advantages = _advantages(objective, responses, limit)
    losses = {
        "reinforce++": _token_mean,
        "reinforce++_baseline": _reinforce_baseline,
        "rloo": _rloo,
        "grpo": _grpo,
        "dr_grpo": lambda r, a: (
            sum(_clipped(x, b).sum() for x, b in zip(r, a, strict=True)) / (len(r) * limit)
        ),
        "dapo": lambda r, a: _token_mean(r, a, high=0.28),
        "gspo": _gspo,
        "cispo": _cispo,
    }
    return losses[objective](responses, advantages)


def _members(responses: list[Response], group: int) -> list[Response]:
    return [one for one in responses if one.group == group]


def _advantages(objective: str, responses: list[Response], limit: int) -> list[Tensor]:
    """(|y|,) for each response."""
    if objective == "reinforce++":
        return _reinforce(responses)
    if objective == "reinforce++_baseline":
        return _less_group_mean_whitened(responses)
    found = []
    for one in responses:
        returns = {id(x): x.reward for x in responses}
        if objective == "rloo":  # β = 0.05
            returns = {
                id(x): x.reward - 0.05 * float((x.start - x.reference).double().sum()) for x in responses
            }
        if objective == "dapo":
            returns = {id(x): x.reward + _overlong(x.length, limit) for x in responses}
        mates = _members(responses, one.group)
        if objective == "rloo":
            others = [returns[id(x)] for x in mates if x is not one]
            advantage = returns[id(one)] - sum(others) / len(others)
        else:
            values = [returns[id(x)] for x in mates]
            advantage = returns[id(one)] - statistics.mean(values)
            if objective != "dr_grpo":
                advantage /= statistics.stdev(values) + 1e-4
        found.append(torch.full((one.length,), advantage))
    return found


def _overlong(length: int, limit: int) -> float:
    """DAPO, equation 13, with a cushion of a fifth of the limit."""
    cushion = max(1, round(limit / 5))
    if length <= limit - cushion:
        return 0.0
    return (limit - cushion - length) / cushion


def _reinforce(responses: list[Response]) -> list[Tensor]:
    """REINFORCE++ with β = 0.05: A_t = R − β Σ_{u ≥ t} k1_u, then mean 0 and variance 1 over all tokens."""
    rows = []
    for one in responses:
        distance = (one.start - one.reference).tolist()
        rows.append([one.reward - 0.05 * sum(distance[t:]) for t in range(one.length)])
    flat = [value for row in rows for value in row]
    mean, std = statistics.fmean(flat), statistics.pstdev(flat)
    return [torch.tensor([(value - mean) / std for value in row]) for row in rows]


def _less_group_mean_whitened(responses: list[Response]) -> list[Tensor]:
    """REINFORCE++ with baseline: R − mean R of the group, then mean 0 and variance 1 over all tokens."""
    centred = [
        one.reward - statistics.fmean(x.reward for x in _members(responses, one.group)) for one in responses
    ]
    flat = [value for one, value in zip(responses, centred, strict=True) for _ in range(one.length)]
    mean, std = statistics.fmean(flat), statistics.pstdev(flat)
    return [
        torch.full((one.length,), (value - mean) / std) for one, value in zip(responses, centred, strict=True)
    ]


def _clipped(one: Response, advantage: Tensor, high: float = 0.2) -> Tensor:
    ratio = (one.logprobs - one.old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1 + high) * advantage)


def _token_mean(responses: list[Response], advantages: list[Tensor], high: float = 0.2) -> Tensor:
    total = sum(_clipped(one, a, high).sum() for one, a in zip(responses, advantages, strict=True))
    return total / sum(one.length for one in responses)


def _reinforce_baseline(responses: list[Response], advantages: list[Tensor]) -> Tensor:
    penalty = sum((one.logprobs - one.reference).square().sum() / 2 for one in responses)
    return _token_mean(responses, advantages) + 0.05 * penalty / sum(one.length for one in responses)


def _grpo(responses: list[Response], advantages: list[Tensor]) -> Tensor:
    total = torch.zeros(())
    for one, advantage in zip(responses, advantages, strict=True):
        delta = one.reference - one.logprobs
        kl = delta.exp() - delta - 1
        total = total + (_clipped(one, advantage) + 0.04 * kl).mean()
    return total / len(responses)


def _rloo(responses: list[Response], advantages: list[Tensor]) -> Tensor:
    total = torch.zeros(())
    for one, advantage in zip(responses, advantages, strict=True):
        ratio = (one.logprobs.sum() - one.old.sum()).exp()
        worth = advantage[0]
        total = total - torch.minimum(ratio * worth, ratio.clamp(0.8, 1.2) * worth)
    return total / len(responses)


def _gspo(responses: list[Response], advantages: list[Tensor]) -> Tensor:
    total = torch.zeros(())
    for one, advantage in zip(responses, advantages, strict=True):
        ratio = (one.logprobs.sum() - one.old.sum()).div(one.length).exp()
        worth = advantage[0]
        total = total - torch.minimum(ratio * worth, ratio.clamp(1 - 3e-4, 1 + 4e-4) * worth)
    return total / len(responses)


def _cispo(responses: list[Response], advantages: list[Tensor]) -> Tensor:
    total = torch.zeros(())
    for one, advantage in zip(responses, advantages, strict=True):
        weight = (one.logprobs - one.old).exp().clamp(max=5.0).detach()
        total = total - (weight * advantage * one.logprobs).sum()
    return total / sum(one.length for one in responses)

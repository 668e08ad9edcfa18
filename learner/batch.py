"""From scored groups to what one rank trains on.

Every rank gets all groups and works out the same plan from them, so that counts, minibatches and who owns
which sample need no messages between ranks.

Legend: S samples of a step over all ranks; B of them on this rank; T their longest response.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.packing import MicroBatch, Pair
from actors.records import Group
from learner.group_advantages import uniform_groups


@dataclass(frozen=True, slots=True)
class Sample:
    """One trajectory with its prompt, and the lag of each of its tokens.

    `group` numbers the groups of the step from 0. Every rank has all samples, and so the whole of each group.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    reference_logprobs: tuple[float, ...]
    lags: tuple[int, ...]
    reward: float
    finished: bool
    group: int

    @property
    def pair(self) -> Pair:
        """Prompt and response."""
        return self.prompt, self.response

    @property
    def length(self) -> int:
        """All tokens that a forward pass computes."""
        return len(self.prompt) + len(self.response)


def flatten(groups: Sequence[Group], version: int) -> list[Sample]:
    """All samples of the groups; `version` is the number of learner steps taken so far.

    Rewards and reference log-probabilities must be finite: scoring leaves out groups where they are not.
    """
    samples: list[Sample] = []
    for number, group in enumerate(groups):
        for trajectory in group.trajectories:
            completion = trajectory.completion
            lags = tuple(version - sampled for sampled in completion.versions)
            assert min(lags) >= 0, f"group {group.group_id} has tokens of a version after {version}"
            assert len(trajectory.reference_logprobs) == len(completion.token_ids), group.group_id
            if not all(map(math.isfinite, (trajectory.reward, *trajectory.reference_logprobs))):
                raise ValueError(
                    f"group {group.group_id}: its reward or a reference log-probability is not finite"
                )
            samples.append(
                Sample(
                    group.prompt.token_ids,
                    completion.token_ids,
                    completion.logprobs,
                    trajectory.reference_logprobs,
                    lags,
                    trajectory.reward,
                    completion.finished,
                    number,
                )
            )
    assert samples, "a step without samples"
    return samples


def plan_minibatches(samples: int, *, epochs: int, minibatches: int, seed: int) -> list[list[list[int]]]:
    """plan[epoch][minibatch] lists sample numbers: a new shuffle each epoch, parts of (nearly) equal size."""
    if minibatches > samples:
        raise ValueError(
            f"ppo.minibatches = {minibatches} is more than the {samples} samples of a step: "
            "lower it or raise the batch size"
        )
    generator = torch.Generator().manual_seed(seed)
    plan: list[list[list[int]]] = []
    for _ in range(epochs):
        order = torch.randperm(samples, generator=generator).tolist()
        bounds = [samples * k // minibatches for k in range(minibatches + 1)]
        plan.append([order[a:b] for a, b in itertools.pairwise(bounds)])
    return plan


def assign_owners(lengths: Sequence[int], minibatches: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """owner[sample]: the rank that works on it, for the whole step.

    In each minibatch the longest sample goes first, to the rank with the fewest tokens so far in it; ties
    go to the rank with the fewest tokens over all.
    """
    owner = [0] * len(lengths)
    overall = [0] * ranks
    for members in minibatches:
        load = [0] * ranks
        for sample in sorted(members, key=lambda i: (-lengths[i], i)):
            rank = min(range(ranks), key=lambda r: (load[r], overall[r], r))
            owner[sample] = rank
            load[rank] += lengths[sample]
            overall[rank] += lengths[sample]
    return owner


@dataclass(frozen=True, slots=True)
class Share:
    """This rank's samples as tensors. All (B, T) but rewards (B,); what is outside `mask` is 0.

    `trusted` is the mask less the tokens whose sampler log-probability was not finite: they are left out of
    the policy's loss, while the count that it is divided by stays the same.
    """

    samples: tuple[Sample, ...]
    mask: Tensor
    trusted: Tensor
    sampler_logprobs: Tensor
    reference_logprobs: Tensor
    rewards: Tensor
    lags: Tensor


def make_share(samples: Sequence[Sample]) -> Share:
    """Pad this rank's samples to tensors; a rank may have none."""
    width = max((len(sample.response) for sample in samples), default=1)
    sampler = _padded([sample.sampler_logprobs for sample in samples], width)
    mask = _padded([(1.0,) * len(sample.response) for sample in samples], width).bool()
    return Share(
        tuple(samples),
        mask,
        mask & sampler.isfinite(),
        torch.nan_to_num(sampler, nan=0.0, posinf=0.0, neginf=0.0),
        _padded([sample.reference_logprobs for sample in samples], width),
        torch.tensor([sample.reward for sample in samples]),
        _padded([sample.lags for sample in samples], width).long(),
    )


def scatter_padded(batches: Sequence[MicroBatch], values: Sequence[Tensor], like: Tensor) -> Tensor:
    """(B, T): the micro-batches' (N,) values at [sequence, offset], 0 elsewhere."""
    padded = torch.zeros(like.shape)
    for batch, value in zip(batches, values, strict=True):
        padded[batch.sequence, batch.offset] = value.float().cpu()
    return padded


def sample_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """What the samples of a step say by themselves, over all ranks."""
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    lengths = [len(sample.response) for sample in samples]
    lags = [lag for sample in samples for lag in sample.lags]
    uniform = uniform_groups(rewards, torch.tensor([sample.group for sample in samples]))
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(correction=0)),
        "reward/min": float(rewards.min()),
        "reward/max": float(rewards.max()),
        "group/uniform_fraction": float(uniform.double().mean()),
        "length/mean": sum(lengths) / len(lengths),
        "length/max": float(max(lengths)),
        "length/finished_fraction": sum(sample.finished for sample in samples) / len(samples),
        "lag/mean": sum(lags) / len(lags),
        "lag/max": float(max(lags)),
    }


def _padded(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    """(B, width) float32, filled up with zeros on the right."""
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows]).reshape(len(rows), width)

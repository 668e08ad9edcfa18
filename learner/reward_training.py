"""One optimizer update on a batch of preferences, and the order in which pairs are trained.

The loss is a function of all scores of the batch, wherever they were computed: each rank scores its share,
the scores are added up over the ranks, and every rank works out the same loss and its gradient g = ∂L/∂score.
The weights then get their gradient from Σ g·score, micro-batch by micro-batch. So neither ranks nor
micro-batches change the result, also where a loss does not add up over pairs, as ODIN's correlations. Where a
rank has one micro-batch the scores are computed once; else a second forward pass is the price.

Legend: P pairs of the job, B pairs of a batch, U distinct sequences of a batch, heads 1, or 2 with ODIN.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.packing import MicroBatch
from learner.batch import assign_owners
from learner.engine import TrainingEngine, all_reduce
from learner.reward_module import Inputs, Sequences
from rewards.models.settings import RewardModelSettings
from rewards.preferences.losses import bradley_terry, classification, odin


@dataclass(frozen=True, slots=True)
class PairData:
    """What a reward model learns from. Sequences are numbered; some may be there to be scored only.

    lengths: of each sequence's response, in tokens without the end token. The rest has one entry a training
    pair: numbers of its sequences, its margin and weight, and the number of its prompt.
    """

    sequences: Sequences
    lengths: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: tuple[float, ...]
    weight: tuple[float, ...]
    prompt: tuple[int, ...]


# --- The order of pairs ----------------------------------------------------------------------------------


def batches_an_epoch(pairs: int, batch_size: int) -> int:
    """Batches of nearly equal size, none above `batch_size`."""
    return math.ceil(pairs / batch_size)


def batch_of(update: int, *, pairs: int, batch_size: int, seed: int, member: int) -> list[int]:
    """The pairs of an update of one member; every epoch has an order of its own and trains each pair once."""
    count = batches_an_epoch(pairs, batch_size)
    epoch, number = divmod(update, count)
    order = np.random.default_rng([seed, member, epoch]).permutation(pairs)
    bounds = [pairs * k // count for k in range(count + 1)]
    first, last = list(itertools.pairwise(bounds))[number]
    return [int(i) for i in order[first:last]]


def bootstrap_weights(prompts: Sequence[int], *, seed: int, member: int) -> list[float]:
    """For each pair its prompt's Poisson(1) draw: all pairs of a prompt come and go together."""
    count = max(prompts, default=-1) + 1
    drawn = np.random.default_rng([seed, member, 1_000_003]).poisson(1.0, size=count)
    return [float(drawn[prompt]) for prompt in prompts]


def relative_weights(weight: Sequence[float]) -> list[float]:
    """Each pair's weight over the mean of *all* training pairs; all 0 where no pair has any.

    The scale of weights then has no effect, and what a pair counts does not hang on the batch that it falls
    into: a batch of light pairs moves the model little, as it should.
    """
    largest = max(weight)
    if not largest:
        return [0.0] * len(weight)
    parts = [one / largest for one in weight]  # so that no sum of them is too large for a float
    mean = math.fsum(parts) / len(parts)
    return [part / mean for part in parts]


def head_seed(seed: int, member: int) -> int:
    """The seed of a member's first weights."""
    digest = hashlib.sha256(f"reward head {seed} {member}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


# --- The loss --------------------------------------------------------------------------------------------


def batch_loss(
    scores: Tensor,
    settings: RewardModelSettings,
    *,
    chosen: Sequence[int],
    rejected: Sequence[int],
    lengths: Sequence[int],
    margin: Sequence[float],
    weight: Sequence[float],
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch from its scores (heads, U), and what is logged of it.

    `chosen` and `rejected` (B,) are columns of `scores`, `lengths` (U,) belong to them, `margin` and `weight`
    (B,) to the pairs, the weights as `relative_weights` gives them. The loss is Σ w·(a pair's loss) / B, so
    that batches of one size add up to the weighted sum over the training set. What is logged under
    `preference/` is the batch's weighted mean; a batch without weight has none.
    """
    loss, figures = _summed_loss(
        scores, settings, chosen=chosen, rejected=rejected, lengths=lengths, margin=margin, weight=weight
    )
    mean = math.fsum(weight) / len(weight)
    for name in [name for name in figures if name.startswith("preference/")]:
        found = figures.pop(name)
        if mean:
            figures[name] = found / mean
    return loss, figures


def _summed_loss(
    scores: Tensor,
    settings: RewardModelSettings,
    *,
    chosen: Sequence[int],
    rejected: Sequence[int],
    lengths: Sequence[int],
    margin: Sequence[float],
    weight: Sequence[float],
) -> tuple[Tensor, dict[str, float]]:
    """The loss, and figures that are sums over pairs, each divided by B."""
    w = torch.tensor(weight, dtype=scores.dtype)
    winner, loser = scores[:, list(chosen)], scores[:, list(rejected)]
    if settings.loss == "odin":
        length = torch.tensor(lengths, dtype=scores.dtype)
        return odin(
            winner,
            loser,
            torch.stack([length[list(chosen)], length[list(rejected)]]),
            coefficient=settings.odin_length,
            weight=w,
        )
    if settings.loss == "classification":
        return classification(winner[0], loser[0], weight=w)
    return bradley_terry(
        winner[0],
        loser[0],
        margin=torch.tensor(margin, dtype=scores.dtype) if settings.margin else None,
        centring=settings.centring,
        weight=w,
    )


# --- One update ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """Which of a batch's sequences this rank computes, as micro-batches in step with the other ranks'.

    mine: their places in the batch's list of sequences; `sequence` of a micro-batch counts in `mine`.
    """

    mine: list[int]
    batches: list[MicroBatch | None]
    count: int

    @classmethod
    def of(
        cls,
        engine: TrainingEngine,
        inputs: Inputs,
        sequences: Sequence[int],
        *,
        micro_batch_tokens: int,
        rank: int,
        ranks: int,
    ) -> "Share":
        """The plan is the same on all ranks; each takes its part of it."""
        costs = [inputs.cost(index) for index in sequences]
        owner = assign_owners(costs, [range(len(costs))], ranks)
        mine = [place for place, rank_of in enumerate(owner) if rank_of == rank]
        batches = inputs.batches([sequences[place] for place in mine], micro_batch_tokens)
        return cls(mine, engine.in_step(batches), len(sequences))

    def places(self, batch: MicroBatch) -> Tensor:
        """Where a micro-batch's scores belong in the batch's list of sequences."""
        return torch.tensor(self.mine, dtype=torch.long)[batch.sequence.cpu()]


def gather_scores(share: Share, answers: Sequence[Tensor], device: torch.device) -> Tensor:
    """(heads, U) scores of all ranks, on the CPU in float64; `answers` are this rank's, (heads, N) each."""
    scores = torch.zeros((answers[0].shape[0], share.count), dtype=torch.float64)
    for batch, answer in zip(share.batches, answers, strict=True):
        if batch is not None:
            scores[:, share.places(batch)] = answer.detach().double().cpu()
    return all_reduce(scores.to(device)).cpu()


@torch.no_grad()
def score_sequences(
    engine: TrainingEngine,
    inputs: Inputs,
    sequences: Sequence[int],
    *,
    micro_batch_tokens: int,
    rank: int,
    ranks: int,
) -> list[float]:
    """Raw rewards of these sequences with the present weights, the same on all ranks."""
    share = Share.of(engine, inputs, sequences, micro_batch_tokens=micro_batch_tokens, rank=rank, ranks=ranks)
    answers = [engine.forward(batch or inputs.dummy())[0] for batch in share.batches]
    numbers: list[float] = gather_scores(share, answers, engine.device)[0].tolist()
    return numbers


def reward_update(
    engine: TrainingEngine,
    inputs: Inputs,
    data: PairData,
    settings: RewardModelSettings,
    *,
    batch: Sequence[int],
    weight: Sequence[float],
    lr: float,
    head_lr: float,
    micro_batch_tokens: int,
    rank: int,
    ranks: int,
) -> dict[str, float]:
    """One update on the pairs of `batch`; `weight` has every pair's of the job, see `relative_weights`."""
    used = sorted({data.chosen[i] for i in batch} | {data.rejected[i] for i in batch})
    place = {index: number for number, index in enumerate(used)}
    share = Share.of(engine, inputs, used, micro_batch_tokens=micro_batch_tokens, rank=rank, ranks=ranks)
    once = len(share.batches) == 1
    with torch.set_grad_enabled(once):
        answers = [engine.forward(one or inputs.dummy()) for one in share.batches]
    scores = gather_scores(share, [scored for scored, _ in answers], engine.device).requires_grad_()
    loss, figures = batch_loss(
        scores,
        settings,
        chosen=[place[data.chosen[i]] for i in batch],
        rejected=[place[data.rejected[i]] for i in batch],
        lengths=[data.lengths[index] for index in used],
        margin=[data.margin[i] for i in batch],
        weight=[weight[i] for i in batch],
    )
    (gradient,) = torch.autograd.grad(loss, scores)
    overlap = settings.odin_orthogonality if settings.loss == "odin" and rank == 0 else 0.0
    for number, one in enumerate(share.batches):
        last = number == len(share.batches) - 1
        scored, penalty = answers[number] if once else engine.forward(one or inputs.dummy())
        if one is None:
            surrogate = 0.0 * scored.sum()
        else:
            surrogate = (gradient[:, share.places(one)].to(scored) * scored).sum()
        # The heads' penalty belongs to the batch as a whole: it is added once.
        engine.backward(surrogate + (overlap if last else 0.0) * penalty, last=last)
    norm = engine.step(lr, head_lr=head_lr)
    return {
        "loss/reward_model": float(loss.detach()),
        **figures,
        "optimizer/grad_norm": norm,
        "optimizer/lr": lr,
    }

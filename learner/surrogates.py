"""The surrogates of the policy-gradient family a token, and how tokens are added up.

Each has a gradient flow of its own through ρ = π/π_old, and the same gradient, −A·∇log π, where ρ is 1:

    token_clip      max(−ρA, −clip(ρ)A)                                   PPO, GRPO, Dr. GRPO, DAPO
    sequence_clip   the same with s = Π_t ρ_t of the whole response       RLOO
    geometric_clip  the same with s = (Π_t ρ_t)^(1/|y|)                   GSPO
    cispo           −sg[clip(ρ)]·A·log π: a clipped token keeps its gradient

Legend: N tokens of a micro-batch; `sequence`, (N,), says which response a token belongs to, and a micro-batch
holds responses whole. sg stops the gradient.
"""

from typing import Literal

import torch
from torch import Tensor

from learner.kl import MAX_LOG_RATIO

Surrogate = Literal["token_clip", "sequence_clip", "geometric_clip", "cispo"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


def clipped(
    ratio: Tensor, unit: Tensor | float, advantages: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """(max(−ρA, −clip(ρ, low, high)·A), where the clip decides), both (N,).

    `unit` is what ρ is where the policies agree: the bounds are multiples of it.
    Source: Schulman et al., arXiv 1707.06347; bounds of their own above and below: DAPO, arXiv 2503.14476.
    """
    unclipped = -ratio * advantages
    bounded = -ratio.clamp(low * unit, high * unit) * advantages
    with torch.no_grad():
        was_clipped = bounded > unclipped
    return torch.maximum(unclipped, bounded), was_clipped


def bounded_below(losses: Tensor, unit: Tensor | float, advantages: Tensor, *, dual_clip: float) -> Tensor:
    """min(loss, −c·A) where A < 0: one ρ that exploded cannot rule the batch. Source: arXiv 1912.09729."""
    return torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages * unit), losses)


def cispo(
    logprobs: Tensor, ratio: Tensor, advantages: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """(−sg[clip(ρ, low, high)]·A·log π, where the clip changed ρ), both (N,).

    The clip bounds how loud a token is and silences none. Source: MiniMax-M1, arXiv 2506.13585, equation 4.
    """
    weight = ratio.detach().clamp(low, high)
    return -weight * advantages * logprobs, weight != ratio.detach()


def sequence_ratios(
    logprobs: Tensor, old_logprobs: Tensor, sequence: Tensor, *, geometric: bool
) -> tuple[Tensor, Tensor | float]:
    """(a ratio a token that stands for its response's s, what it is where the policies agree).

    Geometric: s_t = sg[s]·π_t/sg[π_t], with s = exp(mean_t log ρ_t); mean_t s_t has the value and gradient of
    s. Else: s_t = sg[s]·(1/|y| + log π_t − sg[log π_t]), with s = exp(Σ_t log ρ_t); Σ_t s_t has them.
    Log-ratios, the sum included, are cut off at ±20. Source: GSPO, Zheng et al., arXiv 2507.18071, equations
    7 and 14; the second form does the same for the product, with which RLOO is clipped.
    """
    assert sequence.shape == logprobs.shape
    detached = logprobs.detach()
    log_ratio = (detached - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    number = int(sequence.max()) + 1 if len(sequence) else 0
    lengths = torch.bincount(sequence, minlength=number).clamp(min=1).to(log_ratio)
    totals = torch.zeros_like(lengths).index_add(0, sequence, log_ratio)
    if geometric:
        whole = (totals / lengths).exp()
        return whole[sequence] * (logprobs - detached).exp(), 1.0
    whole = totals.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unit = (1.0 / lengths)[sequence]
    return whole[sequence] * (unit + (logprobs - detached)), unit


def token_scales(mask: Tensor, aggregation: Aggregation) -> Tensor:
    """(B, T): what a token's loss is multiplied with before all are added up; 0 outside the mask."""
    real = mask.float()
    if aggregation == "sequence_mean":
        return real / real.sum(dim=1, keepdim=True).clamp(min=1)
    return real


def divisor(aggregation: Aggregation, *, tokens: int, sequences: int, limit: int) -> float:
    """What the sum over a minibatch of all ranks is divided by; `limit` is the longest response sampled.

    token_mean: Σ_i Σ_t / Σ_i |y_i|, every token alike (DAPO). sequence_mean: mean_i (1/|y_i|) Σ_t, every
    response alike (GRPO, GSPO). sequence_sum: mean_i Σ_t, the gradient of the mean return (RLOO). constant:
    the same over L, the longest response there can be (Dr. GRPO).
    """
    if aggregation == "token_mean":
        return float(tokens)
    if aggregation == "constant":
        assert limit > 0, "the longest response must be known"
        return float(sequences * limit)
    return float(sequences)

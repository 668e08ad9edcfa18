"""The losses of PPO as functions of tensors.

Legend: N tokens of a micro-batch. Every tensor is (N,); `count` is the number of valid tokens in the whole
minibatch over *all* micro-batches and ranks, so that adding up the losses (and the gradients) of the parts
gives exactly the mean over the whole. Each function returns the loss and sums to be added up for logging.
"""

import torch
from torch import Tensor

from learner.kl import MAX_LOG_RATIO, k3

Sums = dict[str, Tensor]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip: float | Tensor,
    dual_clip: float | None,
    count: float,
) -> tuple[Tensor, Sums]:
    """−Σ w·min(ρA, clip(ρ, 1±ε)A) / count, with ρ = π/π_old and w a constant weight a token.

    Decoupled: π_old is the learner at the start of its step and w corrects for the policy that sampled.
    Coupled: π_old is the policy that sampled and w is 1. `clip` is ε, or one ε a token (float64).
    Dual clip: where A < 0 the loss is at most −c·A, so that one token whose ρ exploded cannot rule the batch.
    Sources: Schulman et al., arXiv 1707.06347; dual clip Ye et al., arXiv 1912.09729; a weight outside the
    minimum (decoupled from ρ) Hilton et al., arXiv 2110.00641.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = -ratio * advantages
    low, high = (torch.as_tensor(bound).to(ratio) for bound in (1.0 - clip, 1.0 + clip))
    clipped = -ratio.clamp(low, high) * advantages
    losses = torch.maximum(unclipped, clipped)
    with torch.no_grad():
        was_clipped = clipped > unclipped
    if dual_clip is not None:
        bound = -dual_clip * advantages
        losses = torch.where(advantages < 0, torch.minimum(losses, bound), losses)
    loss = (weights * losses).sum() / count
    with torch.no_grad():
        sums = {
            "loss/policy": loss.detach(),
            "ppo/clip_fraction": was_clipped.sum() / count,
            # KL(π_old‖π) from tokens of π_old.
            "ppo/approx_kl": k3(old_logprobs, logprobs).sum() / count,
            "ppo/ratio_mean": ratio.sum() / count,
        }
    return loss, sums


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None, count: float
) -> tuple[Tensor, Sums]:
    """½ Σ max((V − R)², (clip(V, V_old ± ε_v) − R)²) / count; without `clip`, ½ Σ (V − R)² / count.

    Source: the reference implementation of arXiv 1707.06347 (the paper leaves the clip out).
    """
    squared = (values - returns).square()
    clipped_share = torch.zeros((), device=values.device)
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        near_squared = (near - returns).square()
        clipped_share = (near_squared > squared).sum() / count
        squared = torch.maximum(squared, near_squared)
    loss = 0.5 * squared.sum() / count
    return loss, {"loss/value": loss.detach(), "ppo/value_clip_fraction": clipped_share.detach()}


def entropy_bonus(entropies: Tensor, *, count: float) -> tuple[Tensor, Sums]:
    """−Σ H / count: a loss that falls as the entropy rises."""
    loss = -entropies.sum() / count
    return loss, {"policy/entropy": -loss.detach()}


def supervised_loss(logprobs: Tensor, *, count: float) -> tuple[Tensor, Sums]:
    """−Σ log π(demonstrated token) / count over completion tokens."""
    loss = -logprobs.sum() / count
    return loss, {"loss/supervised": loss.detach()}

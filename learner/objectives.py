"""The losses of PPO and its family as functions of tensors.

Legend: N tokens of a micro-batch. Every tensor is (N,); `count` is what the whole minibatch, over *all*
micro-batches and ranks, is divided by (its valid tokens, or see `learner.surrogates.divisor`), so that adding
up the losses (and the gradients) of the parts gives exactly the mean over the whole. Each function returns
the loss and sums to be added up for logging.
"""

import torch
from torch import Tensor

from learner.kl import MAX_LOG_RATIO, Estimator, estimate, k3
from learner.surrogates import Surrogate, bounded_below, cispo, clipped, sequence_ratios

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
    clip_high: float | Tensor | None = None,
    surrogate: Surrogate = "token_clip",
    sequence: Tensor | None = None,
    tokens: float | None = None,
) -> tuple[Tensor, Sums]:
    """Σ w·ℓ / count, with ℓ = −min(ρA, clip(ρ, 1 − ε, 1 + ε_high)·A) or another `surrogate`.

    ρ = π/π_old; w is a constant weight a token, which may hold 1/|y| (`learner.surrogates.token_scales`).
    Decoupled: π_old is the learner at the start of its step and w corrects for the policy that sampled.
    Coupled: π_old is the policy that sampled and w is 1. `clip` is ε, or one ε a token (float64), and so is
    `clip_high`, ε_high, where given. Dual clip: where A < 0 the loss is at most −c·A. `sequence`, (N,), is
    needed where the ratio is one of whole responses. `tokens` is the number of tokens of the minibatch, for
    the metrics, where that is not `count`.
    Sources: Schulman et al., arXiv 1707.06347; dual clip Ye et al., arXiv 1912.09729; a weight outside the
    minimum (decoupled from ρ) Hilton et al., arXiv 2110.00641; for the others see `learner.surrogates`.
    """
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    bounds = (1.0 - clip, 1.0 + (clip if clip_high is None else clip_high))
    low, high = (torch.as_tensor(bound).to(ratio) for bound in bounds)
    if surrogate == "cispo":
        assert dual_clip is None, "CISPO has no minimum that a dual clip could bound"
        losses, was_clipped = cispo(logprobs, ratio, advantages, low, high)
    else:
        used: Tensor = ratio
        unit: Tensor | float = 1.0
        if surrogate != "token_clip":
            assert sequence is not None, "a ratio of whole responses needs to know them"
            geometric = surrogate == "geometric_clip"
            used, unit = sequence_ratios(logprobs, old_logprobs, sequence, geometric=geometric)
        losses, was_clipped = clipped(used, unit, advantages, low, high)
        if dual_clip is not None:
            losses = bounded_below(losses, unit, advantages, dual_clip=dual_clip)
    loss = (weights * losses).sum() / count
    tokens = count if tokens is None else tokens
    with torch.no_grad():
        sums = {
            "loss/policy": loss.detach(),
            "ppo/clip_fraction": was_clipped.sum() / tokens,
            # KL(π_old‖π) from tokens of π_old.
            "ppo/approx_kl": k3(old_logprobs, logprobs).sum() / tokens,
            "ppo/ratio_mean": ratio.sum() / tokens,
        }
    return loss, sums


def kl_loss(
    logprobs: Tensor, reference: Tensor, scales: Tensor, *, estimator: Estimator, count: float
) -> tuple[Tensor, Sums]:
    """Σ scale·k(log π, log π_ref) / count, with the gradient through log π.

    What it descends is not always KL(π‖π_ref): see `learner.kl.gradient_caveat`. Source: GRPO, Shao et al.,
    arXiv 2402.03300, equation 4 (with k3).
    """
    loss = (scales * estimate(estimator, logprobs, reference)).sum() / count
    return loss, {"loss/kl": loss.detach()}


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

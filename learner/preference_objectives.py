"""Preference objectives as functions of tensors: from labels to a policy, without a reward model.

Each takes *scores* of responses and is a loss of their differences:

    h = log π(y|x) − log π_ref(y|x), summed over the response's tokens, the end token included   DPO, IPO, KTO
    ℓ = log π(y|x) / |y|                                                                        SimPO

The implicit reward is β·h (τ·h with IPO, β·ℓ with SimPO): within a prompt, what a reward model would say.

Legend: B pairs, or responses with KTO, of a micro-batch. Tensors are (B,) unless stated. `count` is the sum
of weights in the whole minibatch over *all* micro-batches and ranks (those of the call where not given), so
that adding up the losses, and the gradients, of the parts gives exactly the weighted mean over the whole.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    count: float | None = None,
) -> Tensor:
    """Σ w·[−(1−ε)·log σ(β(h_w − h_l) − m) − ε·log σ(−β(h_w − h_l) + m)] / count.

    At h = 0 and m = 0 it is log 2 with the gradient −(β/2)·∇(log π_w − log π_l), less 2ε of it. Under
    Bradley-Terry labels and any distribution of pairs with full support its optimum is π_ref·e^{r/β}/Z.
    Sources: Rafailov et al., arXiv 2305.18290; ε Mitchell, "A note on DPO with noisy preferences"; m Amini et
    al., arXiv 2402.10571.
    """
    gap = beta * (chosen - rejected)
    if margin is not None:
        gap = gap - margin
    losses = -(1.0 - label_smoothing) * F.logsigmoid(gap) - label_smoothing * F.logsigmoid(-gap)
    return _weighted_sum(losses, weight, count)


def ipo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    tau: float,
    weight: Tensor | None = None,
    count: float | None = None,
) -> Tensor:
    """Σ w·(h_w − h_l − 1/(2τ))² / count.

    Where the label of a pair is drawn with P(1 ≻ 2) = p, its optimum is h₁ − h₂ = (2p − 1)/(2τ): finite, also
    where all labels agree. h is a sum over tokens in the paper; give means to have the other reading of it.
    Source: Azar et al., arXiv 2310.12036.
    """
    return _weighted_sum((chosen - rejected - 0.5 / tau).square(), weight, count)


def kto_loss(
    scores: Tensor,
    desirable: Tensor,
    reference_point: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weight: Tensor | None = None,
    count: float | None = None,
) -> Tensor:
    """Σ w·λ_D·(1 − σ(β(h − z₀))) over good responses + Σ w·λ_U·(1 − σ(β(z₀ − h))) over bad ones, / count.

    `desirable` says which are good; `reference_point` is z₀ of the whole minibatch: `kto_reference_point`.
    Source: Ethayarajh et al., arXiv 2402.01306.
    """
    gain = beta * (scores - reference_point)
    # 1 − σ(x) = σ(−x), which keeps small values exact.
    good = desirable_weight * torch.sigmoid(-gain)
    bad = undesirable_weight * torch.sigmoid(gain)
    return _weighted_sum(torch.where(desirable, good, bad), weight, count)


def kto_reference_point(mismatched: Tensor, weight: Tensor | None = None) -> Tensor:
    """z₀ = max(0, Σ w·h / Σ w) over responses to *other* prompts of the minibatch, a constant: no gradient.

    A stand-in for KL(π‖π_ref), which would need samples of π. Each has the `weight` of the example that it
    stands beside; where all are 0 so is z₀. Both tensors are those of the *whole* minibatch.
    """
    values = mismatched.detach()
    if weight is None:
        return values.mean().clamp(min=0.0)
    total = weight.sum()
    return ((weight * values).sum() / torch.where(total > 0, total, 1.0)).clamp(min=0.0)


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    gamma: float,
    weight: Tensor | None = None,
    count: float | None = None,
) -> Tensor:
    """Σ w·[−log σ(β(ℓ_w − ℓ_l) − γ)] / count, with ℓ = log π / |y|, the mean over the response's tokens.

    Source: Meng et al., arXiv 2405.14734.
    """
    return _weighted_sum(-F.logsigmoid(beta * (chosen - rejected) - gamma), weight, count)


def _weighted_sum(losses: Tensor, weight: Tensor | None, count: float | None) -> Tensor:
    """Σ w·loss / count."""
    if weight is None:
        return losses.sum() / (len(losses) if count is None else count)
    return (weight * losses).sum() / (float(weight.sum()) if count is None else count)

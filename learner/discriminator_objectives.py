"""The loss of a discriminator and what is logged of it, as functions of tensors.

Legend: N sequences of a micro-batch; U of an update, over all micro-batches and ranks: E demonstrations and
S responses of the policy. d = log D − log(1 − D) is the logit.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Sums = dict[str, Tensor]
BINS = 10


def discriminator_loss(
    logits: Tensor, demonstrated: Tensor, *, smoothing: float, demonstrations: int, responses: int
) -> tuple[Tensor, Sums]:
    """½·Σ_demo ℓ/E + ½·Σ_response ℓ/S, with ℓ = −t·log D − (1 − t)·log(1 − D).

    logits: (N,); demonstrated: (N,) bool. The target t is 1 − α for a demonstration and α for a response, α
    the `smoothing`. Both halves weigh the same whatever E and S are, so that without smoothing the optimum is
    d = log(ρ_E/π), and with it d = log[((1 − α)·ρ_E + α·π) / (α·ρ_E + (1 − α)·π)], within ±log((1 − α)/α).
    `demonstrations` and `responses` are E and S of the whole update: the parts' losses add up to its mean.
    Sources: Goodfellow et al., arXiv 1406.2661; label smoothing Salimans et al., arXiv 1606.03498.
    """
    assert logits.shape == demonstrated.shape
    number = logits.new_tensor
    target = torch.where(demonstrated, number(1.0 - smoothing), number(smoothing))
    share = torch.where(demonstrated, number(0.5 / max(1, demonstrations)), number(0.5 / max(1, responses)))
    loss = (share * (F.softplus(logits) - target * logits)).sum()
    return loss, {"loss/discriminator": loss.detach()}


def best_logit(demonstration_mass: Tensor, policy_mass: Tensor, smoothing: float) -> Tensor:
    """The logit at which `discriminator_loss` is smallest, for the two probabilities of a response."""
    above = (1.0 - smoothing) * demonstration_mass + smoothing * policy_mass
    below = smoothing * demonstration_mass + (1.0 - smoothing) * policy_mass
    return above.log() - below.log()


def penalty_of(logits: Tensor, embedded: Tensor) -> Tensor:
    """Σ ‖∂d_i/∂embeddings_i‖² over the sequences of a micro-batch, itself with a gradient.

    logits: (N,), made from `embedded` (R, L, H), rows of packed sequences: no logit depends on another
    sequence's embeddings, so the sum needs no sequence apart. Zero-centred and taken on demonstrations and
    responses alike: R1 and R2 of Mescheder et al., arXiv 1801.04406.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), embedded, create_graph=True)
    return gradient.float().square().sum()


def calibration_error(logits: Tensor, demonstrated: Tensor, bins: int = BINS) -> float:
    """Σ_b n_b/U · |mean D − share of demonstrations| over bins of equal width of D.

    logits, demonstrated: (U,), as many demonstrations as responses. Source: Guo et al., arXiv 1706.04599.
    """
    probability = logits.double().sigmoid()
    place = (probability * bins).long().clamp(max=bins - 1)
    error = 0.0
    for number in range(bins):
        inside = place == number
        if bool(inside.any()):
            gap = probability[inside].mean() - demonstrated[inside].double().mean()
            error += float(inside.double().mean() * gap.abs())
    return error


def classification_metrics(logits: Tensor, demonstrated: Tensor, fresh: Tensor) -> dict[str, float]:
    """What the logits of an update say, made before it; all (U,). `fresh` are this step's own responses.

    A demonstration is right above 0 and a response below it; 0 counts as half right, so that a discriminator
    without an opinion has an accuracy of ½. What has no sequence has no entry.
    """
    right = torch.where(demonstrated, (logits > 0).double(), (logits < 0).double()) + 0.5 * (logits == 0)
    replayed = ~demonstrated & ~fresh
    kinds = {"demonstrations": demonstrated, "fresh": fresh, "replayed": replayed}
    means = {name: float(right[kind].mean()) for name, kind in kinds.items() if bool(kind.any())}
    metrics = {f"discriminator/accuracy_{name}": mean for name, mean in means.items()}
    metrics["discriminator/accuracy"] = 0.5 * float(right[demonstrated].mean() + right[~demonstrated].mean())
    metrics["discriminator/logit_demonstrations"] = float(logits[demonstrated].mean())
    metrics["discriminator/logit_fresh"] = float(logits[fresh].mean())
    metrics["discriminator/calibration_error"] = calibration_error(logits, demonstrated)
    assert all(map(math.isfinite, metrics.values())), metrics
    return metrics

"""What is done about the difference between sampler and learner: weights, masks, clip range, learning rate.

μ is the policy that sampled, π_prox the learner at the start of its step, ℓ = log π_prox − log μ of a
token and w = e^ℓ. All weights and masks are fixed for the step, before its first update, and carry no
gradient; what the step itself moves is bounded by the ratio's clip. The loss keeps the count of *all*
tokens as its denominator, so a token that is taken out makes the step smaller, not the others louder.

Legend: B sequences on this rank, T their longest response, N tokens. Sums add up over ranks.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.kl import MAX_LOG_RATIO
from learner.mismatch import sequence_totals
from learner.settings import CorrectionSettings

# --- Weights -----------------------------------------------------------------------------------------------


def raw_weights(ratios: Tensor) -> Tensor:
    """w = e^ℓ, with ℓ cut off at ±20 so that it stays finite."""
    return ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def truncated(weights: Tensor, *, cap: float) -> Tensor:
    """min(w, C): biases the estimate a little and bounds its variance.

    Sources: Ionides, "Truncated importance sampling" (2008); for language models Yao et al., "Your efficient
    RL framework secretly brings you off-policy RL training" (2025). Token weights leave out the ratio of
    the prefixes, and are biased for that reason as well; the product over the sequence is not.
    """
    return weights.clamp(max=cap)


def icepop(weights: Tensor, *, low: float, high: float) -> Tensor:
    """w·1[low ≤ w ≤ high]: a token that the two policies disagree on teaches nothing.

    Source: Ling team, "Every step evolves" (2025), which names it IcePop.
    """
    return torch.where((weights >= low) & (weights <= high), weights, 0.0)


# --- Masks -------------------------------------------------------------------------------------------------


def sequence_keep(log_weights: Tensor, *, cap: float) -> Tensor:
    """1[Π_t w_t ≤ C] of log W = Σ_t ℓ_t: drops what the learner likes far more than the sampler did.

    No lower bound: a small weight does no harm. Source: TRL's sequence mask, C = 3.
    """
    return log_weights <= math.log(cap)


def geometric_keep(log_weights: Tensor, counts: Tensor, *, low: float, high: float) -> Tensor:
    """1[low ≤ (Π_t w_t)^(1/n) ≤ high] of log W and n: the same bound a token for long and short sequences.

    A sequence without trusted tokens (n = 0) is kept; it has no weight anyway. Source: the sequence mask of
    OpenRLHF, whose measure is the geometric mean.
    """
    means = log_weights / counts.clamp(min=1)
    return (means >= math.log(low)) & (means <= math.log(high))


def harmful(ratios: Tensor, advantages: Tensor) -> Tensor:
    """Where the update would carry the learner further from the sampler: (A > 0, ℓ > 0) or (A < 0, ℓ < 0)."""
    return ratios * advantages > 0


def m2_limit(squares: Tensor, *, budget: float) -> float:
    """The largest ℓ² that may stay, so that M̂₂ = mean ℓ² over the harmful tokens kept is within the budget.

    `squares`, (N,), are ℓ² of the harmful tokens of *all* ranks; the largest go first, as few as will do;
    tokens that tie with one that goes, go too. Infinite where nothing must go. Source: M2PO, Zheng et al.,
    arXiv 2510.01161. Two published codes differ: the authors' looks at harmful tokens only, the one of AReaL
    takes the largest over all tokens. This is the former: taking out a token with A > 0 and ℓ < 0, say, would
    stop exactly the updates that bring the learner back to the sampler.
    """
    ordered, _ = squares.double().sort()
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    kept = int((means <= budget).sum())  # running means of ascending values ascend
    if kept == len(ordered):
        return math.inf
    first_out = float(ordered[kept])
    below = ordered[ordered < first_out]
    return float(below[-1]) if len(below) else -1.0


# --- Clip range and learning rate --------------------------------------------------------------------------


def contracted_clip(lags: Tensor, *, clip: float, rate: float) -> Tensor:
    """ε_s = ε/(1 + κ·s), float64: the staler a token, the less far one step may move it.

    After the idea of "Stale but Stable" (which contracts by |log w|); contraction by the lag s is ours: it is
    known without noise and cannot be large by chance for a fresh token.
    """
    return clip / (1.0 + rate * lags.double())


def damping(ess: float, *, target: float) -> float:
    """√min(1, (ESS/B)/ρ₀): what the learning rate is multiplied with; ESS/B is of raw weights.

    A batch that counts as ESS samples has the gradient noise of ESS samples, and a step size in proportion
    to the root of the batch keeps the noise of the update. Source: VCPO, Huang et al., arXiv 2602.17616.
    """
    return math.sqrt(min(1.0, ess / target))


# --- All of it ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Corrected:
    """(B, T) weights of the loss, 0 where a token is distrusted or masked, and sums of what was done."""

    weights: Tensor
    sums: Tensor


def correct(
    ratios: Tensor,
    trusted: Tensor,
    advantages: Tensor,
    settings: CorrectionSettings,
    *,
    largest_square: float = math.inf,
) -> Corrected:
    """Weights and masks as configured; `largest_square` is the `m2_limit` over all ranks. All (B, T).

    sums, (6,): trusted tokens, those whose weight was cut off, those that the mask took out; sequences with
    trusted tokens, those of which the mask left none; Σ of the weights after all.
    """
    log_weights, counts = sequence_totals(ratios, trusted)
    raw, weights = _weights(ratios, log_weights, settings)
    keep = _kept_sequences(log_weights, counts, settings)[:, None].expand_as(ratios)
    if settings.mask == "m2po":
        keep = ~(harmful(ratios, advantages) & (ratios.square() > largest_square))
    cut = (weights != raw) & trusted
    left = keep & trusted
    weights = torch.where(left, weights, 0.0)
    has_tokens = trusted.any(dim=1)
    sums = [
        trusted.sum(),
        cut.sum(),
        (trusted & ~keep).sum(),
        has_tokens.sum(),
        (has_tokens & ~left.any(dim=1)).sum(),
        weights.sum(),
    ]
    return Corrected(weights.float(), torch.stack([value.double() for value in sums]))


def _weights(ratios: Tensor, log_weights: Tensor, settings: CorrectionSettings) -> tuple[Tensor, Tensor]:
    """(before, after) the cut, both (B, T)."""
    if settings.weights == "none":
        ones = torch.ones_like(ratios)
        return ones, ones
    if settings.weights == "sequence":
        raw = raw_weights(log_weights)[:, None].expand_as(ratios)
        return raw, truncated(raw, cap=settings.cap)
    raw = raw_weights(ratios)
    if settings.weights == "icepop":
        return raw, icepop(raw, low=settings.icepop_low, high=settings.icepop_high)
    return raw, truncated(raw, cap=settings.cap)


def _kept_sequences(log_weights: Tensor, counts: Tensor, settings: CorrectionSettings) -> Tensor:
    """(B,): which sequences the mask leaves in."""
    if settings.mask == "sequence":
        return sequence_keep(log_weights, cap=settings.sequence_cap)
    if settings.mask == "geometric":
        low, high = settings.geometric_low, settings.geometric_high
        return geometric_keep(log_weights, counts, low=low, high=high)
    return torch.ones_like(log_weights, dtype=torch.bool)


def correction_metrics(sums: Tensor) -> dict[str, float]:
    """What `correct` did, from its sums over all ranks."""
    tokens, cut, masked, sequences, masked_sequences, total = (float(x) for x in sums)
    if tokens == 0:
        return {}
    return {
        "correction/cut_fraction": cut / tokens,
        "correction/masked_tokens": masked / tokens,
        "correction/masked_sequences": masked_sequences / sequences,
        "correction/weight_mean": total / tokens,
    }

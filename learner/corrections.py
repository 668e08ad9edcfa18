"""How far the sampler was from the learner, and the weights that correct for it.

μ is the policy that sampled (other kernels, maybe older weights), π_prox the learner at the start of its
step, and ℓ = log π_prox − log μ of a token; the sampler is always the denominator.

Legend: N tokens, on one rank; the sums add up over ranks.
"""

import torch
from torch import Tensor

from learner.kl import MAX_LOG_RATIO


def truncated_weights(proximal: Tensor, sampler: Tensor, *, cap: float | None) -> tuple[Tensor, Tensor]:
    """(w, raw): raw = e^ℓ and w = min(raw, C), both (N,) and without gradient; w = 1 where `cap` is None.

    Truncation biases the estimate a little and bounds its variance. Source: Ionides, "Truncated importance
    sampling" (2008); for language models Yao et al., "Your efficient RL framework secretly brings you
    off-policy RL training" (2025).
    """
    raw = (proximal - sampler).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return (raw.clamp(max=cap) if cap is not None else torch.ones_like(raw)), raw


def mismatch_sums(proximal: Tensor, sampler: Tensor, raw: Tensor, *, cap: float | None) -> Tensor:
    """(6,) float64 sums over tokens: count, Σw, Σw², number cut off, Σ(e^ℓ − 1 − ℓ), Σ|ℓ|; w is raw."""
    log_ratio = (proximal - sampler).double()
    weights = raw.double()
    bounded = log_ratio.clamp(max=MAX_LOG_RATIO)
    cut = (raw > cap).sum().double() if cap is not None else torch.zeros((), dtype=torch.float64)
    return torch.stack(
        [
            torch.tensor(float(raw.numel()), dtype=torch.float64, device=raw.device),
            weights.sum(),
            weights.square().sum(),
            cut.to(raw.device),
            (torch.expm1(bounded) - log_ratio).sum(),
            log_ratio.abs().sum(),
        ]
    )


def mismatch_metrics(sums: Tensor) -> dict[str, float]:
    """What `mismatch_sums`, added up over ranks, say.

    ESS/B = (Σw)²/(B·Σw²), before the cut; KL(μ‖π) ≈ mean(e^ℓ − 1 − ℓ).
    """
    count, first, second, cut, kl, absolute = (float(x) for x in sums)
    if count == 0:
        return dict.fromkeys(MISMATCH_KEYS, 0.0) | {"mismatch/ess": 1.0}
    return {
        "mismatch/ess": first * first / (count * second) if second > 0 else 0.0,
        "mismatch/cut_fraction": cut / count,
        "mismatch/kl": kl / count,
        "mismatch/abs_logprob_difference": absolute / count,
    }


MISMATCH_KEYS = (
    "mismatch/ess",
    "mismatch/cut_fraction",
    "mismatch/kl",
    "mismatch/abs_logprob_difference",
)

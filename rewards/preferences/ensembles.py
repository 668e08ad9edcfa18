"""One reward from several members' (arXiv 2310.02743).

Legend: K members, N responses. The scale and the zero of a Bradley-Terry reward are arbitrary, so members are
standardised before they are combined. A bias that all members learned from the same labels is not removed by
any of the rules: they agree, and are wrong.
"""

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["mean", "worst", "uncertainty"]
RULES: tuple[Rule, ...] = ("mean", "worst", "uncertainty")


def standardise(scores: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(r_k − mean_k)/std_k. scores: (K, N); mean, std: (K,), each member's over the same responses."""
    assert scores.dim() == 2, "(K, N)"
    assert mean.shape == std.shape == scores.shape[:1]
    assert bool((std > 0).all()), "a member that gives every response the same reward has no scale"
    return (scores - mean[:, None]) / std[:, None]


def combine(scores: Tensor, rule: Rule, coefficient: float = 1.0) -> Tensor:
    """One reward a response, (N,), from standardised scores (K, N).

    mean: (1/K) Σ_k r_k. worst: min_k r_k. uncertainty: mean − λ·Var_k(r_k), with λ = `coefficient` and the
    variance Σ_k (r_k − mean)²/K.
    """
    assert scores.dim() == 2, "(K, N)"
    if rule == "mean":
        return scores.mean(dim=0)
    if rule == "worst":
        return scores.amin(dim=0)
    if rule == "uncertainty":
        return scores.mean(dim=0) - coefficient * scores.var(dim=0, correction=0)
    raise ValueError(f"ensemble rule = {rule!r}: choose one of {', '.join(RULES)}")


def disagreement(scores: Tensor) -> Tensor:
    """Standard deviation over the members, √(Σ_k (r_k − mean)²/K), of standardised scores (K, N); (N,)."""
    assert scores.dim() == 2, "(K, N)"
    return torch.std(scores, dim=0, correction=0)

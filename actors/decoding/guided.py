"""Guided decoding: the policy's next-token distribution, tilted by a score of each candidate prefix.

    π_g(a|s) ∝ π(a|s) · e^{w·score(s∘a)}   for a among the policy's k likeliest tokens, else 0

With score = a reward on prefixes this is ARGS (Khanov et al., arXiv 2402.01694); with score = a value,
controlled decoding (Mudgal et al., arXiv 2310.17022). With k = |V|, w = 1/β and the exact soft value
V*(s∘a), it is the optimum π* of E[r] − β·KL.

Legend: B rows, V vocabulary, k candidates.
"""

import torch
from torch import Tensor


def top_candidates(logits: Tensor, k: int) -> Tensor:
    """(B, k) ids of the likeliest tokens of (B, V) logits, likeliest first; all where k is beyond V."""
    return logits.topk(min(k, logits.shape[-1]), dim=-1).indices


def guided_logits(
    logits: Tensor, candidates: Tensor, scores: Tensor, weight: Tensor, temperature: Tensor
) -> Tensor:
    """(B, V) logits whose softmax at `temperature` is π_g; −inf outside the candidates.

    logits: (B, V) of the policy before the temperature; candidates, scores: (B, k); weight, temperature:
    (B,). A temperature of 0 stands for the best candidate: logit + w·score as at temperature 1.
    """
    assert logits.ndim == candidates.ndim == scores.ndim == 2
    assert candidates.shape == scores.shape
    assert weight.shape == temperature.shape == logits.shape[:1]
    scale = weight * torch.where(temperature > 0, temperature, torch.ones_like(temperature))
    chosen = logits.gather(-1, candidates) + (scale[:, None] * scores).to(logits.dtype)
    return torch.full_like(logits, float("-inf")).scatter(-1, candidates, chosen)

"""Estimators of KL(π‖π_ref) from tokens sampled from π, and the controller of its coefficient.

With δ = log π − log π_ref of the sampled token, all three have the expectation KL(π‖π_ref) or near it. They
differ in variance and, where a gradient flows through them, in what they descend: k1 inside the reward
trains here, k3 is logged. Source: Schulman, "Approximating KL divergence" (2020), joschu.net.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut off here before `exp`: e²⁰ ≈ 5·10⁸ is far beyond any use, and still finite squared."""


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """δ: unbiased, of either sign."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """δ²/2: biased, never negative; its gradient in a loss is that of KL(π‖π_ref), for one token."""
    return 0.5 * (logprobs - reference).square()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """e^{−δ} − 1 + δ: unbiased and never negative."""
    delta = logprobs - reference
    return torch.expm1((-delta).clamp(max=MAX_LOG_RATIO)) + delta


@dataclass(frozen=True, slots=True)
class KLController:
    """β and the rule by which it follows a target.

    β ← β·(1 + clip(KL/target − 1, ±0.2)·min(1, n/horizon)), with KL the mean *a sequence*, in nats, over n
    sequences. A horizon of `None` keeps β fixed. Source: Ziegler et al., arXiv 1909.08593, section 2.2; the
    cut of n/horizon at 1 is ours: a batch beyond the horizon moves β by a fifth at most, and never below 0.
    """

    coef: float
    target: float
    horizon: int | None

    def after(self, sequence_kl: float, sequences: int) -> "KLController":
        """The controller after a batch of `sequences` whose mean KL was `sequence_kl`."""
        if self.horizon is None:
            return self
        error = min(0.2, max(-0.2, sequence_kl / self.target - 1.0))
        share = min(1.0, sequences / self.horizon)
        return KLController(self.coef * (1.0 + error * share), self.target, self.horizon)

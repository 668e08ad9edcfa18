"""Estimators of KL(π‖π_ref) from tokens sampled from π, and the controller of its coefficient.

With δ = log π − log π_ref of the sampled token, all three have the expectation KL(π‖π_ref) or near it. They
differ in variance and, where they train, in what they descend: `gradient_caveat` says what. k1 inside the
reward is right; k3 is logged. Source: Schulman, "Approximating KL divergence" (2020), joschu.net.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
Place = Literal["reward", "loss"]

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


def estimate(kind: Estimator, logprobs: Tensor, reference: Tensor) -> Tensor:
    """The estimator that is named."""
    return {"k1": k1, "k2": k2, "k3": k3}[kind](logprobs, reference)


_LATER = "; it leaves out what a token does to the KL of those after it"
_CAVEATS: dict[tuple[Place, Estimator], str] = {
    ("reward", "k2"): "the expected gradient is that of the mean of Σ δ²/2 less, at each token, that of "
    "KL(π‖π_ref); near the reference it is of second order: there it hardly holds the policy back",
    ("reward", "k3"): "the expected gradient is that of KL(π‖π_ref) less, at each token, that of "
    "KL(π_ref‖π); near the reference it is of second order: there it hardly holds the policy back",
    ("loss", "k1"): "the expected gradient is 0: it adds noise and holds nothing back",
    ("loss", "k2"): "the gradient is that of KL(π‖π_ref) for one token" + _LATER,
    ("loss", "k3"): "the gradient is that of KL(π_ref‖π), the forward one, for one token" + _LATER,
}


def gradient_caveat(place: Place, kind: Estimator) -> str | None:
    """What the estimator descends there, in words, where it is not KL(π‖π_ref); δ = log π − log π_ref.

    In the loss the gradient is E[∇k] at the states s that π visits: E[∇log π] = 0 for k1, E[δ·∇log π] =
    ∇KL(π_s‖π_ref,s) for k2, −Σ π_ref ∇log π = ∇KL(π_ref,s‖π_s) for k3.

    Inside the reward k is a number: the gradient is that of the mean E_π[Σ_t k_t], in which a token also
    leads to later ones, less the part that runs through k itself, Σ_s d_π(s)·E_{π_s}[∇k] with the visits
    d_π(s) held fixed. The means of k1 and k3 are KL(π‖π_ref), that of k2 is E_π[Σ_t δ_t²/2]; E_{π_s}[∇k] is
    what k has in the loss. With k2 and k3 both parts have the same first order near the reference.
    """
    return _CAVEATS.get((place, kind))


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

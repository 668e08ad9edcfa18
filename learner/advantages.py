"""Token rewards, advantages, returns and whitening (methods: the token MDP and PPO).

Legend: B sequences, T the longest response; row b holds its response's tokens from the left, and `mask`
(B, T) is true on real tokens. What stands outside the mask is 0 in every result.
"""

import torch
from torch import Tensor


def token_rewards(sequence_rewards: Tensor, penalties: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """r_t = −β·k_t + 1[t = last]·R, with k an estimator of KL(π_old‖π_ref) from the sampled token.

    sequence_rewards: (B,); penalties (k), mask: (B, T); result (B, T). With k1 = log π_old − log π_ref, and
    with no other, the policy gradient is exactly that of KL(π‖π_ref): `learner.kl.gradient_caveat`. Source:
    Ziegler et al., arXiv 1909.08593.
    """
    assert penalties.shape == mask.shape
    assert sequence_rewards.shape == mask.shape[:1]
    assert bool(mask[:, 0].all()), "a sequence without a token has no last token"
    rewards = torch.where(mask, -kl_coef * penalties, torch.zeros_like(penalties))
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, sequence_rewards[:, None].to(rewards.dtype))


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, T): A_t = δ_t + γλ·A_{t+1} with δ_t = r_t + γ·V_{t+1} − V_t, and A + V.

    After a sequence's last token the value and the advantage are 0: the episode is over.
    Source: Schulman et al., arXiv 1506.02438.
    """
    assert rewards.shape == values.shape == mask.shape
    real = mask.to(values.dtype)
    values, rewards = values * real, rewards * real
    advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(advantage)
    columns: list[Tensor] = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * real[:, t]
        next_value = values[:, t]
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def rewards_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """A_t = Σ_{u ≥ t} γ^{u−t}·r_u, (B, T): the advantage of REINFORCE without a baseline.

    A token answers for its own KL penalty and those after it, not for those before. Source: Williams,
    "Simple statistical gradient-following algorithms" (1992).
    """
    advantages, _ = generalised_advantages(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    return advantages


def vtrace_targets(
    rewards: Tensor,
    values: Tensor,
    weights: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    rho_cap: float,
    c_cap: float,
) -> Tensor:
    """v, (B, T): targets of the value model from tokens of another policy; weights w = π/μ a token.

    v_t = V_t + δ_t + γ·c_t·(v_{t+1} − V_{t+1}) with δ_t = min(ρ̄, w_t)·(r_t + γ·V_{t+1} − V_t) and
    c_t = λ·min(c̄, w_t). Their fixed point is the value of a policy between μ and π (of π where ρ̄ = ∞);
    c̄ only sets the speed. At w = 1 and caps of 1, v − V is GAE(λ), and with λ = 1 v is the return.
    Source: Espeholt et al., arXiv 1802.01561, section 4.1 (λ in its remark 2).
    """
    assert rewards.shape == values.shape == weights.shape == mask.shape
    real = mask.to(values.dtype)
    values, rewards = values * real, rewards * real
    rho, trace = weights.clamp(max=rho_cap), gamma * lam * weights.clamp(max=c_cap)
    excess = torch.zeros_like(values[:, 0])  # v − V of the token after
    next_value = torch.zeros_like(excess)
    columns: list[Tensor] = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        excess = (rho[:, t] * delta + trace[:, t] * excess) * real[:, t]
        next_value = values[:, t]
        columns.append(excess)
    return torch.stack(columns[::-1], dim=1) + values


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """(3,) float64: count, sum and sum of squares over the mask; these add up over ranks."""
    chosen = values[mask].double()
    return torch.stack([mask.sum().double(), chosen.sum(), chosen.square().sum()])


def mean_and_std(total: Tensor) -> tuple[float, float]:
    """Mean and (population) standard deviation from added-up `moments`."""
    count, first, second = (float(x) for x in total)
    assert count > 0, "moments of nothing"
    mean = first / count
    return mean, max(0.0, second / count - mean * mean) ** 0.5


def whiten(values: Tensor, mask: Tensor, total: Tensor, *, shift_mean: bool) -> Tensor:
    """(x − m)/s, or x/s when the mean is to stay; `total` are the moments over *all* ranks.

    Advantages are shifted; rewards are not, since their mean says whether an episode was good at all.
    """
    mean, std = mean_and_std(total)
    scaled = (values - (mean if shift_mean else 0.0)) / (std + 1e-8)
    return torch.where(mask, scaled, torch.zeros_like(scaled))


def explained_variance(returns: Tensor, errors: Tensor) -> float:
    """1 − Var(R − V)/Var(R) from the `moments` of R and of R − V; 0 where the returns are all the same."""
    _, spread = mean_and_std(returns)
    _, error = mean_and_std(errors)
    return 1.0 - (error / spread) ** 2 if spread > 1e-6 else 0.0

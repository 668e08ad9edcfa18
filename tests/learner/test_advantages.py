"""Token rewards, GAE and whitening against numbers worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.advantages import (
    explained_variance,
    generalised_advantages,
    mean_and_std,
    moments,
    token_rewards,
    vtrace_targets,
    whiten,
)

# Two sequences, of 3 tokens and of 1.
MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_reward_falls_on_the_last_token_and_kl_on_every_one() -> None:
    # β = 0.1. Row 0: −0.1·(1, −2, 3), and R = 5 on the last: (−0.1, 0.2, −0.3 + 5).
    # Row 1: one token, so KL and reward meet there: −0.1·4 + 2; the 9s are padding.
    rewards = token_rewards(
        torch.tensor([5.0, 2.0]),
        torch.tensor([[1.0, -2.0, 3.0], [4.0, 9.0, 9.0]]),
        MASK,
        kl_coef=0.1,
    )
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 0.2, 4.7], [1.6, 0.0, 0.0]]))


def test_advantages_by_hand() -> None:
    # γ = 0.5, λ = 0.5. r = (1, 2, 3), V = (1, 2, 4), V after the end 0.
    # δ₂ = 3 + 0 − 4 = −1;  δ₁ = 2 + 0.5·4 − 2 = 2;  δ₀ = 1 + 0.5·2 − 1 = 1.
    # A₂ = −1;  A₁ = 2 + 0.25·(−1) = 1.75;  A₀ = 1 + 0.25·1.75 = 1.4375.
    # Row 1: r = 7, V = 3: A = 4. Padding holds rubbish that must not be read.
    rewards = torch.tensor([[1.0, 2.0, 3.0], [7.0, 50.0, 60.0]])
    values = torch.tensor([[1.0, 2.0, 4.0], [3.0, 70.0, 80.0]])
    advantages, returns = generalised_advantages(rewards, values, MASK, gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.4375, 1.75, -1.0], [4.0, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.4375, 3.75, 3.0], [7.0, 0.0, 0.0]]))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.floats(0.5, 1.0))
def test_lambda_one_is_return_minus_value_and_lambda_zero_is_delta(seed: int, gamma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (4,), generator=generator)
    mask = torch.arange(5)[None] < lengths[:, None]
    rewards = torch.randn(4, 5, generator=generator, dtype=torch.float64) * mask
    values = torch.randn(4, 5, generator=generator, dtype=torch.float64) * mask
    # The discounted sum of rewards to come, written out: Σ_{k ≥ t} γ^{k−t} r_k.
    to_come = torch.stack(
        [sum(gamma ** (k - t) * rewards[:, k] for k in range(t, 5)) for t in range(5)], dim=1
    )
    one, returns = generalised_advantages(rewards, values, mask, gamma=gamma, lam=1.0)
    torch.testing.assert_close(one, (to_come - values) * mask)
    torch.testing.assert_close(returns, to_come * mask)
    zero, _ = generalised_advantages(rewards, values, mask, gamma=gamma, lam=0.0)
    following = torch.cat([values[:, 1:], torch.zeros(4, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(zero, (rewards + gamma * following - values) * mask)


def test_vtrace_by_hand() -> None:
    # γ = 0.5, λ = 1, caps ρ̄ = 2 and c̄ = 1. r = (1, 2, 3), V = (1, 2, 4), w = (3, ½, 1).
    # TD errors as in the advantages above: 1, 2, −1. ρ = (2, ½, 1), c = (1, ½, 1).
    # e₂ = 1·(−1) = −1;  e₁ = ½·2 + 0.5·½·(−1) = 0.75;  e₀ = 2·1 + 0.5·1·0.75 = 2.375; v = V + e.
    # Row 1: r = 7, V = 3, w = ¼: v = 3 + ¼·4 = 4.
    targets = vtrace_targets(
        torch.tensor([[1.0, 2.0, 3.0], [7.0, 50.0, 60.0]]),
        torch.tensor([[1.0, 2.0, 4.0], [3.0, 70.0, 80.0]]),
        torch.tensor([[3.0, 0.5, 1.0], [0.25, 9.0, 9.0]]),
        MASK,
        gamma=0.5,
        lam=1.0,
        rho_cap=2.0,
        c_cap=1.0,
    )
    torch.testing.assert_close(targets, torch.tensor([[3.375, 2.75, 3.0], [4.0, 0.0, 0.0]]))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.floats(0.5, 1.0), lam=st.floats(0.0, 1.0))
def test_on_policy_vtrace_is_gae_to_the_last_bit(seed: int, gamma: float, lam: float) -> None:
    """At w = 1 and caps of at least 1, v − V = GAE(λ), and so at λ = 1 v is the return."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5)[None] < torch.randint(1, 6, (4, 1), generator=generator)
    rewards, values = torch.randn(2, 4, 5, generator=generator) * mask
    _, returns = generalised_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    targets = vtrace_targets(
        rewards, values, torch.ones(4, 5), mask, gamma=gamma, lam=lam, rho_cap=1.0, c_cap=1.0
    )
    assert torch.equal(targets, returns)


def test_vtrace_learns_the_value_of_the_learner_from_the_samplers_tokens() -> None:
    """One step, symbols with μ = (½, ½), π = (¼, ¾), R = (0, 1): w = (½, 3/2), and at V = ¾ = E_π[R] the mean
    change over μ is Σ μ·w·(R − V) = ½·½·(−¾) + ½·3/2·¼ = 0 with ρ̄ ≥ 3/2. With ρ̄ = 1 the fixed point is
    V = Σ min(μ, π)·R/Σ min(μ, π) = ½/¾ = 2/3, between E_μ[R] = ½ and ¾.
    """
    weights = torch.tensor([[0.5], [1.5]])
    rewards = torch.tensor([[0.0], [1.0]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    for cap, fixed_point in ((2.0, 3 / 4), (1.0, 2 / 3)):
        values = torch.full((2, 1), fixed_point)
        targets = vtrace_targets(rewards, values, weights, mask, gamma=1.0, lam=1.0, rho_cap=cap, c_cap=1.0)
        assert float((targets - values).mean()) == pytest.approx(0.0, abs=1e-6)


def test_whitening_by_hand() -> None:
    # Valid values 1, 3, 5, 7: mean 4, squares 9 + 1 + 1 + 9 over 4 = 5.
    values = torch.tensor([[1.0, 3.0, 5.0], [7.0, 99.0, 99.0]])
    total = moments(values, MASK)
    mean, std = mean_and_std(total)
    assert (mean, std) == pytest.approx((4.0, 5**0.5))
    shifted = whiten(values, MASK, total, shift_mean=True)
    torch.testing.assert_close(shifted[MASK] * 5**0.5, torch.tensor([-3.0, -1.0, 1.0, 3.0]))
    kept = whiten(values, MASK, total, shift_mean=False)
    torch.testing.assert_close(kept[MASK] * 5**0.5, torch.tensor([1.0, 3.0, 5.0, 7.0]))
    assert shifted[~MASK].eq(0).all()
    assert kept[~MASK].eq(0).all()


def test_moments_of_parts_add_up() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    whole = moments(values, MASK)
    parts = moments(values[:1], MASK[:1]) + moments(values[1:], MASK[1:])
    torch.testing.assert_close(whole, parts)


def test_explained_variance_by_hand() -> None:
    # R = 0, 2, 4 has variance 8/3; errors R − V = 1, 1, 1 have none: all is explained.
    # With V = 0 the errors are the returns: nothing is. With V = −R: errors 2R, 1 − 4 = −3.
    mask = torch.ones(1, 3, dtype=torch.bool)
    returns = torch.tensor([[0.0, 2.0, 4.0]])
    spread = moments(returns, mask)
    assert explained_variance(spread, moments(torch.ones(1, 3), mask)) == pytest.approx(1.0)
    assert explained_variance(spread, spread) == pytest.approx(0.0)
    assert explained_variance(spread, moments(2 * returns, mask)) == pytest.approx(-3.0)
    flat = moments(torch.ones(1, 3), mask)
    assert explained_variance(flat, spread) == 0.0

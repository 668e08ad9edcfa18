"""Samples of another policy: which weights give the learner's gradient, ESS, V-trace, the best baseline.

All by enumeration (`enumerable_lm`), in float64. μ sampled, π learns, w = π/μ of a token.
"""

import math

import pytest
import torch
from enumerable_lm import ENDING, FIXED, EnumerableLM, Listing, coverage_reward
from identities_helpers import advantages_of, ascent, cosine
from torch import Tensor

from learner.advantages import generalised_advantages, token_rewards, vtrace_targets
from learner.corrections import correct, raw_weights
from learner.mismatch import (
    effective_share,
    lag_sums,
    log_ratios,
    mismatch_metrics,
    sequence_sums,
    sequence_totals,
)
from learner.objectives import policy_loss
from learner.settings import CorrectionSettings

BOTH = pytest.mark.parametrize("listing", [FIXED, ENDING], ids=["fixed", "ending"])


def pair(listing: Listing, apart: float = 0.7) -> tuple[EnumerableLM, EnumerableLM]:
    """(π, μ), μ some way from π."""
    policy = EnumerableLM.random(1, listing=listing)
    noise = EnumerableLM.random(2, listing=listing, scale=apart)
    return policy, EnumerableLM((policy.logits + noise.logits).detach().requires_grad_(), listing)


def weights_of(policy: EnumerableLM, sampler: EnumerableLM, advantages: Tensor, kind: str) -> Tensor:
    """(N, T) by `correct`, nothing cut off."""
    ratios = log_ratios(policy.token_log_probs(), sampler.token_log_probs())
    chosen = CorrectionSettings.model_validate({"weights": kind, "cap": 1e12})
    return correct(ratios, policy.mask, advantages, chosen).weights.double()


# --- Weights ---------------------------------------------------------------------------------------------


@BOTH
def test_sequence_weights_are_exact(listing: Listing) -> None:
    """E_μ[W·Σ_t A_t·∇log π_t] is ∇E_π[R], with and without values as a baseline."""
    policy, sampler = pair(listing)
    reward = coverage_reward(listing)
    exact = policy.gradient(policy.expectation(reward))
    for values in (None, policy.values(reward)):
        advantages = advantages_of(policy, reward, values=values)
        weights = weights_of(policy, sampler, advantages, "sequence")
        found = ascent(policy, advantages, law=sampler.probs(), weights=weights)
        torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)
    # Without weights it is another gradient: that of μ's responses.
    plain = ascent(policy, advantages_of(policy, reward), law=sampler.probs())
    assert float((plain - exact).abs().max()) > 0.02


@BOTH
def test_token_weights_take_the_way_there_and_the_rest_from_the_sampler(listing: Listing) -> None:
    """They give Σ_s d^μ(s)·Σ_a ∇π(a|s)·Q^μ(s, a): visits and values are μ's, so the gradient is biased."""
    policy, sampler = pair(listing)
    reward = coverage_reward(listing)
    advantages = advantages_of(policy, reward)
    weights = weights_of(policy, sampler, advantages, "tis")
    found = ascent(policy, advantages, law=sampler.probs(), weights=weights)
    # Q^μ(s, a): the mean reward of μ's responses through s that go on with a, (S, V).
    totals = torch.zeros(2, listing.state_count * listing.tokens, dtype=torch.float64)
    places = (listing.states * listing.tokens + listing.sequences)[listing.mask]
    chances = sampler.probs()[:, None].expand(listing.mask.shape)
    totals[0].index_add_(0, places, chances[listing.mask])
    totals[1].index_add_(0, places, (chances * reward[:, None])[listing.mask])
    q = (totals[1] / totals[0].clamp(min=1e-300)).reshape(-1, listing.tokens)
    theirs = policy.gradient((sampler.visits() * (policy.table().exp() * q).sum(1)).sum())
    torch.testing.assert_close(found, theirs, atol=1e-6, rtol=0)
    exact = policy.gradient(policy.expectation(reward))
    assert float((found - exact).abs().max()) > 0.02
    assert cosine(found, exact) < 0.99


def test_the_spread_of_sequence_weights_grows_with_the_length_as_a_power() -> None:
    """Places alike and independent: E_μ[W²] = (E_μ[w²])^T; a token's weight has the same spread anywhere."""
    row, other = torch.tensor([0.7, 0.1, 0.1, 0.1]).double().log(), torch.full((4,), 0.25).double().log()
    one = float((row.exp().square() / other.exp()).sum())
    for places in (1, 3, 6):
        listing = Listing(4, places)
        policy = EnumerableLM.factorised(row.expand(places, 4), listing)
        sampler = EnumerableLM.factorised(other.expand(places, 4), listing)
        weights = raw_weights(log_ratios(policy.log_probs(), sampler.log_probs()))
        assert float(sampler.probs() @ weights) == pytest.approx(1.0)
        assert float(sampler.probs() @ weights.square()) == pytest.approx(one**places)


# --- How far apart ---------------------------------------------------------------------------------------


@BOTH
def test_effective_share_is_one_over_one_plus_chi_squared(listing: Listing) -> None:
    policy, sampler = pair(listing)
    weights = raw_weights(log_ratios(policy.log_probs(), sampler.log_probs()))
    mu, p = sampler.probs(), policy.probs()
    chi_squared = float((p.square() / mu).sum()) - 1
    share = effective_share(1.0, float(mu @ weights), float(mu @ weights.square()))
    assert share == pytest.approx(1 / (1 + chi_squared), abs=1e-9)


def test_what_is_logged_of_samples_in_proportion_to_the_sampler() -> None:
    """μ uniform: each of the 4096 responses once. E_μ[k] of a response is KL(μ‖π), added up over 6 tokens."""
    sampler = EnumerableLM(torch.zeros(1365, 4, dtype=torch.float64))
    policy = EnumerableLM.random(5)
    ratios = log_ratios(policy.token_log_probs(), sampler.token_log_probs())
    log_weights, _ = sequence_totals(ratios, policy.mask)
    largest = float(log_weights.max())
    sums = lag_sums(ratios, policy.mask, torch.zeros(4096, 6, dtype=torch.long), lag_count=1)
    found = mismatch_metrics(sums, sequence_sums(log_weights, largest), float(ratios.abs().max()))
    assert found["mismatch/weight_mean"] == pytest.approx(1.0, abs=1e-9)
    assert 6 * found["mismatch/kl"] == pytest.approx(float(sampler.kl(policy)), abs=1e-9)
    p, mu = policy.probs(), sampler.probs()
    assert found["mismatch/sequence_ess"] == pytest.approx(1 / float((p.square() / mu).sum()), abs=1e-9)
    # Of a token: χ² of the state, at μ's visits, averaged over the 6 places.
    by_state = (policy.table().exp().square() / 0.25).sum(1)
    mean = float((sampler.visits() * by_state).sum()) / 6
    assert found["mismatch/ess"] == pytest.approx(1 / mean, abs=1e-9)


# --- V-trace ---------------------------------------------------------------------------------------------


def traced(
    policy: EnumerableLM,
    sampler: EnumerableLM,
    rewards: Tensor,
    values: Tensor,
    *,
    lam: float = 1.0,
    caps: tuple[float, float] = (math.inf, math.inf),
) -> Tensor:
    """(S,): E_μ[v − V | s] for values (S,), from `vtrace_targets` along every response."""
    listing, mask = policy.listing, policy.mask
    weights = raw_weights(log_ratios(policy.token_log_probs(), sampler.token_log_probs()))
    by_token = token_rewards(rewards, torch.zeros(mask.shape).double(), mask, kl_coef=0.0)
    along = values[listing.states]
    targets = vtrace_targets(
        by_token, along, weights, mask, gamma=1.0, lam=lam, rho_cap=caps[0], c_cap=caps[1]
    )
    change = (targets - along)[mask] * sampler.probs()[:, None].expand(mask.shape)[mask]
    total = torch.zeros(listing.state_count, dtype=torch.float64).index_add(0, listing.states[mask], change)
    visits = sampler.visits()
    return torch.where(visits > 0, total / visits.clamp(min=1e-300), 0.0)


@BOTH
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_on_policy_vtrace_is_gae(listing: Listing, lam: float) -> None:
    """w = 1 and caps of 1: c = λ, v − V = GAE(λ); at λ = 1, v is the return, here R."""
    reward, mask = coverage_reward(listing), listing.mask
    values = torch.randn(listing.state_count, generator=torch.Generator().manual_seed(3)).double()
    along = values[listing.states]
    by_token = token_rewards(reward, torch.zeros(mask.shape).double(), mask, kl_coef=0.0)
    ones = torch.ones(mask.shape).double()
    targets = vtrace_targets(by_token, along, ones, mask, gamma=1.0, lam=lam, rho_cap=1.0, c_cap=1.0)
    advantages, _ = generalised_advantages(by_token, along, mask, gamma=1.0, lam=lam)
    torch.testing.assert_close((targets - along)[mask], advantages[mask], atol=1e-12, rtol=0)
    if lam == 1.0:
        torch.testing.assert_close(targets[mask], reward[:, None].expand(mask.shape)[mask])


@BOTH
def test_without_caps_vtrace_has_the_learners_values_as_its_mean_whatever_the_critic_says(
    listing: Listing,
) -> None:
    policy, sampler = pair(listing)
    reward = coverage_reward(listing)
    values = torch.randn(listing.state_count, generator=torch.Generator().manual_seed(4)).double()
    passed = sampler.visits() > 0
    found = values + traced(policy, sampler, reward, values)
    torch.testing.assert_close(found[passed], policy.values(reward)[passed], atol=1e-9, rtol=0)


@BOTH
@pytest.mark.parametrize("rho_cap", [0.5, 1.0, 2.0])
def test_capped_vtrace_rests_at_a_policy_between(listing: Listing, rho_cap: float) -> None:
    """Fixed point: the values of π_ρ̄ ∝ min(ρ̄·μ, π), whatever λ and c̄ are; those of π once ρ̄ ≥ max w."""
    policy, sampler = pair(listing)
    reward = coverage_reward(listing)
    between = torch.minimum(math.log(rho_cap) + sampler.table(), policy.table()).detach()
    values = EnumerableLM(between, listing).values(reward)
    for lam, c_cap in ((1.0, 1.0), (0.5, 2.0)):
        change = traced(policy, sampler, reward, values, lam=lam, caps=(rho_cap, c_cap))
        assert float(change.abs().max()) < 1e-9
    assert (
        float(traced(policy, sampler, reward, policy.values(reward), caps=(rho_cap, 1.0)).abs().max()) > 0.01
    )
    uncapped = traced(policy, sampler, reward, policy.values(reward), caps=(1e9, 1.0))
    assert float(uncapped.abs().max()) < 1e-9


# --- Baselines -------------------------------------------------------------------------------------------


def test_the_baseline_of_least_variance_is_the_mean_reward_weighted_with_squared_gradients() -> None:
    """Var(b) of w·(R − b)·∇log π(y) over μ is a parabola with its lowest point at Σw²‖g‖²R / Σw²‖g‖².

    Each response's gradient comes from `policy_loss` by itself; none of the baselines moves the mean.
    """
    listing = Listing(4, 3)
    policy, sampler = pair(listing)
    reward = coverage_reward(Listing(4, 3))
    mu = sampler.probs()
    weight = raw_weights(log_ratios(policy.log_probs(), sampler.log_probs()))
    scores = []
    for number in range(len(mu)):
        logprobs = policy.token_log_probs()[number]
        loss, _ = policy_loss(
            logprobs,
            logprobs.detach(),
            torch.ones(3).double(),
            weight[number].expand(3),
            clip=0.2,
            dual_clip=None,
            count=1.0,
        )
        scores.append(-policy.gradient(loss).flatten())
    weighted = torch.stack(scores)  # w·∇log π(y), (N, S·V)
    squares = mu * weighted.square().sum(1)
    best = float((squares * reward).sum() / squares.sum())
    exact = policy.gradient(policy.expectation(reward)).flatten()

    def variance(baseline: float) -> float:
        each = (reward - baseline)[:, None] * weighted
        mean = mu @ each
        torch.testing.assert_close(mean, exact, atol=1e-9, rtol=0)
        return float(mu @ (each - mean).square().sum(1))

    mean = float(policy.expectation(reward))
    assert variance(best) < variance(mean) < variance(0.0)
    # The lowest point of the parabola through three others.
    low, middle, high = variance(best - 1.0), variance(best), variance(best + 1.0)
    assert low == pytest.approx(high, rel=1e-9)
    assert middle < low

"""What PPO's parts descend, exactly: KL estimators by their place, advantages by λ, value targets.

All by enumeration (`enumerable_lm`), in float64. δ = log π − log π_ref.
"""

from collections.abc import Callable

import pytest
import torch
from enumerable_lm import ENDING, FIXED, EnumerableLM, Listing, coverage_reward
from identities_helpers import advantages_of, advantages_of_a_step, ascent
from torch import Tensor

from learner.advantages import generalised_advantages, token_rewards
from learner.kl import k1, k2, k3
from learner.objectives import entropy_bonus, value_loss

Estimator = Callable[[Tensor, Tensor], Tensor]

BOTH = pytest.mark.parametrize("listing", [FIXED, ENDING], ids=["fixed", "ending"])


def pair(listing: Listing) -> tuple[EnumerableLM, EnumerableLM]:
    """A policy and its reference."""
    return EnumerableLM.random(1, listing=listing), EnumerableLM.random(2, listing=listing)


def in_loss(estimator: Estimator, policy: EnumerableLM, reference: EnumerableLM, *, whole: bool) -> Tensor:
    """∇ of E[Σ estimator] with the gradient through the estimator only, as when samples are given.

    `whole`: of δ of the response, as if it were one decision; else of δ of each token, added up.
    """
    mine, theirs = policy.token_log_probs(), reference.token_log_probs().detach()
    if whole:
        terms = estimator(mine.sum(1), theirs.sum(1))
    else:
        terms = torch.where(policy.mask, estimator(mine, theirs), 0.0).sum(1)
    return policy.gradient((policy.probs() * terms).sum())


def in_reward(estimator: Estimator, policy: EnumerableLM, reference: EnumerableLM) -> Tensor:
    """∇ of E[estimator of a response's δ], the estimator a reward to be lowered, through the policy loss."""
    mine, theirs = policy.log_probs().detach(), reference.log_probs().detach()
    return -ascent(policy, advantages_of(policy, -estimator(mine, theirs)))


# --- KL estimators ---------------------------------------------------------------------------------------


@BOTH
def test_k1_and_k3_estimate_kl_without_bias_k2_does_not(listing: Listing) -> None:
    policy, reference = pair(listing)
    exact, p = float(policy.kl(reference)), policy.probs()
    mine, theirs = policy.log_probs().detach(), reference.log_probs().detach()
    assert float(p @ k1(mine, theirs)) == pytest.approx(exact, abs=1e-9)
    assert float(p @ k3(mine, theirs)) == pytest.approx(exact, abs=1e-9)
    assert abs(float(p @ k2(mine, theirs)) - exact) > 0.1
    # Token by token as well: the KL of a response is the sum of its tokens' KL, for both.
    tokens, reference_tokens = policy.token_log_probs().detach(), reference.token_log_probs().detach()
    for estimator in (k1, k3):
        by_token = torch.where(listing.mask, estimator(tokens, reference_tokens), 0.0).sum(1)
        assert float(p @ by_token) == pytest.approx(exact, abs=1e-9)


@BOTH
def test_estimators_of_one_decision_as_losses(listing: Listing) -> None:
    """k1: nothing. k2: ∇KL(π‖ref). k3: ∇KL(ref‖π), the other direction."""
    policy, reference = pair(listing)
    backward = policy.gradient(policy.kl(reference))
    forward = policy.gradient(reference.kl(policy))
    nothing = in_loss(k1, policy, reference, whole=True)
    assert float(nothing.abs().max()) < 1e-12
    torch.testing.assert_close(in_loss(k2, policy, reference, whole=True), backward, atol=1e-9, rtol=0)
    torch.testing.assert_close(in_loss(k3, policy, reference, whole=True), forward, atol=1e-9, rtol=0)
    assert float((forward - backward).abs().max()) > 0.01


@BOTH
def test_estimators_as_rewards(listing: Listing) -> None:
    """k1: ∇KL(π‖ref). k3: ∇[KL(π‖ref) − KL(ref‖π)], which near ref is of second order."""
    policy, reference = pair(listing)
    backward = policy.gradient(policy.kl(reference))
    forward = policy.gradient(reference.kl(policy))
    torch.testing.assert_close(in_reward(k1, policy, reference), backward, atol=1e-9, rtol=0)
    torch.testing.assert_close(in_reward(k3, policy, reference), backward - forward, atol=1e-9, rtol=0)
    # π = ref + h·direction: the gradient of k1 is in proportion to h, that of k3 to h².
    sizes = []
    for h in (1e-2, 5e-3):
        near = EnumerableLM((reference.logits + h * policy.logits).detach().requires_grad_(), listing)
        sizes.append([float(in_reward(k, near, reference).norm()) for k in (k1, k3)])
    assert sizes[0][0] / sizes[1][0] == pytest.approx(2.0, rel=0.05)
    assert sizes[0][1] / sizes[1][1] == pytest.approx(4.0, rel=0.05)


@BOTH
def test_k1_in_the_token_rewards_is_exact_over_six_tokens(listing: Listing) -> None:
    """`token_rewards` with R = 0, reward-to-go, policy loss: −β·∇KL(π‖ref)."""
    policy, reference = pair(listing)
    nothing, theirs = torch.zeros(len(listing.sequences)).double(), reference.token_log_probs().detach()
    found = ascent(policy, advantages_of(policy, nothing, reference=theirs, beta=0.3))
    exact = policy.gradient(policy.kl(reference))
    torch.testing.assert_close(found, -0.3 * exact, atol=1e-9, rtol=0)


@BOTH
def test_k2_and_k3_in_the_token_rewards_are_the_gradient_of_their_mean_less_that_through_themselves(
    listing: Listing,
) -> None:
    """A learner's step with R = 0 ascends −β·(∇E_π[Σ_t k_t] − Σ_s d(s)·E_{π_s}[∇k]), visits d held fixed.

    The means are E_π[Σ_t δ_t²/2] for k2 and KL(π‖ref) for k1 and k3. E_{π_s}[∇k] is 0 for k1, E[δ·∇log π] =
    ∇KL(π_s‖ref_s) for k2 and −E[e^{−δ}·∇log π] + E[∇log π] = ∇KL(ref_s‖π_s) for k3.
    """
    policy, reference = pair(listing)
    nothing, along = torch.zeros(len(listing.sequences)).double(), reference.token_log_probs().detach()
    mine, theirs, visits = policy.table(), reference.table().detach(), policy.visits()
    tokens = policy.token_log_probs()
    divergence = policy.kl(reference)
    halves = torch.where(listing.mask, k2(tokens, along), 0.0).sum(1)
    backward = (visits * (mine.exp() * (mine - theirs)).sum(1)).sum()
    forward = (visits * (theirs.exp() * (theirs - mine)).sum(1)).sum()
    expected = {
        "k1": divergence,
        "k2": policy.expectation(halves) - backward,
        "k3": divergence - forward,
    }
    for name, ascended in expected.items():
        advantages = advantages_of_a_step(policy, nothing, reference=along, beta=0.3, estimator=name)
        exact = policy.gradient(ascended, keep=True)
        torch.testing.assert_close(ascent(policy, advantages), -0.3 * exact, atol=1e-9, rtol=0)
    # Neither is the gradient of KL(π‖ref), and near ref both are of second order.
    sizes: list[list[float]] = []
    for h in (1e-2, 5e-3):
        near = EnumerableLM((reference.logits + h * policy.logits).detach().requires_grad_(), listing)
        steps = [
            advantages_of_a_step(near, nothing, reference=along, beta=1.0, estimator=name)
            for name in expected
        ]
        sizes.append([float(ascent(near, step).norm()) for step in steps])
    ratios = [first / second for first, second in zip(*sizes, strict=True)]
    assert ratios == pytest.approx([2.0, 4.0, 4.0], rel=0.05)


@BOTH
def test_token_losses_of_k2_and_k3_leave_out_where_a_token_leads(listing: Listing) -> None:
    """They descend Σ_s d(s)·KL_s with the visits d(s) held fixed, of π_s to ref_s for k2 and of ref_s to π_s
    for k3. ∇KL(π‖ref) has the later tokens' KL besides; only states of the last place have none.
    """
    policy, reference = pair(listing)
    mine, theirs, visits = policy.table(), reference.table().detach(), policy.visits()
    backward = (visits * (mine.exp() * (mine - theirs)).sum(1)).sum()
    forward = (visits * (theirs.exp() * (theirs - mine)).sum(1)).sum()
    by_k2, by_k3 = (in_loss(k, policy, reference, whole=False) for k in (k2, k3))
    torch.testing.assert_close(by_k2, policy.gradient(backward, keep=True), atol=1e-9, rtol=0)
    torch.testing.assert_close(by_k3, policy.gradient(forward), atol=1e-9, rtol=0)
    assert float(in_loss(k1, policy, reference, whole=False).abs().max()) < 1e-12
    exact = policy.gradient(policy.kl(reference))
    last = listing.place_of_state == listing.places - 1
    torch.testing.assert_close(by_k2[last], exact[last], atol=1e-9, rtol=0)
    assert float((by_k2 - exact)[~last].abs().max()) > 0.01


def test_the_entropy_bonus_leaves_it_out_too() -> None:
    """Its gradient is that of Σ_s d(s)·H(π_s) with d held fixed, not of the response's entropy."""
    policy = EnumerableLM.random(1, listing=ENDING)
    table, mask = policy.table(), policy.mask
    by_state = -(table.exp() * table).sum(1)
    chances = policy.probs()[:, None].expand(mask.shape)[mask]
    loss, _ = entropy_bonus(chances * by_state[policy.listing.states[mask]], count=1.0)
    assert float(-loss) == pytest.approx(float(policy.entropy()), abs=1e-9)  # the value is that of H
    found = policy.gradient(-loss, keep=True)
    torch.testing.assert_close(found, policy.gradient((policy.visits() * by_state).sum()), atol=1e-9, rtol=0)
    assert float((found - policy.gradient(policy.entropy())).abs().max()) > 0.01


# --- Advantages and values -------------------------------------------------------------------------------


@BOTH
def test_lambda_one_is_reward_less_value_and_lambda_zero_the_one_step_error(listing: Listing) -> None:
    policy, reward = EnumerableLM.random(3, listing=listing), coverage_reward(listing)
    values = torch.randn(listing.state_count, generator=torch.Generator().manual_seed(0)).double()
    along = torch.where(listing.mask, values[listing.states], 0.0)
    one = advantages_of(policy, reward, values=values, lam=1.0)
    torch.testing.assert_close(one, torch.where(listing.mask, reward[:, None] - along, 0.0))
    following = torch.cat([along[:, 1:], torch.zeros(len(along), 1).double()], dim=1)
    last = torch.arange(listing.places) == listing.lengths[:, None] - 1
    delta = torch.where(last, reward[:, None], following) - along
    zero = advantages_of(policy, reward, values=values, lam=0.0)
    torch.testing.assert_close(zero, torch.where(listing.mask, delta, 0.0))


@BOTH
def test_values_are_a_baseline_at_lambda_one_and_must_be_right_below_it(listing: Listing) -> None:
    """λ = 1: ∇E[R] with any values of the prefix. λ < 1: with V^π, not with others."""
    policy, reward = EnumerableLM.random(3, listing=listing), coverage_reward(listing)
    exact = policy.gradient(policy.expectation(reward))
    wrong = torch.randn(listing.state_count, generator=torch.Generator().manual_seed(1)).double()
    right = policy.values(reward)
    for values, lam in ((wrong, 1.0), (right, 1.0), (right, 0.95), (right, 0.0)):
        found = ascent(policy, advantages_of(policy, reward, values=values, lam=lam))
        torch.testing.assert_close(found, exact, atol=1e-9, rtol=0)
    biased = ascent(policy, advantages_of(policy, reward, values=wrong, lam=0.5))
    assert float((biased - exact).abs().max()) > 0.01


@BOTH
@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_the_value_loss_is_at_rest_at_the_values_of_the_policy(listing: Listing, lam: float) -> None:
    """Returns A + V, expected over the responses through each state: the gradient is 0 at V^π, at any λ."""
    policy, reward, mask = EnumerableLM.random(4, listing=listing), coverage_reward(listing), listing.mask
    chances = policy.probs()[:, None].expand(mask.shape)[mask].sqrt()
    by_token = token_rewards(reward, torch.zeros(mask.shape).double(), mask, kl_coef=0.0)

    def gradient(values: Tensor) -> Tensor:
        leaf = values.clone().requires_grad_()
        _, returns = generalised_advantages(by_token, values[listing.states], mask, gamma=1.0, lam=lam)
        # √p on both sides of the square is p in front of it.
        predicted, target = leaf[listing.states][mask] * chances, returns[mask] * chances
        loss, _ = value_loss(predicted, predicted.detach(), target, clip=None, count=1.0)
        (found,) = torch.autograd.grad(loss, leaf)
        return found

    right = policy.values(reward)
    assert float(gradient(right).abs().max()) < 1e-10
    assert float(gradient(right + 0.1).abs().max()) > 0.001

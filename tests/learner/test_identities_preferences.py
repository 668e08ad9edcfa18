"""Preference objectives over the whole population: their optima, and what their first step is.

All by enumeration (`enumerable_lm`), in float64: every ordered pair of responses counts by its chance to be
drawn and to be labelled that way round. h = log π − log π_ref.
"""

import math

import pytest
import torch
from enumerable_lm import ENDING, EnumerableLM, Listing, coverage_reward, distinct_reward, groups_of_levels
from identities_helpers import advantages_of, ascent
from torch import Tensor

from learner.batch import Sample
from learner.online_dpo import label_groups
from learner.preference_objectives import dpo_loss, ipo_loss
from rewards.preferences.evaluation import within_prompt_spearman

BETA = 0.4


def pairs(count: int) -> tuple[Tensor, Tensor]:
    """All ordered pairs of responses."""
    rows = torch.arange(count)
    return rows.repeat_interleave(count), rows.repeat(count)


def labelled(chances: Tensor, preferred: Tensor) -> Tensor:
    """(N²,) chances of "i chosen over j": drawn as (i, j) or (j, i), and P(i ≻ j) decides; both (N, N)."""
    return ((chances + chances.T) * preferred).flatten()


def pair_laws(count: int) -> dict[str, Tensor]:
    """Three distributions of pairs with full support; the last is not a product."""
    generator = torch.Generator().manual_seed(0)
    peaked = torch.softmax(2 * torch.randn(count, generator=generator, dtype=torch.float64), 0)
    entangled = torch.rand(count, count, generator=generator, dtype=torch.float64) + 0.1
    return {
        "uniform": torch.full((count, count), 1 / count**2, dtype=torch.float64),
        "peaked": torch.outer(peaked, peaked),
        "entangled": entangled / entangled.sum(),
    }


def bradley_terry_labels(reward: Tensor) -> Tensor:
    """P(i ≻ j) = σ(r_i − r_j), (N, N)."""
    return torch.sigmoid(reward[:, None] - reward[None, :])


def heights(policy: EnumerableLM, reference: EnumerableLM) -> Tensor:
    """h of every response, (N,)."""
    return policy.log_probs() - reference.log_probs().detach()


@pytest.mark.parametrize("law", ["uniform", "peaked", "entangled"])
def test_dpo_under_bradley_terry_rests_at_the_tilted_reference(law: str) -> None:
    """π* = π_ref·e^{r/β}/Z whatever pairs were shown: the gradient is 0 there, and not at another β's π*."""
    reference, reward = EnumerableLM.random(1, listing=ENDING), coverage_reward(ENDING)
    first, second = pairs(len(reward))
    weight = labelled(pair_laws(len(reward))[law], bradley_terry_labels(reward))
    assert float(weight.sum()) == pytest.approx(1.0)

    def gradient(policy: EnumerableLM) -> Tensor:
        h = heights(policy, reference)
        return policy.gradient(dpo_loss(h[first], h[second], beta=BETA, weight=weight, count=1.0))

    assert float(gradient(reference.optimum(reward, BETA)).abs().max()) < 1e-10
    assert float(gradient(reference.optimum(reward, 1.3 * BETA)).abs().max()) > 1e-4
    assert float(gradient(reference).abs().max()) > 1e-3


def test_dpo_finds_that_optimum_from_the_reference() -> None:
    """9 responses of two tokens: L-BFGS on the logits ends at π_ref·e^{r/β}/Z; the loss is convex in h."""
    small = Listing(3, 2)
    reference, reward = EnumerableLM.random(2, listing=small), distinct_reward(small, 0, scale=0.5)
    first, second = pairs(9)
    weight = labelled(pair_laws(9)["entangled"], bradley_terry_labels(reward))
    logits = reference.logits.detach().clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        h = heights(EnumerableLM(logits, small), reference)
        loss = dpo_loss(h[first], h[second], beta=BETA, weight=weight, count=1.0)
        loss.backward()
        return loss

    solver.step(closure)
    law, _ = reference.tilted(reward, BETA)
    torch.testing.assert_close(EnumerableLM(logits, small).log_probs(), law, atol=1e-6, rtol=0)


def test_the_implicit_reward_is_the_reward_less_beta_log_z() -> None:
    """β·h = r − β·log Z, so that within a prompt the order is the reward's own."""
    reference, reward = EnumerableLM.random(1, listing=ENDING), distinct_reward(ENDING, 1)
    _, log_z = reference.tilted(reward, BETA)
    implicit = (BETA * heights(reference.optimum(reward, BETA), reference)).detach()
    torch.testing.assert_close(implicit, reward - BETA * log_z, atol=1e-9, rtol=0)
    found = within_prompt_spearman(implicit.numpy(), reward.numpy(), ["one"] * len(reward))
    assert found is not None
    assert found.value == pytest.approx(1.0, abs=1e-12)


def test_dpo_begins_at_log_two_and_moves_by_half_beta() -> None:
    reference = EnumerableLM.random(3, listing=ENDING)
    policy = EnumerableLM(reference.logits.detach().clone().requires_grad_(), ENDING)
    chosen, rejected = ENDING.row([1, 2, 0]), ENDING.row([3, 0])
    h = heights(policy, reference)
    loss = dpo_loss(h[[chosen]], h[[rejected]], beta=BETA)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-12)
    logprobs = policy.log_probs()
    expected = -BETA / 2 * policy.gradient(logprobs[chosen] - logprobs[rejected], keep=True)
    torch.testing.assert_close(policy.gradient(loss), expected, atol=1e-12, rtol=0)


def test_on_fresh_samples_the_first_step_of_dpo_follows_the_chance_to_win() -> None:
    """π = π_ref, both responses of π, labels by σ(Δr): −∇loss = 2β·∇E_π[P(y ≻ π)], π on the right held fixed.

    For i, j drawn alike, E[∇ log π_w − ∇ log π_l] = Σ π_i·π_j·(2σ_ij − 1)·(∇_i − ∇_j) = 4·Σ π_i·∇_i·P(i ≻ π),
    since Σ π_i·∇_i = 0; the loss gives −β/2 of it.
    """
    reference, reward = EnumerableLM.random(4, listing=ENDING), coverage_reward(ENDING)
    policy = EnumerableLM(reference.logits.detach().clone().requires_grad_(), ENDING)
    first, second = pairs(len(reward))
    p, wins = policy.probs(), bradley_terry_labels(reward)
    weight = labelled(torch.outer(p, p), wins)
    h = heights(policy, reference)
    loss = dpo_loss(h[first], h[second], beta=BETA, weight=weight, count=1.0)
    found = -policy.gradient(loss, keep=True)
    by_policy_gradient = ascent(policy, advantages_of(policy, wins @ p))
    torch.testing.assert_close(found, 2 * BETA * by_policy_gradient, atol=1e-9, rtol=0)


def test_labelled_by_a_reward_the_first_step_of_online_dpo_follows_the_chance_to_score_higher() -> None:
    """Groups of 2 from π = π_ref, the better chosen, ties without a pair, β/2 of ∇ log π_best − ∇ log π_worst
    for each: 2β·∇E_π[P(r > r') + ½P(r = r')], r' of π held fixed. Only the order of rewards counts.
    """
    policy, reward = EnumerableLM.random(4, listing=ENDING), coverage_reward(ENDING)
    p = policy.probs()
    ahead = (reward[:, None] > reward[None, :]).double() + 0.5 * (reward[:, None] == reward[None, :])
    exact = 2 * BETA * policy.gradient(policy.expectation(ahead @ p))
    for transformed in (reward, reward.exp()):
        groups, chances, levels = groups_of_levels(p, transformed, 2)
        samples = [
            Sample((1,), (1,), (0.0,), (0.0,), (0,), reward=float(levels[level]), finished=True, group=number)
            for number, group in enumerate(groups)
            for level in group
        ]
        moved = torch.zeros(len(levels), dtype=torch.float64)
        for best, worst in label_groups(samples, 0.0):
            number = samples[best].group
            assert samples[worst].group == number
            moved[groups.flatten()[best]] += chances[number]
            moved[groups.flatten()[worst]] -= chances[number]
        _, level = torch.unique(transformed, return_inverse=True)
        mass = torch.zeros(len(levels), dtype=torch.float64).index_add(0, level, p)
        advantages = torch.where(ENDING.mask, (BETA / 2 * moved / mass)[level][:, None], 0.0)
        torch.testing.assert_close(ascent(policy, advantages), exact, atol=1e-9, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chance", [0.6, 0.9])
def test_two_responses_dpo_by_the_log_odds_ipo_by_the_odds(chance: float, smoothing: float) -> None:
    """DPO: Δh = logit((1 − 2ε)·p + ε)/β. IPO: Δh = (2p − 1)/(2τ), finite also where p = 1."""
    weight = torch.tensor([chance, 1 - chance], dtype=torch.float64)
    flat = (1 - 2 * smoothing) * chance + smoothing
    gap = torch.tensor(math.log(flat / (1 - flat)) / BETA, dtype=torch.float64, requires_grad=True)
    ahead = torch.stack([gap, torch.zeros_like(gap)])
    loss = dpo_loss(ahead, ahead.flip(0), beta=BETA, label_smoothing=smoothing, weight=weight)
    assert abs(float(torch.autograd.grad(loss, gap)[0])) < 1e-12
    for p in (chance, 1.0):
        gap = torch.tensor((2 * p - 1) / (2 * BETA), dtype=torch.float64, requires_grad=True)
        ahead = torch.stack([gap, torch.zeros_like(gap)])
        weight = torch.tensor([p, 1 - p], dtype=torch.float64)
        loss = ipo_loss(ahead, ahead.flip(0), tau=BETA, weight=weight)
        assert abs(float(torch.autograd.grad(loss, gap)[0])) < 1e-12


@pytest.mark.parametrize("labels", ["bradley-terry", "cyclic"])
def test_ipo_rests_where_the_reference_is_tilted_by_the_chance_to_win(labels: str) -> None:
    """Pairs of μ × μ: π* = π_ref·e^{P(y ≻ μ)/τ}/Z for any preferences, also those that no reward explains."""
    reference, tau = EnumerableLM.random(5, listing=ENDING), 0.3
    mu = EnumerableLM.random(6, listing=ENDING).probs()
    wins = bradley_terry_labels(coverage_reward(ENDING))
    if labels == "cyclic":  # a third of the responses beats the next third, which beats the last: no order
        kind = torch.arange(len(mu)) % 3
        wins = 0.5 + 0.3 * torch.sin(2 * math.pi / 3 * (kind[None, :] - kind[:, None])).double()
        torch.testing.assert_close(wins + wins.T, torch.ones_like(wins))
    first, second = pairs(len(mu))
    weight = labelled(torch.outer(mu, mu), wins)

    def gradient(policy: EnumerableLM) -> Tensor:
        h = heights(policy, reference)
        return policy.gradient(ipo_loss(h[first], h[second], tau=tau, weight=weight, count=1.0))

    assert float(gradient(reference.optimum(wins @ mu, tau)).abs().max()) < 1e-10
    assert float(gradient(reference).abs().max()) > 1e-3

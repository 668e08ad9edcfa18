"""The token MDP: a response is a path, its reward falls at the end, and token and sequence optimum are one.

All by enumeration (`enumerable_lm`), in float64.
"""

import itertools
import math

import pytest
import torch
from enumerable_lm import (
    ENDING,
    FIXED,
    EnumerableLM,
    Listing,
    best_of_n_by_listing,
    best_of_n_law,
    coverage_reward,
    distinct_reward,
    jensen_shannon,
    kl,
)
from identities_helpers import advantages_of, ascent
from torch import Tensor

from actors.records import Completion, Group, Prompt, Trajectory
from learner.advantages import token_rewards
from learner.batch import flatten, make_share
from learner.kl import k1

BOTH = pytest.mark.parametrize("listing", [FIXED, ENDING], ids=["fixed", "ending"])


# --- The model itself ------------------------------------------------------------------------------------


def test_what_the_listings_hold() -> None:
    assert FIXED.sequences.shape == (4096, 6)
    assert FIXED.sequences.unique(dim=0).shape == (4096, 6)
    # 3^t responses have t other tokens before the end, 1 + 3 + 9 + 27 + 81 + 243 = 364; 3^6 = 729 have none.
    assert len(ENDING.sequences) == 364 + 729
    assert int(ENDING.finished.sum()) == 364
    assert ENDING.lengths.bincount().tolist() == [0, 1, 3, 9, 27, 81, 243 + 729]
    # 2 tokens, 2 places, by hand: the end alone; 1 and the end; 1 1.
    small = Listing(2, 2, ends=True)
    assert small.sequences.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert small.mask.tolist() == [[True, False], [True, True], [True, True]]
    assert small.finished.tolist() == [True, True, False]
    assert small.states.tolist() == [[0, 0], [0, 2], [0, 2]]
    assert FIXED.state([]) == 0
    assert FIXED.state([3]) == 4
    assert FIXED.state([0, 0]) == 5
    assert ENDING.sequences[ENDING.row([2, 1, 0])].tolist() == [2, 1, 0, 0, 0, 0]


@BOTH
def test_probabilities_come_from_the_logits_of_the_prefixes(listing: Listing) -> None:
    lm = EnumerableLM.random(0, listing=listing)
    assert float(lm.probs().sum()) == pytest.approx(1.0, abs=1e-12)
    # One response by hand: 1, 2, then 0. Its states: the empty prefix; (1) = 1 + 1; (1, 2) = 5 + 4 + 2.
    row = listing.row([1, 2, 0])
    table = lm.logits.detach().exp()
    table = (table / table.sum(1, keepdim=True)).log()
    first_three = table[0, 1] + table[2, 2] + table[11, 0]
    assert float(lm.token_log_probs()[row, :3].sum()) == pytest.approx(float(first_three), abs=1e-12)
    if listing.ends:
        assert float(lm.log_probs()[row]) == pytest.approx(float(first_three), abs=1e-12)
    # A state's visits are the mass of the responses that go on from its prefix.
    passes = (listing.sequences[:, 0] == 1) & (listing.lengths > 1)
    assert float(lm.visits()[listing.state([1])]) == pytest.approx(float(lm.probs()[passes].sum()))


@BOTH
def test_values_are_conditional_means_and_draws_follow_the_law(listing: Listing) -> None:
    lm, reward = EnumerableLM.random(1, listing=listing), coverage_reward(listing)
    passes = (listing.sequences[:, :2] == torch.tensor([1, 3])).all(1)
    inside = lm.probs()[passes]
    assert float(lm.values(reward)[listing.state([1, 3])]) == pytest.approx(
        float((inside * reward[passes]).sum() / inside.sum()), abs=1e-12
    )
    assert float(lm.values(reward)[0]) == pytest.approx(float(lm.expectation(reward)), abs=1e-12)
    # 20,000 draws: the mean reward is off by 4 standard errors at most.
    drawn = reward[lm.sample(20_000, seed=0)]
    error = float(drawn.std()) / math.sqrt(len(drawn))
    assert abs(float(drawn.mean() - lm.expectation(reward))) < 4 * error


def test_entropy_and_divergences_of_a_model_by_hand() -> None:
    # Every token uniform: H = 6·log 4. Against logits (log 3, 0, 0, 0), i.e. (1/2, 1/6, 1/6, 1/6), a place's
    # KL is ¼·log(¼/½) + ¾·log(¼/(1/6)) = −¼·log 2 + ¾·log 1.5.
    uniform = EnumerableLM(torch.zeros(1365, 4, dtype=torch.float64))
    other = EnumerableLM.factorised(torch.tensor([[3.0, 1.0, 1.0, 1.0]]).double().log().expand(6, 4))
    assert float(uniform.entropy()) == pytest.approx(6 * math.log(4))
    assert float(uniform.kl(other)) == pytest.approx(6 * (-0.25 * math.log(2) + 0.75 * math.log(1.5)))
    # p = (1, 0), q = (½, ½): m = (¾, ¼); JS = ½·log(4/3) + ½·(½·log(2/3) + ½·log 2).
    p, q = torch.tensor([1.0, 0.0]).double().log(), torch.tensor([0.5, 0.5]).double().log()
    by_hand = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    assert float(jensen_shannon(p, q)) == pytest.approx(by_hand)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_law_of_the_best_of_n_is_what_all_samples_of_n_say(n: int) -> None:
    small = Listing(2, 3)
    lm = EnumerableLM.random(2, listing=small)
    tied = torch.tensor([0.0, 1.0, 1.0, -1.0, 0.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    for scores in (tied, distinct_reward(small, 0)):
        listed = best_of_n_by_listing(lm.probs(), scores, n)
        torch.testing.assert_close(best_of_n_law(lm.probs(), scores, n), listed, atol=1e-12, rtol=0)
        assert float(listed.sum()) == pytest.approx(1.0, abs=1e-12)


# --- Paths, rewards, masks -------------------------------------------------------------------------------


def group_of(listing: Listing, reward: Tensor) -> Group:
    """Every response of the listing as a finished sample of one prompt."""
    trajectories = []
    for number, length in enumerate(listing.lengths.tolist()):
        completion = Completion(
            token_ids=tuple(listing.sequences[number, :length].tolist()),
            logprobs=(-1.0,) * length,
            versions=(0,) * length,
            text="",
            finish_reason="stop" if listing.finished[number] else "length",
        )
        trajectories.append(Trajectory(completion, float(reward[number]), {}, (-1.0,) * length))
    return Group(0, Prompt("one", (3,), ""), tuple(trajectories), "rollout-0", 0.0, 0.0)


def test_the_end_token_is_a_token_and_nothing_follows_it() -> None:
    reward = coverage_reward(ENDING)
    samples = flatten([group_of(ENDING, reward)], version=0)
    share = make_share(samples)
    assert torch.equal(share.mask, ENDING.mask)
    assert [sample.finished for sample in samples] == ENDING.finished.tolist()
    # The reward falls on the end token, or on the sixth where the response was cut off; nowhere else.
    by_token = token_rewards(reward, torch.zeros(ENDING.mask.shape).double(), ENDING.mask, kl_coef=1.0)
    for number in (ENDING.row([0]), ENDING.row([1, 2, 0]), ENDING.row([3, 3, 3, 3, 3, 3])):
        expected = [0.0] * 6
        expected[int(ENDING.lengths[number]) - 1] = float(reward[number])
        assert by_token[number].tolist() == expected
    torch.testing.assert_close(by_token.sum(1), reward)


# --- The optimum -----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_soft_values_token_by_token_give_the_softmax_over_responses(listing: Listing, beta: float) -> None:
    """π*(a|s) = π_ref·e^{(Q* − V*)/β} at every prefix is π_ref·e^{R/β}/Z, and V* of the start is β·log Z."""
    reference, reward = EnumerableLM.random(3, listing=listing), coverage_reward(listing)
    law, log_z = reference.tilted(reward, beta)
    _, values = reference.soft_values(reward, beta)
    torch.testing.assert_close(reference.optimum(reward, beta).log_probs(), law, atol=1e-9, rtol=0)
    assert float(values[0]) == pytest.approx(beta * float(log_z), abs=1e-9)


@BOTH
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_the_objective_is_beta_log_z_less_the_distance_to_the_optimum(listing: Listing, beta: float) -> None:
    """J(π) = E_π[Σ_t r_t], r_t from `token_rewards`: J(π) = β·log Z − β·KL(π‖π*), so J(π*) = β·log Z."""
    reference, reward = EnumerableLM.random(3, listing=listing), coverage_reward(listing)
    law, log_z = reference.tilted(reward, beta)
    for policy in (reference.optimum(reward, beta), reference, EnumerableLM.random(4, listing=listing)):
        distance = k1(policy.token_log_probs(), reference.token_log_probs()).detach()
        by_token = token_rewards(reward, distance, listing.mask, kl_coef=beta)
        objective = float((policy.probs() * by_token.sum(1)).sum())
        expected = beta * (float(log_z) - float(kl(policy.log_probs(), law)))
        assert objective == pytest.approx(expected, abs=1e-8)


@BOTH
def test_at_the_optimum_no_token_of_any_response_has_an_advantage(listing: Listing) -> None:
    """R − β·Σ_{k≥t} log(π*/π_ref) is V*(s_t) whatever follows: with V* as values every GAE is 0, at any λ.

    One more token of reference policy instead of the optimum, and it is not.
    """
    beta = 0.5
    reference, reward = EnumerableLM.random(5, listing=listing), coverage_reward(listing)
    theirs = reference.token_log_probs().detach()
    _, values = reference.soft_values(reward, beta)
    optimum = reference.optimum(reward, beta)
    for lam in (0.0, 0.7, 1.0):
        found = advantages_of(optimum, reward, reference=theirs, beta=beta, values=values, lam=lam)
        assert float(found.abs().max()) < 1e-9
    elsewhere = advantages_of(reference, reward, reference=theirs, beta=beta, values=values, lam=0.7)
    assert float(elsewhere.abs().max()) > 0.1


@BOTH
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_update_follows_the_gradient_of_the_objective(listing: Listing, beta: float) -> None:
    """Token rewards, λ = 1 and the policy loss at ρ = 1, each response at its chance: ∇[E R − β·KL(π‖ref)].

    At the optimum it is 0.
    """
    reference, reward = EnumerableLM.random(6, listing=listing), coverage_reward(listing)
    policy, theirs = EnumerableLM.random(7, listing=listing), reference.token_log_probs().detach()
    exact = policy.gradient(policy.expectation(reward) - beta * policy.kl(reference))
    found = ascent(policy, advantages_of(policy, reward, reference=theirs, beta=beta))
    torch.testing.assert_close(found, exact, atol=1e-9, rtol=0)
    assert float(exact.abs().max()) > 0.01
    if beta:
        optimum = reference.optimum(reward, beta)
        at_rest = ascent(optimum, advantages_of(optimum, reward, reference=theirs, beta=beta))
        assert float(at_rest.abs().max()) < 1e-9


def test_all_samples_are_listed_once() -> None:
    small = Listing(2, 1)
    law = best_of_n_by_listing(torch.tensor([0.25, 0.75]).double(), torch.tensor([1.0, 0.0]), 2)
    # Response 0 wins unless both are 1: 1 − 9/16.
    assert law.tolist() == pytest.approx([7 / 16, 9 / 16])
    assert [tuple(row) for row in small.sequences.tolist()] == list(itertools.product(range(2), repeat=1))

"""Group baselines, surrogates and ways to add up tokens: which of them follow ∇E[R], and which do not.

All by enumeration (`enumerable_lm`), in float64: every group of G responses counts by its chance.
"""

import math

import pytest
import torch
from enumerable_lm import ENDING, FIXED, EnumerableLM, Listing, coverage_reward, groups_of_levels
from identities_helpers import advantages_of, ascent, cosine
from torch import Tensor

from learner.advantages import rewards_to_go, token_rewards
from learner.group_advantages import GroupEstimator, group_advantages, leave_one_out, uniform_groups
from learner.kl import k1
from learner.surrogates import Aggregation, Surrogate, divisor, token_scales

BOTH = pytest.mark.parametrize("listing", [FIXED, ENDING], ids=["fixed", "ending"])


def expected_advantages(
    policy: EnumerableLM, returns: Tensor, kind: GroupEstimator, size: int, *, drop_uniform: bool = False
) -> Tensor:
    """(N,): the mean advantage of each response over all groups that it may be in.

    With it as advantage `ascent` is the expected update of mean_i A_i·∇log π(y_i). `drop_uniform` takes the
    groups whose returns are all equal out, and divides by the chance of the others.
    """
    p = policy.probs()
    groups, chances, levels = groups_of_levels(p, returns, size)
    numbers = torch.arange(len(groups)).repeat_interleave(size)
    every = levels[groups].flatten()
    found = group_advantages(kind, every, numbers, epsilon=1e-6)
    if drop_uniform:
        kept = ~uniform_groups(every, numbers)
        chances = chances * kept / (chances * kept).sum()
    totals = torch.zeros(len(levels), dtype=torch.float64)
    totals.index_add_(0, groups.flatten(), chances.repeat_interleave(size) * found / size)
    _, level = torch.unique(returns, return_inverse=True)
    mass = torch.zeros(len(levels), dtype=torch.float64).index_add(0, level, p)
    return (totals / mass)[level]


def shared(policy: EnumerableLM, advantages: Tensor) -> Tensor:
    """(N, T): all tokens of a response have its advantage."""
    return torch.where(policy.mask, advantages[:, None], 0.0)


# --- Baselines -------------------------------------------------------------------------------------------


def test_leaving_one_out_is_the_distance_to_the_mean_times_g_over_g_less_one() -> None:
    returns = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for size in (2, 3, 4, 6):
        table = returns.reshape(-1, size)
        found = leave_one_out(returns, torch.arange(len(table)).repeat_interleave(size)).reshape(-1, size)
        for i in range(size):
            others = [j for j in range(size) if j != i]
            torch.testing.assert_close(found[:, i], table[:, i] - table[:, others].mean(1))
        by_mean = size / (size - 1) * (table - table.mean(1, keepdim=True))
        torch.testing.assert_close(found, by_mean, atol=1e-12, rtol=0)


@BOTH
@pytest.mark.parametrize("size", [2, 3, 4])
def test_which_group_baselines_follow_the_mean_reward(listing: Listing, size: int) -> None:
    """Leaving one out: ∇E[R]. The mean of all: (G − 1)/G of it. By the standard deviation: another way."""
    policy, reward = EnumerableLM.random(1, listing=listing), coverage_reward(listing)
    exact = policy.gradient(policy.expectation(reward))
    out, mean, std = (
        ascent(policy, shared(policy, expected_advantages(policy, reward, kind, size)))
        for kind in ("leave_one_out", "group_mean", "group_std")
    )
    torch.testing.assert_close(out, exact, atol=1e-9, rtol=0)
    torch.testing.assert_close(mean, (size - 1) / size * exact, atol=1e-9, rtol=0)
    assert cosine(std, exact) < 0.9999


@pytest.mark.parametrize("size", [2, 4])
def test_of_a_reward_that_is_passed_or_not_the_standard_deviation_only_sets_the_pace(size: int) -> None:
    """R is 0 or 1: the update is (a₁ − a₀)·∇P(R = 1), a the mean advantage of a response with this reward.

    Beside k others that pass, k ~ Bin(G − 1, p), the group has m·G ones, s² = m·(1 − m)·G/(G − 1), and A is
    (1 − m)/s where R = 1, with k + 1 = m·G, and −m/s where R = 0, with k = m·G. For G = 2: 1/√2 at any p.
    """
    policy = EnumerableLM.random(1, listing=ENDING)
    passed = (coverage_reward(ENDING) >= 1.0).double()
    exact = policy.gradient(policy.expectation(passed))
    found = ascent(policy, shared(policy, expected_advantages(policy, passed, "group_std", size)))
    chance, pace = float(policy.probs() @ passed), 0.0
    for k in range(size):
        others = math.comb(size - 1, k) * chance**k * (1 - chance) ** (size - 1 - k)
        for ones, advantage in ((k + 1, 1.0), (k, 0.0)):
            m = ones / size
            if 0 < m < 1:
                spread = math.sqrt(m * (1 - m) * size / (size - 1)) + 1e-6
                pace += others * abs(advantage - m) / spread
    torch.testing.assert_close(found, pace * exact, atol=1e-9, rtol=0)
    if size == 2:
        assert pace == pytest.approx(math.sqrt(0.5), abs=1e-5)


@pytest.mark.parametrize("kind", ["leave_one_out", "group_mean", "group_std"])
def test_groups_of_equal_returns_move_nothing_so_leaving_them_out_only_sets_the_pace(
    kind: GroupEstimator,
) -> None:
    """Sampling on until every group has a spread divides the expected update by the chance of one."""
    policy, size = EnumerableLM.random(2, listing=ENDING), 3
    passed = (coverage_reward(ENDING) >= 1.0).double()
    chance = float(policy.probs() @ passed)
    spread = 1 - chance**size - (1 - chance) ** size
    every = ascent(policy, shared(policy, expected_advantages(policy, passed, kind, size)))
    dropped = expected_advantages(policy, passed, kind, size, drop_uniform=True)
    torch.testing.assert_close(ascent(policy, shared(policy, dropped)), every / spread, atol=1e-9, rtol=0)
    numbers = torch.tensor([0, 0, 0, 1, 1, 1])
    equal = group_advantages(kind, torch.full((6,), 0.1).double(), numbers, epsilon=1e-6)
    assert equal.tolist() == [0.0] * 6


def test_with_kl_in_the_return_a_response_may_be_one_action_or_its_tokens_answer_for_themselves() -> None:
    """RLOO: return R − β·Σ_t k1 of the whole response. REINFORCE++: reward-to-go. Both: ∇[E R − β·KL]."""
    policy, reference = EnumerableLM.random(3, listing=ENDING), EnumerableLM.random(4, listing=ENDING)
    reward, mask, beta = coverage_reward(ENDING), ENDING.mask, 0.3
    exact = policy.gradient(policy.expectation(reward) - beta * policy.kl(reference))
    distance = k1(policy.token_log_probs(), reference.token_log_probs()).detach()
    by_token = token_rewards(reward, distance, mask, kl_coef=beta)
    baseline = expected_advantages(policy, by_token.sum(1), "leave_one_out", 2)
    torch.testing.assert_close(ascent(policy, shared(policy, baseline)), exact, atol=1e-9, rtol=0)
    to_go = rewards_to_go(by_token, mask, gamma=1.0)
    torch.testing.assert_close(ascent(policy, to_go), exact, atol=1e-9, rtol=0)


# --- Surrogates ------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("surrogate", ["sequence_clip", "geometric_clip", "cispo"])
def test_where_the_policy_has_not_moved_all_surrogates_agree(listing: Listing, surrogate: Surrogate) -> None:
    policy, reward = EnumerableLM.random(5, listing=listing), coverage_reward(listing)
    advantages = advantages_of(policy, reward, values=policy.values(reward), lam=0.9)
    if surrogate != "cispo":  # ratios of whole responses share one advantage
        advantages = shared(policy, reward)
    plain = ascent(policy, advantages)
    torch.testing.assert_close(ascent(policy, advantages, surrogate=surrogate), plain, atol=1e-9, rtol=0)


@BOTH
def test_once_it_has_moved_only_the_ratio_of_the_response_is_exact(listing: Listing) -> None:
    """Samples of π_old, nothing clipped: with s = Π_t ρ_t the update is ∇E_π[R], whatever π_old was.

    Token PPO and CISPO are the same as each other there, ρ_t·A·∇log π_t, and another thing; GSPO's
    s^(1/|y|) is a third.
    """
    policy, reward = EnumerableLM.random(5, listing=listing), coverage_reward(listing)
    step = EnumerableLM.random(6, listing=listing, scale=0.5).logits
    old = EnumerableLM((policy.logits + step).detach(), listing)
    advantages, before = shared(policy, reward), old.token_log_probs()
    exact = policy.gradient(policy.expectation(reward))
    kinds: tuple[Surrogate, ...] = ("sequence_clip", "token_clip", "cispo", "geometric_clip")
    response, token, silent, geometric = (
        ascent(policy, advantages, law=old.probs(), old=before, surrogate=kind) for kind in kinds
    )
    torch.testing.assert_close(response, exact, atol=1e-9, rtol=0)
    torch.testing.assert_close(silent, token, atol=1e-12, rtol=0)
    assert float((token - exact).abs().max()) > 0.01
    assert float((geometric - exact).abs().max()) > 0.01
    assert float((geometric - token).abs().max()) > 0.01


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_a_mean_over_each_responses_tokens_is_no_gradient_of_the_mean_reward(
    aggregation: Aggregation,
) -> None:
    """With the whole population as the batch: Σ_t, mean_t over all tokens and a constant give ∇E[R] times
    1, 1/E|y| and 1/L. 1/|y| of each response's own weighs short ones more, and turns the direction.
    """
    policy, reward = EnumerableLM.random(7, listing=ENDING), coverage_reward(ENDING)
    exact = policy.gradient(policy.expectation(reward))
    # A chance stands for a share of `every` responses; only the ratio to the tokens matters.
    every = 10**9
    mean_length = float(policy.probs() @ ENDING.lengths.double())
    count = divisor(aggregation, tokens=round(every * mean_length), sequences=every, limit=6) / every
    scales = token_scales(ENDING.mask, aggregation).double()
    baseline = reward - float(policy.expectation(reward))
    found = ascent(policy, shared(policy, baseline), weights=scales, count=count)
    pace = {"token_mean": 1 / mean_length, "sequence_sum": 1.0, "constant": 1 / 6}
    if aggregation in pace:
        torch.testing.assert_close(found, pace[aggregation] * exact, atol=1e-6, rtol=0)
    else:
        assert cosine(found, exact) < 0.99

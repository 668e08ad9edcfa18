"""Best-of-n, its soft form and guided decoding: laws, distances, and the optimum that they tend to.

All by enumeration (`enumerable_lm`), in float64; rewards without end by quadrature.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from enumerable_lm import (
    ENDING,
    FIXED,
    EnumerableLM,
    Listing,
    all_samples,
    best_of_n_by_listing,
    coverage_reward,
    distinct_reward,
    kl,
)
from torch import Tensor

from actors.decoding.best_of_n import (
    best_of_n_estimate,
    best_of_n_kl,
    best_of_n_law,
    best_of_n_weights,
    best_of_n_win_rate,
    kl_bound,
    pass_at_k,
    soft_best_of_n_law,
    soft_choice,
    tilted,
    win_rate_bound,
)
from actors.decoding.guided import guided_logits, top_candidates
from learner.objectives import supervised_loss

BOTH = pytest.mark.parametrize("listing", [FIXED, ENDING], ids=["fixed", "ending"])

SMALL = Listing(2, 3)
TIED = torch.tensor([0.0, 1.0, 1.0, -1.0, 0.0, 2.0, 2.0, 2.0], dtype=torch.float64)


def scores_of(ties: bool, listing: Listing) -> Tensor:
    if listing is SMALL:
        return TIED if ties else distinct_reward(SMALL, 0)
    return coverage_reward(listing) if ties else distinct_reward(listing, 0)


TIES = pytest.mark.parametrize("ties", [True, False], ids=["tied", "untied"])


# --- Best of n -------------------------------------------------------------------------------------------


@TIES
def test_the_estimate_of_best_of_n_is_unbiased(ties: bool) -> None:
    """All 4⁵ samples of N = 5 of four responses: the mean of the estimates is the law's gold, n = 1 … 5."""
    tiny = Listing(2, 2)
    p = EnumerableLM.random(1, listing=tiny).probs()
    proxy = torch.tensor([0.0, 1.0, 1.0, 0.5] if ties else [0.3, 1.0, 0.7, 0.5], dtype=torch.float64)
    gold = torch.tensor([0.2, -1.0, 3.0, 0.7], dtype=torch.float64)
    samples = all_samples(4, 5)
    chances = p[samples].prod(1)
    for n in range(1, 6):
        found = [best_of_n_estimate(proxy[s].numpy(), gold[s].numpy(), n) for s in samples]
        exact = float(best_of_n_by_listing(p, proxy, n) @ gold)
        assert float(chances @ torch.tensor(found, dtype=torch.float64)) == pytest.approx(exact, abs=1e-9)
    # Of a reward that is 0 or 1 it is pass@k: 1 − (1 − p)^k.
    passes = (proxy >= 1.0).double()
    chance = float(p @ passes)
    for k in (1, 2, 4):
        found = [pass_at_k(passes[s].numpy(), k) for s in samples]
        assert float(chances @ torch.tensor(found, dtype=torch.float64)) == pytest.approx(
            1 - (1 - chance) ** k, abs=1e-9
        )


def test_without_ties_the_weights_are_those_of_the_order_statistics() -> None:
    """C(i − 1, n − 1)/C(N, n) for the i-th of N from below."""
    scores = np.random.default_rng(0).normal(size=12)
    order = np.argsort(scores)
    for n in (1, 3, 12):
        by_hand = [math.comb(i - 1, n - 1) / math.comb(12, n) for i in range(1, 13)]
        np.testing.assert_allclose(best_of_n_weights(scores, n)[order], by_hand, atol=1e-12)


@TIES
def test_law_distance_and_win_rate_are_those_of_all_samples(ties: bool) -> None:
    """Every sample of n out of 8 responses, n to 5, and every pair out of 1093."""
    for listing, sizes in ((SMALL, (1, 2, 3, 5)), (ENDING, (2,))):
        p, score = EnumerableLM.random(2, listing=listing).probs(), scores_of(ties, listing)
        for n in sizes:
            law = best_of_n_by_listing(p, score, n)
            found = torch.from_numpy(best_of_n_law(p.numpy(), score.numpy(), n))
            torch.testing.assert_close(found, law, atol=1e-9, rtol=0)
            distance = float(kl(law.log(), p.log()))
            assert best_of_n_kl(p.numpy(), score.numpy(), n) == pytest.approx(distance, abs=1e-9)
            ahead = score[:, None] > score[None, :]
            level = score[:, None] == score[None, :]
            wins = float(law @ (ahead.double() + 0.5 * level) @ p)
            assert best_of_n_win_rate(p.numpy(), score.numpy(), n) == pytest.approx(wins, abs=1e-9)


def test_the_bounds_hold_are_reached_without_ties_and_are_loose_with_them() -> None:
    p = EnumerableLM(torch.zeros(1365, 4, dtype=torch.float64)).probs().numpy()  # 4096 alike
    untied, tied = distinct_reward(FIXED, 3).numpy(), coverage_reward(FIXED).numpy()
    for one in (untied, tied):
        assert f"{best_of_n_kl(p, one, 1):.3f}" == "0.000"  # and no rounded number below 0
    for n in (2, 8, 64):
        near, far = best_of_n_kl(p, untied, n), best_of_n_kl(p, tied, n)
        # A response of 4096 is not infinitely small: what is missing is of the order of n/4096.
        assert kl_bound(n) - n / 4096 < near <= kl_bound(n)
        assert far < kl_bound(n) - 0.03
        close, low = best_of_n_win_rate(p, untied, n), best_of_n_win_rate(p, tied, n)
        assert win_rate_bound(n) - 1 / 4096 < close <= win_rate_bound(n)
        assert low < win_rate_bound(n) - 0.001
    # n = 2: a level of mass a = F − F₋ gives (F² − F₋²)·(F + F₋)/2, a³/6 less than ∫ 2u² du over it.
    _, level = np.unique(tied, return_inverse=True)
    masses = np.bincount(level, p)
    assert best_of_n_win_rate(p, tied, 2) == pytest.approx(2 / 3 - (masses**3).sum() / 6, abs=1e-9)


@TIES
def test_the_best_of_k_again_and_again_is_the_best_of_a_power_of_k(ties: bool) -> None:
    """(F^K)^K = F^(K²): iterated rejection sampling, each time fitted perfectly. Where it is fitted, the
    supervised loss is at rest.
    """
    p, score = EnumerableLM.random(4, listing=ENDING).probs().numpy(), scores_of(ties, ENDING).numpy()
    once = best_of_n_law(p, score, 3)
    np.testing.assert_allclose(best_of_n_law(once, score, 3), best_of_n_law(p, score, 9), atol=1e-9)
    law = torch.from_numpy(once)
    fitted = EnumerableLM.of_law(law, ENDING)
    torch.testing.assert_close(fitted.probs(), law, atol=1e-12, rtol=0)
    mask = ENDING.mask
    chances = law[:, None].expand(mask.shape)[mask]
    loss, _ = supervised_loss(chances * fitted.token_log_probs()[mask], count=1.0)
    assert float(fitted.gradient(loss).abs().max()) < 1e-9


# --- Soft best-of-n --------------------------------------------------------------------------------------


@TIES
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_law_of_soft_best_of_n_is_that_of_all_samples(ties: bool, n: int) -> None:
    p, score, temperature = EnumerableLM.random(5, listing=SMALL).probs(), scores_of(ties, SMALL), 0.5
    samples = all_samples(8, n)
    law = torch.zeros(8, dtype=torch.float64)
    for sample, chance in zip(samples, p[samples].prod(1), strict=True):
        choice = torch.from_numpy(soft_choice(score[sample].numpy(), temperature))
        law.index_add_(0, sample, chance * choice)
    found = soft_best_of_n_law(p.numpy(), score.numpy(), n, temperature)
    np.testing.assert_allclose(found, law.numpy(), atol=1e-8)


def test_soft_best_of_n_tends_to_the_optimum_as_one_over_n() -> None:
    """π* = π·e^{r/λ}/Z is the optimum of E[r] − λ·KL(π‖π_ref). As n doubles the probabilities' distance to it
    halves, and KL(π_n‖π*), of second order in them, becomes a quarter: within the published bound of O(1/n).
    """
    reference, reward, temperature = EnumerableLM.random(6, listing=ENDING), coverage_reward(ENDING), 0.7
    p = reference.probs().numpy()
    optimum, _ = reference.tilted(reward, temperature)
    np.testing.assert_allclose(tilted(p, reward.numpy(), temperature), optimum.exp().numpy(), atol=1e-12)
    gaps, distances = [], []
    for n in (64, 128, 256):
        law = torch.from_numpy(soft_best_of_n_law(p, reward.numpy(), n, temperature))
        assert float(law.sum()) == pytest.approx(1.0, abs=1e-8)
        gaps.append(float(kl(law.log(), optimum)))
        distances.append(float((law - optimum.exp()).abs().sum()))
    for wider, narrower in itertools.pairwise(distances):
        assert wider / narrower == pytest.approx(2.0, rel=0.05)
    for wider, narrower in itertools.pairwise(gaps):
        assert wider / narrower == pytest.approx(4.0, rel=0.05)


# --- Over-optimisation by the choice alone ---------------------------------------------------------------

POWERS = [1 << power for power in range(11)]  # n = 1 … 1024


def gold_of_best_of_n(error_cdf: Callable[[np.ndarray], np.ndarray], rho: float) -> np.ndarray:
    """(11,): E[g | best of n by the proxy ρ·g + √(1−ρ²)·e], g ~ N(0, 1), for each n of `POWERS`.

    The proxy's line is cut into narrow cells; each has a mass and a mean of g by Gauss-Hermite quadrature
    over g, and `best_of_n_law` chooses among cells.
    """
    gold, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = weights / weights.sum()
    half = np.concatenate([np.linspace(0.0, 8.0, 1601)[:-1], np.geomspace(8.0, 1e5, 1500)])
    edges = np.concatenate([-half[:0:-1], half])
    below = error_cdf((edges[:, None] - rho * gold) / math.sqrt(1 - rho**2))  # (edges, nodes)
    masses = np.diff(below, axis=0, prepend=0.0, append=1.0)
    mass, total = masses @ weights, masses @ (weights * gold)
    held = mass > 0
    mean, order = total[held] / mass[held], np.arange(held.sum())
    return np.array([best_of_n_law(mass[held], order, n) @ mean for n in POWERS])


def test_a_gaussian_error_of_the_proxy_slows_the_gold_reward_down_but_never_turns_it() -> None:
    """E[g | proxy] = ρ·proxy, so the gold reward is ρ·E[max of n]: at ρ = 0.7 from 0 to 0.7·3.248 = 2.274."""
    found = gold_of_best_of_n(scipy.stats.norm.cdf, 0.7)
    line = np.linspace(-10.0, 10.0, 20001)
    density, upto = scipy.stats.norm.pdf(line), scipy.stats.norm.cdf(line)
    largest = [np.trapezoid(line * n * density * upto ** (n - 1), line) for n in POWERS]
    assert found == pytest.approx(0.7 * np.array(largest), abs=2e-3)
    assert found[-1] == pytest.approx(2.274, abs=2e-3)
    assert (np.diff(found) > 0.1).all()


def test_an_error_with_heavy_tails_turns_the_gold_reward_over() -> None:
    """Student's t with 2 degrees of freedom, ρ = 0.7 again: the peak is at n = 16, then error is chosen."""
    found = gold_of_best_of_n(scipy.stats.t(2).cdf, 0.7)
    assert POWERS[int(found.argmax())] == 16
    assert found.max() == pytest.approx(0.676, abs=2e-3)
    assert (np.diff(found)[4:] < -0.03).all()
    assert found[-1] < 0.2 * found.max()


# --- Guided decoding -------------------------------------------------------------------------------------


def guided(reference: EnumerableLM, scores: Tensor, weight: float, *, k: int, temperature: float = 1.0):
    """The model that guidance makes of the reference; scores (S, V) of every prefix with every next token."""
    logits = reference.logits.detach()
    candidates = top_candidates(logits, k)
    rows = torch.ones(len(logits), dtype=torch.float64)
    tilt = guided_logits(logits, candidates, scores.gather(1, candidates), weight * rows, temperature * rows)
    return EnumerableLM(tilt / temperature, reference.listing)


@BOTH
@pytest.mark.parametrize(("beta", "temperature"), [(0.2, 1.0), (1.0, 1.0), (0.5, 0.7)])
def test_guided_by_the_exact_soft_value_it_samples_from_the_optimum(
    listing: Listing, beta: float, temperature: float
) -> None:
    """w = 1/β, k = |V|, score = V* of the prefix with the candidate; reference: the model as sampled."""
    model, reward = EnumerableLM.random(7, listing=listing), coverage_reward(listing)
    reference = EnumerableLM(model.logits / temperature, listing)
    q, _ = reference.soft_values(reward, beta)
    law, _ = reference.tilted(reward, beta)
    found = guided(model, q, 1 / beta, k=4, temperature=temperature).log_probs()
    torch.testing.assert_close(found, law, atol=1e-9, rtol=0)


def test_of_the_k_likeliest_tokens_it_is_the_optimum_of_the_reference_that_has_no_others() -> None:
    model, reward, beta = EnumerableLM.random(7, listing=ENDING), coverage_reward(ENDING), 0.5
    candidates = top_candidates(model.logits.detach(), 2)
    cut = torch.full_like(model.logits.detach(), -torch.inf)
    cut = cut.scatter(1, candidates, model.logits.detach().gather(1, candidates))
    reference = EnumerableLM(cut, ENDING)
    q, _ = reference.soft_values(reward, beta)
    law, _ = reference.tilted(reward, beta)
    found = guided(model, q, 1 / beta, k=2).probs()
    torch.testing.assert_close(found, law.exp(), atol=1e-9, rtol=0)
    assert int((found == 0).sum()) > 500


@BOTH
def test_guided_by_the_policys_own_values_it_gains_but_is_not_the_optimum(listing: Listing) -> None:
    """V of the reference, regressed on final rewards, instead of the soft V*: every state's step is tilted
    towards what has an advantage, so E[R] rises; at the same λ it is another law than π*.
    """
    reference, reward, beta = EnumerableLM.random(8, listing=listing), coverage_reward(listing), 0.5
    q, _ = reference.soft_values(reward, 1e6)  # β → ∞: Q of the reference itself
    assert float((q[0] * reference.table()[0].exp()).sum()) == pytest.approx(
        float(reference.values(reward)[0]), abs=1e-5
    )
    law, _ = reference.tilted(reward, beta)
    found = guided(reference, q, 1 / beta, k=4)
    assert float(found.expectation(reward)) > float(reference.expectation(reward)) + 0.1
    assert float(kl(found.log_probs(), law)) > 1e-3
    optimum = float(law.exp() @ reward) - beta * float(kl(law, reference.log_probs()))
    reached = float(found.expectation(reward)) - beta * float(found.kl(reference))
    assert reached < optimum

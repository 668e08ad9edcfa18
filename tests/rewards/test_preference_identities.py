"""Identities of preferences, ensembles and best of n on a model whose responses can be listed, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from enumerable import LENGTHS, best_of_n_law, correlation, gold, levels, reference
from scipy import integrate, optimize
from scipy.special import expit

from rewards.preferences.ensembles import combine
from rewards.preferences.evaluation import (
    accuracy,
    best_of_n,
    best_of_n_kl,
    calibration,
    reliability,
)
from rewards.preferences.losses import bradley_terry, classification, length_residual_fit

# An annotator's taste for length that outweighs the gold cost of 0.5 for each token beyond 2.
BIAS = 0.9


def all_pairs(p: np.ndarray, truth: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(first, second, weight): every ordered pair of levels, weighted by p_i·p_j·σ(truth_i − truth_j)."""
    i, j = np.meshgrid(np.arange(len(p)), np.arange(len(p)), indexing="ij")
    weight = np.outer(p, p) * expit(truth[:, None] - truth[None, :])
    return torch.tensor(i.ravel()), torch.tensor(j.ravel()), torch.tensor(weight.ravel())


def test_the_listed_model_is_a_distribution() -> None:
    assert reference(0).sum() == pytest.approx(1.0, abs=1e-12)
    # |V|=4, T=6; the law of the best of n is one too, and of the best of 1 it is p itself.
    p = reference(1)
    assert len(p) == 4096
    np.testing.assert_allclose(best_of_n_law(p, gold(), 1), p, atol=1e-15)
    assert best_of_n_law(p, gold(), 17).sum() == pytest.approx(1.0, abs=1e-12)


def test_adding_a_function_of_the_prompt_leaves_bradley_terry_as_it_is() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 5, 300)
    shift = torch.tensor(rng.normal(scale=10, size=5)[prompt])
    chosen, rejected = torch.tensor(rng.choice(gold(), 300)), torch.tensor(rng.choice(gold(), 300))
    margin, weight = torch.tensor(rng.random(300)), torch.tensor(rng.random(300))
    plain, _ = bradley_terry(chosen, rejected, margin=margin, weight=weight)
    shifted, _ = bradley_terry(chosen + shift, rejected + shift, margin=margin, weight=weight)
    assert shifted.item() == pytest.approx(plain.item(), abs=1e-12)
    # Single responses do see g(x), and so does the centring term: r_w + r_l grows by 2·g(x).
    moved = classification(chosen + shift, rejected + shift)[0] - classification(chosen, rejected)[0]
    assert abs(moved) > 0.1
    centred = bradley_terry(chosen + shift, rejected + shift, centring=0.01)[0]
    assert abs(centred - bradley_terry(chosen, rejected, centring=0.01)[0]) > 0.1


@pytest.mark.parametrize("bias", [0.0, 0.3, BIAS])
def test_bradley_terry_learns_what_the_annotator_wants_bias_included(bias: float) -> None:
    # Labels by σ(Δgold + b·Δlength) over all pairs; r = w₁·gold + w₂·length. The population loss has one
    # minimum, at w = (1, b), where its gradient is 0. Newton's steps from (0, 0) must end there.
    p, (good, length) = levels(reference(2), gold(), LENGTHS)
    first, second, weight = all_pairs(p, good + bias * length)
    features = torch.tensor(np.stack([good, length], axis=1))

    def loss(w: torch.Tensor) -> torch.Tensor:
        reward = features @ w
        return bradley_terry(reward[first], reward[second], weight=weight, count=1.0)[0]

    w = torch.zeros(2, dtype=torch.float64)
    for _ in range(20):
        leaf = w.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        w = w - torch.linalg.solve(torch.autograd.functional.hessian(loss, w), gradient)
    np.testing.assert_allclose(w.numpy(), [1.0, bias], atol=1e-6)


def test_classification_orders_responses_as_the_true_reward_does() -> None:
    # P(win|i) = E_j σ(r_i − r_j) over all 4096 responses is increasing in r_i, so its logit orders as r does.
    p, r = reference(3), gold()
    values = np.unique(r)
    wins = np.array([p @ expit(value - r) for value in values])
    assert (np.diff(wins) > 0).all()
    # The population loss of `classification` has its minimum there: the gradient of every level is 0.
    mass, (good,) = levels(p, r)
    first, second, weight = all_pairs(mass, good)
    reward = torch.tensor(np.log(wins / (1 - wins)), requires_grad=True)
    loss, _ = classification(reward[first], reward[second], weight=weight, count=1.0)
    loss.backward()
    assert reward.grad is not None
    assert reward.grad.abs().max().item() < 1e-12
    # At a reward of the same order but another shape it is not.
    other = torch.tensor(2.0 * values, requires_grad=True)
    classification(other[first], other[second], weight=weight, count=1.0)[0].backward()
    assert other.grad is not None
    assert other.grad.abs().max().item() > 1e-3


def test_scale_changes_calibration_and_not_accuracy() -> None:
    # Δ ~ N(0, s²), the label by σ(Δ). Accuracy is E σ(|Δ|); s is the one that makes it .736. Scaled by c, the
    # predicted σ(cΔ) is off by |σ(cΔ) − σ(Δ)|, of one sign on each side of 1/2, where a bin ends:
    # ECE is its mean.
    def mean(function, s: float) -> float:
        density = lambda x: math.exp(-0.5 * (x / s) ** 2) / (s * math.sqrt(2 * math.pi))  # noqa: E731
        return 2 * integrate.quad(lambda x: function(x) * density(x), 0, 12 * s)[0]

    s = optimize.brentq(lambda s: mean(expit, s) - 0.736, 0.5, 3.0)
    rng = np.random.default_rng(0)
    delta = np.abs(rng.normal(scale=s, size=400_000))
    won = np.where(rng.random(len(delta)) < expit(delta), delta, -delta)  # the chosen one's lead
    rates = []
    for scale, published in ((0.5, 0.098), (1.0, 0.002), (2.0, 0.100)):
        expected = mean(lambda x, c=scale: abs(expit(c * x) - expit(x)), s)
        found = calibration(scale * won, np.zeros(len(won))).ece
        assert found == pytest.approx(expected, abs=0.004)
        assert found == pytest.approx(published, abs=0.004)
        rates.append(accuracy(scale * won, np.zeros(len(won))).value)
    assert rates[0] == rates[1] == rates[2] == pytest.approx(0.736, abs=0.003)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 2.0, 5.0])
def test_scale_changes_calibration_and_not_accuracy_exactly(scale: float) -> None:
    # All ordered pairs of responses by their levels of gold, weighted by p_i·p_j; the first wins with σ(Δ).
    p, (good,) = levels(reference(6), gold())
    delta = (good[:, None] - good[None, :]).ravel()
    weight = np.outer(p, p).ravel()
    found = reliability(expit(scale * delta), expit(delta), weight=weight)
    # All of a bin lie on one side of 1/2, where σ(cΔ) − σ(Δ) has one sign, so nothing cancels in it.
    expected = weight @ np.abs(expit(scale * delta) - expit(delta))
    assert found.ece == pytest.approx(expected, abs=1e-12)
    assert (found.ece < 1e-12) == (scale == 1.0)
    assert scale == 1.0 or found.ece > 0.01
    # A pair with Δ ≠ 0 is ordered right where its label goes with the sign of Δ, and ties are wrong:
    # Σ w·σ(|Δ|) over Δ ≠ 0, whatever the scale.
    chosen, rejected = scale * np.repeat(good, len(good)), scale * np.tile(good, len(good))
    right = np.array(
        [accuracy([a], [b]).value for a, b in zip(chosen, rejected, strict=True)]
    )  # where the first was chosen; it is with σ(Δ), and the pair the other way round has the rest
    share = 2 * (weight * expit(delta)) @ right
    assert share == pytest.approx(weight[delta != 0] @ expit(np.abs(delta[delta != 0])), abs=1e-12)


def test_best_of_n_estimator_is_unbiased_ties_included() -> None:
    # Three responses, two of which tie by proxy. All 3⁵ samples of 5: the estimator's mean is the law's gold.
    p, proxy, value = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 1.0]), np.array([0.2, -1.0, 3.0])
    sizes = [1, 2, 3, 5]
    mean = np.zeros(len(sizes))
    for sample in itertools.product(range(3), repeat=5):
        rows = list(sample)
        mean += p[rows].prod() * best_of_n(proxy[rows], value[rows], sizes)
    exact = [best_of_n_law(p, proxy, n) @ value for n in sizes]
    np.testing.assert_allclose(mean, exact, atol=1e-12)


def test_kl_of_best_of_n_is_below_its_bound_and_reaches_it_without_ties() -> None:
    p = reference(4)
    untied = np.random.default_rng(0).permutation(4096).astype(np.float64)
    for n in (2, 8, 64):
        kl = {}
        for name, score in (("tied", gold()), ("untied", untied)):
            law = best_of_n_law(p, score, n)
            held = law > 0
            kl[name] = float(law[held] @ np.log(law[held] / p[held]))
        assert kl["tied"] < kl["untied"] < best_of_n_kl(n)
    # For n = 2 the bound is log 2 − 1/2; 4096 small masses come near it.
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    law = best_of_n_law(p, untied, 2)
    assert float(law @ np.log(law / p)) == pytest.approx(best_of_n_kl(2), abs=0.01)


def test_gold_turns_over_on_a_biased_proxy_and_not_on_an_honest_one() -> None:
    # r_b = gold + b·length is what Bradley-Terry learns from an annotator of bias b (above), so that these
    # are the exact curves of the best of n. The reference is seldom long: 60 % of its tokens are silent.
    # With b = .6 a few samples find the wanted tokens, many find the length. The best response by gold
    # has gold 2; the best by the proxy has six tokens and gold 2 − .5·4 = 0.
    p, good, sizes = reference(5, scale=0.3, silence=1.5), gold(), [1, 2, 4, 8, 16, 32, 64, 128]
    honest = [float(best_of_n_law(p, good, n) @ good) for n in sizes]
    assert (np.diff(honest) > 0).all()
    assert honest[-1] > 1.9
    proxy = good + 0.6 * LENGTHS
    sizes += [256, 512, 1024, 2048]
    laws = [best_of_n_law(p, proxy, n) for n in sizes]
    found = [float(law @ good) for law in laws]
    peak = int(np.argmax(found))
    assert 0 < peak < len(sizes) - 1
    assert found[peak] > found[0] + 0.3
    assert found[-1] < found[peak] - 0.3
    # What is optimised rises all the same, and so does the length.
    assert (np.diff([float(law @ proxy) for law in laws]) > 0).all()
    assert (np.diff([float(law @ LENGTHS) for law in laws]) > 0).all()


def test_correlation_with_length_grows_with_the_bias_and_the_residual_has_none() -> None:
    uniform, good = np.full(4096, 1 / 4096), gold()
    rho = [correlation(uniform, good + b * LENGTHS, LENGTHS) for b in (0.0, 0.1, 0.2, 0.3, BIAS)]
    assert (np.diff(rho) > 0).all()
    residuals = []
    for b in (0.0, 0.3, BIAS):
        slope, _ = length_residual_fit(torch.tensor(good + b * LENGTHS), torch.tensor(LENGTHS))
        residuals.append(good + (b - slope) * LENGTHS)
        assert correlation(uniform, residuals[-1], LENGTHS) == pytest.approx(0.0, abs=1e-9)
    # b·length is itself a line in length, so the residual is the same whatever the bias was.
    np.testing.assert_allclose(residuals[1], residuals[0], atol=1e-9)
    np.testing.assert_allclose(residuals[2], residuals[0], atol=1e-9)
    biased = best_of_n_law(uniform, good + BIAS * LENGTHS, 128) @ good
    assert best_of_n_law(uniform, residuals[2].round(9), 128) @ good > biased + 0.5


def test_no_rule_of_an_ensemble_removes_a_bias_that_all_members_share() -> None:
    # Members r_k = gold + b·length + e_k. Whatever is subtracted for disagreement, length still pays.
    rng = np.random.default_rng(0)
    uniform, good = np.full(4096, 1 / 4096), gold()
    honest = torch.tensor(good + 0.3 * rng.normal(size=(5, 4096)))
    biased = honest + BIAS * torch.tensor(LENGTHS)
    for rule in ("mean", "worst", "uncertainty"):
        rewards = [combine(members, rule).numpy() for members in (honest, biased)]
        # The bias is the same for every member, so it passes through each rule unchanged.
        np.testing.assert_allclose(rewards[1] - rewards[0], BIAS * LENGTHS, atol=1e-12)
        assert correlation(uniform, rewards[1], LENGTHS) > 0.2 > correlation(uniform, rewards[0], LENGTHS)

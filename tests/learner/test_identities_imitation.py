"""From demonstrations: which divergence each method descends, and where each comes to rest.

All by enumeration (`enumerable_lm`), in float64. ρ made the demonstrations, π is the policy.
"""

import math
from collections.abc import Callable

import pytest
import torch
from enumerable_lm import ENDING, FIXED, EnumerableLM, Listing, jensen_shannon, kl
from identities_helpers import advantages_of, ascent, cosine
from torch import Tensor

from learner.advantages import generalised_advantages
from learner.discriminator_objectives import best_logit, discriminator_loss
from learner.objectives import supervised_loss
from learner.preference_objectives import dpo_loss
from rewards.models.discriminator import Form, discriminator_reward
from rewards.preferences.losses import bradley_terry, classification

BOTH = pytest.mark.parametrize("listing", [FIXED, ENDING], ids=["fixed", "ending"])

FOUR_BITS = Listing(2, 4)

Divergence = Callable[[Tensor, Tensor], Tensor]

DESCENDS: dict[Form, Divergence] = {
    "logit": kl,
    "-log(1-D)": lambda policy, demo: 2 * jensen_shannon(policy, demo),
    "log(D)": lambda policy, demo: kl(policy, demo) - 2 * jensen_shannon(policy, demo),
    "D/(1-D)": lambda policy, demo: kl(demo, policy),
}
"""Of log π and log ρ, both (N,)."""


def supervised_gradient(policy: EnumerableLM, demonstrations: Tensor) -> Tensor:
    """∇ of `supervised_loss`, each response at its chance (N,) among the demonstrations; completions only."""
    mask = policy.mask
    chances = demonstrations[:, None].expand(mask.shape)[mask]
    loss, _ = supervised_loss(chances * policy.token_log_probs()[mask], count=1.0)
    return policy.gradient(loss)


def discriminator_ascent(policy: EnumerableLM, demonstrations: Tensor, form: Form) -> Tensor:
    """The update for the reward of the best discriminator, d* = log ρ − log π, held fixed."""
    logits = demonstrations - policy.log_probs().detach()
    return ascent(policy, advantages_of(policy, discriminator_reward(logits, form)))


# --- Divergences -----------------------------------------------------------------------------------------


@BOTH
def test_supervised_fine_tuning_descends_the_forward_kl(listing: Listing) -> None:
    policy, demo = EnumerableLM.random(1, listing=listing), EnumerableLM.random(2, listing=listing)
    exact = policy.gradient(demo.kl(policy))
    torch.testing.assert_close(supervised_gradient(policy, demo.probs()), exact, atol=1e-9, rtol=0)


@BOTH
@pytest.mark.parametrize("form", DESCENDS)
def test_each_form_of_the_discriminators_reward_descends_its_divergence(listing: Listing, form: Form) -> None:
    policy, demo = EnumerableLM.random(1, listing=listing), EnumerableLM.random(2, listing=listing)
    theirs = demo.log_probs().detach()
    found = discriminator_ascent(policy, theirs, form)
    exact = policy.gradient(DESCENDS[form](policy.log_probs(), theirs))
    torch.testing.assert_close(found, -exact, atol=1e-9, rtol=0)
    assert cosine(found, -exact) >= 0.999999
    # The others' divergences have other gradients: the test can tell them apart.
    for other, divergence in DESCENDS.items():
        if other != form:
            assert cosine(found, -policy.gradient(divergence(policy.log_probs(), theirs))) < 0.999


@pytest.mark.parametrize("form", DESCENDS)
def test_a_policy_that_can_be_the_demonstrations_rests_there_whatever_the_divergence(form: Form) -> None:
    demo = EnumerableLM.random(2, listing=ENDING)
    policy = EnumerableLM(demo.logits.detach().clone().requires_grad_(), ENDING)
    assert float(discriminator_ascent(policy, demo.log_probs().detach(), form).abs().max()) < 1e-12
    assert float(supervised_gradient(policy, demo.probs()).abs().max()) < 1e-12


def test_rewards_of_one_sign_a_token_pay_for_length_or_for_stopping() -> None:
    """A discriminator that knows nothing, d = 0, asked at every token: −log(1−D) = log 2 raises E[length],
    log D = −log 2 lowers it, the logit leaves the policy alone.
    """
    policy, mask = EnumerableLM.random(3, listing=ENDING), ENDING.mask
    lengthens = policy.gradient(policy.expectation(ENDING.lengths.double()))
    for form, factor in (("-log(1-D)", math.log(2)), ("log(D)", -math.log(2)), ("logit", 0.0)):
        by_token = discriminator_reward(torch.zeros(mask.shape, dtype=torch.float64), form)
        values = torch.zeros(mask.shape, dtype=torch.float64)
        advantages, _ = generalised_advantages(by_token, values, mask, gamma=1.0, lam=1.0)
        torch.testing.assert_close(ascent(policy, advantages), factor * lengthens, atol=1e-9, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_discriminator_is_at_rest_at_the_log_ratio(smoothing: float) -> None:
    """The loss in expectation, one logit at a time: its gradient is 0 at `best_logit`, which is log(ρ/π)
    without smoothing. Its least value is then log 2 − JS(π, ρ).
    """
    policy, demo = (EnumerableLM.random(seed, listing=FOUR_BITS) for seed in (8, 9))
    p, rho = policy.probs(), demo.probs()
    logits = best_logit(rho, p, smoothing).requires_grad_()
    if smoothing == 0.0:
        torch.testing.assert_close(logits, (demo.log_probs() - policy.log_probs()).detach())
    total = torch.zeros((), dtype=torch.float64)
    for number in range(16):
        for law, demonstrated in ((rho, True), (p, False)):
            loss, _ = discriminator_loss(
                logits[number : number + 1],
                torch.tensor([demonstrated]),
                smoothing=smoothing,
                demonstrations=1,
                responses=1,
            )
            total = total + law[number] * loss
    (gradient,) = torch.autograd.grad(total, logits)
    assert float(gradient.abs().max()) < 1e-8  # the target 1 − α is a float32
    if smoothing == 0.0:
        distance = float(jensen_shannon(policy.log_probs(), demo.log_probs()))
        assert float(total) == pytest.approx(math.log(2) - distance, abs=1e-12)


# --- Rewards learned from two models' samples ------------------------------------------------------------


@pytest.mark.parametrize("loss", ["bradley-terry", "classification"])
def test_samples_of_one_model_over_anothers_teach_their_log_ratio(loss: str) -> None:
    """Winners of π_SFT, losers of π_init, drawn independently: the best reward is log π_SFT − log π_init.

    Bradley-Terry: of the two ways to draw a pair {i, j}, i wins with the chance s_i·t_j/(s_i·t_j + s_j·t_i),
    which is σ(d_i − d_j) for d = log s − log t. It tells d up to a constant, classification tells all of it.
    """
    tuned, initial = EnumerableLM.random(4, listing=ENDING), EnumerableLM.random(5, listing=ENDING)
    s, t = tuned.probs(), initial.probs()
    rows = torch.arange(len(s))
    first, second = rows.repeat_interleave(len(s)), rows.repeat(len(s))
    weight = torch.outer(s, t).flatten()

    def gradient(reward: Tensor) -> Tensor:
        leaf = reward.detach().clone().requires_grad_()
        of_pairs = bradley_terry if loss == "bradley-terry" else classification
        value, _ = of_pairs(leaf[first], leaf[second], weight=weight, count=1.0)
        (found,) = torch.autograd.grad(value, leaf)
        return found

    best = tuned.log_probs() - initial.log_probs()
    assert float(gradient(best).abs().max()) < 1e-12
    assert float(gradient(0.5 * best).abs().max()) > 1e-5
    moved = float(gradient(best + 1.0).abs().max())
    assert moved < 1e-12 if loss == "bradley-terry" else moved > 1e-5


def test_spin_rests_at_the_demonstrations_and_overshoots_below_beta_one() -> None:
    """DPO with w of ρ and l of the last iterate q, which is the reference: by the log-ratio above the optimum
    of an iteration is β·log(π/q) = log(ρ/q) + c, so π ∝ q·(ρ/q)^{1/β}: ρ itself at β = 1, beyond it below.
    From q = ρ nothing moves, at any β.
    """
    demo, last = EnumerableLM.random(6, listing=ENDING, scale=0.3), EnumerableLM.random(7, listing=ENDING)
    rows = torch.arange(len(demo.probs()))
    first, second = rows.repeat_interleave(len(rows)), rows.repeat(len(rows))

    def gradient(policy: EnumerableLM, reference: EnumerableLM, beta: float) -> float:
        weight = torch.outer(demo.probs(), reference.probs()).flatten()
        h = policy.log_probs() - reference.log_probs().detach()
        loss = dpo_loss(h[first], h[second], beta=beta, weight=weight, count=1.0)
        return float(policy.gradient(loss).abs().max())

    log_ratio = demo.log_probs().detach() - last.log_probs().detach()
    for beta in (0.1, 0.5, 1.0):
        assert gradient(last.optimum(log_ratio, beta), last, beta) < 1e-10
        copy = EnumerableLM(demo.logits.detach().clone().requires_grad_(), ENDING)
        assert gradient(copy, demo, beta) < 1e-12
        if beta < 1.0:
            assert gradient(copy, last, beta) > 1e-4
    law = last.optimum(log_ratio, 1.0).log_probs()
    torch.testing.assert_close(law, demo.log_probs(), atol=1e-9, rtol=0)


# --- A policy that cannot be the demonstrations ----------------------------------------------------------


def two_modes() -> Tensor:
    """log ρ: 0000 with 60 %, 1111 with 40 %, and 1 % of everything spread evenly."""
    law = torch.full((16,), 0.01 / 16, dtype=torch.float64)
    law[FOUR_BITS.row([0, 0, 0, 0])] += 0.99 * 0.6
    law[FOUR_BITS.row([1, 1, 1, 1])] += 0.99 * 0.4
    return law.log()


def fitted(form: Form | None, seed: int) -> tuple[EnumerableLM, float]:
    """(the factorised policy at rest, its divergence): L-BFGS along the product's own update direction."""
    demo = two_modes()
    generator = torch.Generator().manual_seed(seed)
    parameters = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    solver = torch.optim.LBFGS(
        [parameters],
        max_iter=200,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def policy() -> EnumerableLM:
        return EnumerableLM(parameters[FOUR_BITS.place_of_state].requires_grad_(), FOUR_BITS)

    def divergence(lm: EnumerableLM) -> Tensor:
        law = lm.log_probs().detach()
        return kl(demo, law) if form is None else DESCENDS[form](law, demo)

    def closure() -> Tensor:
        lm = policy()
        if form is None:
            uphill = supervised_gradient(lm, demo.exp())
        else:
            uphill = -discriminator_ascent(lm, demo, form)
        parameters.grad = torch.zeros(4, 2).double().index_add(0, FOUR_BITS.place_of_state, uphill)
        return divergence(lm)

    solver.step(closure)
    return policy(), float(divergence(policy()))


@pytest.mark.parametrize(
    ("form", "valid", "entropy"), [(None, 0.155, 2.69), ("logit", 0.996, 0.03), ("-log(1-D)", 0.996, None)]
)
def test_two_modes_and_a_policy_without_memory(
    form: Form | None, valid: float, entropy: float | None
) -> None:
    """Forward KL covers both modes and with them what lies between; reverse KL and JS take one of them.

    By hand, forward: each bit is 0 with ½·0.01 + 0.99·0.6 = 0.599: valid 0.599⁴ + 0.401⁴ = 0.1546, and the
    entropy is 4·H(0.599) = 2.693. The best of four starts.
    """
    policy, _ = min((fitted(form, seed) for seed in range(4)), key=lambda found: found[1])
    p = policy.probs()
    modes = [float(p[FOUR_BITS.row([bit] * 4)]) for bit in (0, 1)]
    assert sum(modes) == pytest.approx(valid, abs=1e-3)
    if entropy is not None:
        assert float(policy.entropy()) == pytest.approx(entropy, abs=6e-3)
    if form is None:
        assert sum(modes) == pytest.approx(0.599**4 + 0.401**4, abs=1e-6)
        assert float(policy.entropy()) == pytest.approx(
            -4 * (0.599 * math.log(0.599) + 0.401 * math.log(0.401)), abs=1e-6
        )
    else:
        assert min(modes) < 1e-4

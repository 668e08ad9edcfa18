"""KL estimators and what their gradients descend, by enumeration of a two-token model in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from learner.advantages import generalised_advantages, token_rewards
from learner.kl import KLController, k1, k2, k3

V, T = 3, 2
SEQUENCES = list(itertools.product(range(V), repeat=T))


def parameters(seed: int) -> Tensor:
    """Logits of every state: row 0 the first token's, row 1 + a the second's after token a."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1 + V, V, generator=generator, dtype=torch.float64)


def token_logprobs(logits: Tensor) -> Tensor:
    """(V², 2): log π of both tokens of every sequence."""
    table = torch.log_softmax(logits, -1)
    return torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a, b in SEQUENCES])


@pytest.fixture
def policy() -> Tensor:
    return parameters(1).requires_grad_()


@pytest.fixture
def reference() -> Tensor:
    return token_logprobs(parameters(2))


def exact_kl_gradient(policy: Tensor, reference: Tensor, *, forward: bool = False) -> Tensor:
    """∇KL(π‖ref) of whole sequences, or ∇KL(ref‖π), from the definition."""
    mine, theirs = token_logprobs(policy).sum(1), reference.sum(1)
    kl = (theirs.exp() * (theirs - mine)).sum() if forward else (mine.exp() * (mine - theirs)).sum()
    (gradient,) = torch.autograd.grad(kl, policy)
    return gradient


def test_all_three_estimate_the_same_number() -> None:
    # π = (½, ½), ref = (¼, ¾): KL = ½ log 2 + ½ log(2/3). k1 and k3 have that expectation exactly;
    # k2 = δ²/2 has ½·½·(log²2 + log²(2/3)).
    mine = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    theirs = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    kl = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert k1(mine, theirs).mean().item() == pytest.approx(kl)
    assert k3(mine, theirs).mean().item() == pytest.approx(kl)
    assert k2(mine, theirs).mean().item() == pytest.approx(0.25 * (math.log(2) ** 2 + math.log(2 / 3) ** 2))


def test_k3_is_never_negative_and_never_infinite() -> None:
    apart = torch.tensor([-1000.0, -30.0, 0.0, 30.0, 1000.0])
    estimate = k3(apart, torch.zeros(5))
    assert estimate.isfinite().all()
    assert k3(torch.linspace(-5, 5, 50), torch.zeros(50)).ge(0).all()


def test_k1_in_the_reward_gives_the_gradient_of_kl(policy: Tensor, reference: Tensor) -> None:
    """The package's own rewards and reward-to-go, with β = 1 and R = 0, summed over all sequences.

    Σ_y π(y) Σ_t A_t ∇log π_t with A_t = −Σ_{k≥t} k1_k is −∇KL(π‖ref).
    """
    logprobs = token_logprobs(policy)
    probability = logprobs.sum(1).exp().detach()
    mask = torch.ones(len(SEQUENCES), T, dtype=torch.bool)
    zero = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    rewards = token_rewards(zero, k1(logprobs.detach(), reference), mask, kl_coef=1.0)
    advantages, _ = generalised_advantages(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    surrogate = (probability[:, None] * advantages * logprobs).sum()
    (gradient,) = torch.autograd.grad(surrogate, policy)
    torch.testing.assert_close(gradient, -exact_kl_gradient(policy, reference), atol=1e-12, rtol=0)


def one_token_loss_gradient(estimator: object, policy: Tensor, reference: Tensor) -> Tensor:
    """∇ of an estimator used as a loss, expected over the *first* token only (one step)."""
    mine = torch.log_softmax(policy[0], -1)
    theirs = torch.log_softmax(parameters(2)[0], -1)
    loss = (mine.exp().detach() * estimator(mine, theirs)).sum()  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(loss, policy)
    return gradient[0]


def test_estimators_as_losses_of_one_token(policy: Tensor, reference: Tensor) -> None:
    """k1 descends nothing, k2 KL(π‖ref), k3 KL(ref‖π)."""
    mine = torch.log_softmax(policy[0], -1)
    theirs = torch.log_softmax(parameters(2)[0], -1)
    (backward,) = torch.autograd.grad((mine.exp() * (mine - theirs)).sum(), policy, retain_graph=True)
    (forward,) = torch.autograd.grad((theirs.exp() * (theirs - mine)).sum(), policy)
    torch.testing.assert_close(
        one_token_loss_gradient(k1, policy, reference), torch.zeros(V, dtype=torch.float64)
    )
    torch.testing.assert_close(one_token_loss_gradient(k2, policy, reference), backward[0])
    torch.testing.assert_close(one_token_loss_gradient(k3, policy, reference), forward[0])


def test_token_losses_leave_out_the_kl_of_later_tokens(policy: Tensor, reference: Tensor) -> None:
    """Over two tokens the k2 loss is *not* ∇KL: this is why k1 stands in the reward."""
    logprobs = token_logprobs(policy)
    loss = (logprobs.sum(1).exp().detach()[:, None] * k2(logprobs, reference)).sum()
    (gradient,) = torch.autograd.grad(loss, policy)
    exact = exact_kl_gradient(policy, reference)
    assert (gradient - exact).abs().max() > 0.01
    torch.testing.assert_close(gradient[1:], exact[1:])  # the last token has no later ones


def test_controller_by_hand() -> None:
    # KL 9 against 6: error clip(0.5, ±0.2) = 0.2; n/horizon = 100/1000: β = 0.1·(1 + 0.02).
    controller = KLController(0.1, target=6.0, horizon=1000)
    assert controller.after(9.0, 100).coef == pytest.approx(0.102)
    # KL 5.4: error −0.1: β = 0.1·(1 − 0.01).
    assert controller.after(5.4, 100).coef == pytest.approx(0.099)
    # KL −3 (a k1 estimate can be negative): error clipped at −0.2.
    assert controller.after(-3.0, 100).coef == pytest.approx(0.098)
    assert KLController(0.1, target=6.0, horizon=None).after(9.0, 100).coef == 0.1


def test_controller_never_turns_the_penalty_into_a_reward() -> None:
    """n = 100·horizon: n/horizon counts as 1, so β = 0.1·(1 ∓ 0.2); uncut, 1 − 0.2·100 is negative."""
    controller = KLController(0.1, target=6.0, horizon=10)
    assert controller.after(-3.0, 1000).coef == pytest.approx(0.08)
    assert controller.after(60.0, 1000).coef == pytest.approx(0.12)
    assert controller.after(-3.0, 10).coef == pytest.approx(0.08)  # n = horizon is where the cut begins

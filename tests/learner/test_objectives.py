"""PPO's losses against numbers worked out by hand, and their gradients."""

import math

import pytest
import torch
from torch import Tensor

from learner.objectives import entropy_bonus, policy_loss, supervised_loss, value_loss


def policy(ratios: list[float], advantages: list[float], **options: object) -> tuple[Tensor, dict, Tensor]:
    """The loss with the given ρ, its sums, and the gradient with respect to log π."""
    settings: dict = {"clip": 0.2, "dual_clip": None, "count": float(len(ratios))} | options
    weights = settings.pop("weights", torch.ones(len(ratios)))
    old = torch.full((len(ratios),), -1.5)
    logprobs = (old + torch.tensor(ratios).log()).requires_grad_()
    loss, sums = policy_loss(logprobs, old, torch.tensor(advantages), weights, **settings)
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), sums, logprobs.grad


def test_clipping_in_all_four_directions() -> None:
    # ε = 0.2. ρ=1.5, A=2: min(3, 2.4) = 2.4, clipped.   ρ=0.5, A=2: min(1, 1.6) = 1, not.
    # ρ=1.5, A=−2: min(−3, −2.4) = −3, not.              ρ=0.5, A=−2: min(−1, −1.6) = −1.6, clipped.
    # Loss = −(2.4 + 1 − 3 − 1.6)/4 = 0.3. ∂/∂log π = −ρA/4 where not clipped, else 0.
    loss, sums, gradient = policy([1.5, 0.5, 1.5, 0.5], [2.0, 2.0, -2.0, -2.0])
    assert loss.item() == pytest.approx(0.3)
    assert sums["ppo/clip_fraction"].item() == pytest.approx(0.5)
    assert sums["ppo/ratio_mean"].item() == pytest.approx(1.0)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.25, 0.75, 0.0]))


def test_approx_kl_by_hand() -> None:
    # k3 of (π_old‖π) per token is ρ − 1 − log ρ: for ρ = 2 that is 1 − log 2; for ρ = 1 it is 0.
    _, sums, _ = policy([2.0, 1.0], [1.0, 1.0])
    assert sums["ppo/approx_kl"].item() == pytest.approx((1 - math.log(2)) / 2)


def test_every_token_may_have_a_clip_range_of_its_own() -> None:
    # ρ = 1.3, A = 1. ε = 0.2: 1.2, clipped. ε = 0.1: 1.1, clipped. ε = 0.4: 1.3, not.
    clip = torch.tensor([0.2, 0.1, 0.4], dtype=torch.float64)
    loss, sums, gradient = policy([1.3, 1.3, 1.3], [1.0, 1.0, 1.0], clip=clip)
    assert loss.item() == pytest.approx(-(1.2 + 1.1 + 1.3) / 3)
    assert sums["ppo/clip_fraction"].item() == pytest.approx(2 / 3)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, -1.3 / 3]))


def test_one_clip_range_for_all_is_the_same_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, old, advantages, weights = torch.randn(4, 200, generator=generator)
    for clip in (0.2, 0.1, 0.3, 0.28):
        options = {"dual_clip": None, "count": 200.0}
        one, _ = policy_loss(logprobs, old, advantages, weights, clip=clip, **options)
        each = torch.full((200,), clip, dtype=torch.float64)
        many, _ = policy_loss(logprobs, old, advantages, weights, clip=each, **options)
        assert torch.equal(one, many)


def test_decoupled_and_coupled_losses_by_hand() -> None:
    # π/μ = 1.5, the learner has not moved yet (π = π_prox), A = 1, ε = 0.2.
    # Decoupled: ρ = π/π_prox = 1, w = π_prox/μ = 1.5: −1.5·1, gradient −1.5.
    # Coupled: ρ = π/μ = 1.5 is clipped to 1.2, no gradient: the clip bounds the sampler's distance as well.
    sampler, proximal = torch.tensor([-2.0]), torch.tensor([-2.0 + math.log(1.5)])
    logprobs = proximal.clone().requires_grad_()
    ones, advantages = torch.ones(1), torch.ones(1)
    options = {"clip": 0.2, "dual_clip": None, "count": 1.0}
    weight = (proximal - sampler).exp()
    decoupled, _ = policy_loss(logprobs, proximal, advantages, weight, **options)
    decoupled.backward()
    assert decoupled.item() == pytest.approx(-1.5)
    assert logprobs.grad.item() == pytest.approx(-1.5)
    logprobs.grad = None
    coupled, _ = policy_loss(logprobs, sampler, advantages, ones, **options)
    coupled.backward()
    assert coupled.item() == pytest.approx(-1.2)
    assert logprobs.grad.item() == 0.0


def test_dual_clip_bounds_a_loss_that_exploded() -> None:
    # c = 3, A = −1: ρ = 10 gives min(10, 3) = 3 with no gradient; ρ = 2 gives 2, as before.
    # A = +1, ρ = 10: the ordinary clip, −1.2.
    loss, _, gradient = policy([10.0, 2.0, 10.0], [-1.0, -1.0, 1.0], dual_clip=3.0, count=1.0)
    assert loss.item() == pytest.approx(3.0 + 2.0 - 1.2)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 2.0, 0.0]))


def test_weights_stand_outside_the_minimum_and_zero_removes_a_token() -> None:
    # Losses 1·(−2) and 0·(−2) and 0.5·(−2.4), divided by the full count of 3.
    weights = torch.tensor([1.0, 0.0, 0.5])
    loss, _, gradient = policy([1.0, 1.0, 1.5], [2.0, 2.0, 2.0], weights=weights)
    assert loss.item() == pytest.approx((-2.0 - 1.2) / 3)
    torch.testing.assert_close(gradient, torch.tensor([-2 / 3, 0.0, 0.0]))


def test_at_ratio_one_the_gradient_is_the_policy_gradient() -> None:
    advantages = [0.3, -1.2, 2.0]
    _, sums, gradient = policy([1.0, 1.0, 1.0], advantages)
    torch.testing.assert_close(gradient, -torch.tensor(advantages) / 3)
    assert sums["ppo/clip_fraction"].item() == 0.0


def test_value_loss_by_hand() -> None:
    # ε_v = 0.2, V_old = 0, R = 1. V = 0.5: clipped to 0.2, max(0.25, 0.64) = 0.64, clipped, no gradient.
    # V = 0.1: both 0.81, gradient V − R = −0.9. V = −0.5, R = −1: max(0.25, 0.64) = 0.64.
    # V = 1.5, R = 1, V_old = 1.4: inside the range, 0.25, gradient 0.5. Loss = ½·2.34/4.
    values = torch.tensor([0.5, 0.1, -0.5, 1.5], requires_grad=True)
    loss, sums = value_loss(
        values,
        torch.tensor([0.0, 0.0, 0.0, 1.4]),
        torch.tensor([1.0, 1.0, -1.0, 1.0]),
        clip=0.2,
        count=4.0,
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.64 + 0.81 + 0.64 + 0.25) / 4)
    assert sums["ppo/value_clip_fraction"].item() == pytest.approx(0.5)
    torch.testing.assert_close(values.grad, torch.tensor([0.0, -0.9, 0.0, 0.5]) / 4)


def test_unclipped_value_loss_is_half_the_mean_square() -> None:
    loss, _ = value_loss(
        torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]), clip=None, count=2.0
    )
    assert loss.item() == pytest.approx(0.5 * (4 + 1) / 2)


def test_entropy_bonus_and_supervised_loss_by_hand() -> None:
    loss, sums = entropy_bonus(torch.tensor([1.0, 3.0]), count=4.0)
    assert loss.item() == -1.0
    assert sums["policy/entropy"].item() == 1.0
    loss, _ = supervised_loss(torch.tensor([-1.0, -3.0]), count=8.0)
    assert loss.item() == 0.5


def test_losses_of_parts_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, old, advantages, weights = torch.randn(4, 12, generator=generator)
    options = {"clip": 0.2, "dual_clip": 3.0, "count": 12.0}
    whole, _ = policy_loss(logprobs, old, advantages, weights, **options)
    parts = [
        policy_loss(logprobs[part], old[part], advantages[part], weights[part], **options)[0]
        for part in (slice(0, 1), slice(1, 8), slice(8, 12))
    ]
    torch.testing.assert_close(whole, torch.stack(parts).sum())

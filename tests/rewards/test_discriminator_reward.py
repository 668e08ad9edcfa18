"""Each form of the discriminator's reward descends the divergence that it names; what is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rewards.build import check_rewards
from rewards.models.discriminator import Form, discriminator_reward
from rewards.settings import RewardSettings


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


def twice_js(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    return kl(p, m) + kl(q, m)


DIVERGENCES: dict[Form, Callable[[Tensor, Tensor], Tensor]] = {
    "logit": kl,
    "-log(1-D)": twice_js,
    "log(D)": lambda policy, rho: kl(policy, rho) - twice_js(policy, rho),
    "D/(1-D)": lambda policy, rho: kl(rho, policy),
}


@pytest.mark.parametrize("form", DIVERGENCES)
def test_the_policy_gradient_is_that_of_the_divergence(form: Form) -> None:
    """64 responses, π = softmax θ, D = ρ/(ρ + π) held fixed: Σ π·r·∇log π = −∇(divergence), exactly.

    E.g. the logit: Σ ∇π·log(ρ/π) = −∇KL(π‖ρ), since Σ π·∇log π = 0. The other forms likewise, the constants
    of JS dropping out for the same reason.
    """
    draw = torch.Generator().manual_seed(4)
    theta = torch.randn(64, generator=draw, dtype=torch.float64).requires_grad_()
    rho = torch.softmax(torch.randn(64, generator=draw, dtype=torch.float64), 0)
    policy = torch.softmax(theta, 0)
    reward = discriminator_reward((rho / policy).log().detach(), form)
    (gradient,) = torch.autograd.grad((policy * reward).sum(), theta, retain_graph=True)
    (exact,) = torch.autograd.grad(DIVERGENCES[form](policy, rho), theta, retain_graph=True)
    torch.testing.assert_close(gradient, -exact, rtol=1e-9, atol=1e-12)
    others = [name for name in DIVERGENCES if name != form]
    for name in others:  # and of no other one
        (other,) = torch.autograd.grad(DIVERGENCES[name](policy, rho), theta, retain_graph=True)
        assert torch.cosine_similarity(gradient, -other, dim=0) < 0.999


def test_the_signs_that_make_two_of_the_forms_reward_length_or_stopping() -> None:
    logits = torch.linspace(-30, 30, 61, dtype=torch.float64)
    assert (discriminator_reward(logits, "-log(1-D)") > 0).all()
    assert (discriminator_reward(logits, "log(D)") < 0).all()
    d = logits.sigmoid()
    inner = logits.abs() < 20
    for form, formula in {
        "-log(1-D)": -(1 - d).log(),
        "log(D)": d.log(),
        "D/(1-D)": d / (1 - d),
        "logit": d.log() - (1 - d).log(),
    }.items():
        torch.testing.assert_close(
            discriminator_reward(logits, form)[inner], formula[inner], rtol=1e-6, atol=1e-9
        )


def table(**changes: object) -> RewardSettings:
    return RewardSettings.model_validate({"kind": "discriminator"} | changes)


def test_what_cannot_be_a_discriminator_is_refused() -> None:
    check_rewards([table(form="log(D)", weight=0.5)], None)
    with pytest.raises(ValueError, match=r"'b'.*one already"):
        check_rewards([table(name="a"), table(name="b")], None)
    with pytest.raises(ValueError, match="cannot judge"):
        check_rewards([table(role="evaluate"), RewardSettings(kind="exact")], None)
    with pytest.raises(ValueError, match=r"reward\.form = 'log\(D\)'.*no effect"):
        check_rewards([RewardSettings(kind="exact", form="log(D)")], None)
    with pytest.raises(ValueError, match=r"reward\.logit_limit = 3"):
        check_rewards([RewardSettings(kind="exact", logit_limit=3.0)], None)
    with pytest.raises(ValueError, match=r"reward\.path"):
        check_rewards([table(path="somewhere")], None)

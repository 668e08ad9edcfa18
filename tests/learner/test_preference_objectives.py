"""DPO, IPO, KTO and SimPO by hand, their gradients at the start, and that parts add up to the whole."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.preference_objectives import (
    dpo_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    simpo_loss,
)

LN2, LN3 = math.log(2.0), math.log(3.0)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_dpo_by_hand() -> None:
    """β = ½, h_w − h_l = 2 ln 3: βΔ = ln 3 and σ(ln 3) = ¾. The second pair is the other way round: ¼.

    With ε = 0.1: −0.9·log ¾ − 0.1·log ¼; with a margin of ln 3 the first pair is at σ(0) = ½.
    """
    chosen, rejected = tensor(LN3, 0.0), tensor(-LN3, 2 * LN3)
    plain = dpo_loss(chosen, rejected, beta=0.5)
    assert float(plain) == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    smooth = dpo_loss(chosen[:1], rejected[:1], beta=0.5, label_smoothing=0.1)
    assert float(smooth) == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25))
    margin = dpo_loss(chosen[:1], rejected[:1], beta=0.5, margin=tensor(LN3))
    assert float(margin) == pytest.approx(LN2)


def test_dpo_begins_at_log_two_with_half_beta_as_gradient() -> None:
    """d/dh_w of −log σ(β(h_w − h_l)) is −β·σ(−β·0) = −β/2, times 1 − 2ε; over two pairs half of it each."""
    chosen = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    rejected = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss = dpo_loss(chosen, rejected, beta=0.4, label_smoothing=0.25)
    assert float(loss.detach()) == pytest.approx(LN2)
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    torch.testing.assert_close(gradients[0], tensor(-0.05, -0.05))  # −0.4/2·(1 − 0.5)/2
    torch.testing.assert_close(gradients[1], tensor(0.05, 0.05))


def test_ipo_by_hand() -> None:
    """1/(2τ) = 5 at τ = 0.1: gaps of 2 and 6 are 3 and 1 off, squares 9 and 1. At the aim the loss is 0."""
    loss = ipo_loss(tensor(2.0, 6.0), tensor(0.0, 0.0), tau=0.1)
    assert float(loss) == pytest.approx(5.0)
    assert float(ipo_loss(tensor(3.0), tensor(-2.0), tau=0.1)) == pytest.approx(0.0)


def test_kto_by_hand() -> None:
    """β = 1, z₀ = ln 3. A good response at h = 2 ln 3 gains ln 3: 1 − σ(ln 3) = ¼, times λ_D = 1.

    A bad one at the same h: 1 − σ(−ln 3) = ¾, times λ_U = 2. The mean is (¼ + 3/2)/2.
    """
    scores, labels = tensor(2 * LN3, 2 * LN3), torch.tensor([True, False])
    loss = kto_loss(scores, labels, LN3, beta=1.0, undesirable_weight=2.0)
    assert float(loss) == pytest.approx((0.25 + 1.5) / 2)
    assert float(kto_loss(scores[:1], labels[:1], LN3, beta=1.0)) == pytest.approx(0.25)


def test_the_reference_point_of_kto_is_no_less_than_zero_and_a_constant() -> None:
    mismatched = torch.tensor([1.0, 3.0], requires_grad=True)
    point = kto_reference_point(mismatched)
    assert float(point) == 2.0
    assert not point.requires_grad
    assert float(kto_reference_point(-mismatched)) == 0.0


def test_the_reference_point_of_kto_counts_a_weight_of_two_twice() -> None:
    """h = 1, 3, −5 with weights 1, 2, 0: (1 + 3 + 3)/3; without weight there is no point above 0."""
    mismatched = tensor(1.0, 3.0, -5.0)
    assert float(kto_reference_point(mismatched, tensor(1.0, 2.0, 0.0))) == pytest.approx(7 / 3)
    assert float(kto_reference_point(mismatched, tensor(0.0, 0.0, 0.0))) == 0.0


def test_simpo_by_hand() -> None:
    """β = 2, γ = ln 3: means of −1 and −1 − ln 3 differ by ln 3, 2·ln 3 − ln 3 = ln 3: −log ¾."""
    loss = simpo_loss(tensor(-1.0), tensor(-1.0 - LN3), beta=2.0, gamma=LN3)
    assert float(loss) == pytest.approx(-math.log(0.75))


LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": lambda c, r, **w: dpo_loss(c, r, beta=0.3, label_smoothing=0.1, **w),
    "ipo": lambda c, r, **w: ipo_loss(c, r, tau=0.2, **w),
    "simpo": lambda c, r, **w: simpo_loss(c, r, beta=2.0, gamma=0.5, **w),
    "kto": lambda c, r, **w: kto_loss(c, r > 0, 0.3, beta=0.7, desirable_weight=1.5, **w),
}


@pytest.mark.parametrize("name", LOSSES)
def test_parts_add_up_and_a_weight_of_two_is_two_pairs(name: str) -> None:
    """Weights 1, 2, 0, 1, 2: count 6; the third pair may as well not be there."""
    draw = torch.Generator().manual_seed(1)
    chosen, rejected = (torch.randn(5, generator=draw, dtype=torch.float64) for _ in range(2))
    weight = tensor(1.0, 2.0, 0.0, 1.0, 2.0)
    loss = LOSSES[name]
    whole = loss(chosen, rejected, weight=weight)
    parts = [loss(chosen[p], rejected[p], weight=weight[p], count=6.0) for p in ([0, 3], [1, 2], [4])]
    assert float(sum(parts)) == pytest.approx(float(whole), abs=1e-12)
    written_out = [0, 1, 1, 3, 4, 4]
    assert float(loss(chosen[written_out], rejected[written_out])) == pytest.approx(float(whole), abs=1e-12)


def test_far_from_the_aim_nothing_overflows() -> None:
    """float32, gaps of ±10⁴: the losses stay finite and keep their slopes of β and 0."""
    gap = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = dpo_loss(gap, torch.zeros(2), beta=1.0, count=1.0)
    (slope,) = torch.autograd.grad(loss, gap)
    assert float(loss.detach()) == pytest.approx(1e4)
    assert slope.tolist() == [0.0, -1.0]
    kto = kto_loss(gap.detach(), torch.tensor([True, True]), 0.0, beta=1.0)
    assert float(kto) == pytest.approx(0.5)

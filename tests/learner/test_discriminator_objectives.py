"""The discriminator's loss, penalty and metrics in numbers made by hand; which sequences an update takes."""

import math
from pathlib import Path

import pytest
import torch
from tiny_learner import save_model

from actors.packing import pack
from learner.discriminator_data import Replay, in_turn, plan_updates
from learner.discriminator_module import Discriminator
from learner.discriminator_objectives import (
    best_logit,
    calibration_error,
    classification_metrics,
    discriminator_loss,
    penalty_of,
)
from rewards.models.transformer import load_classifier


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_loss_is_the_mean_of_two_means() -> None:
    """α = .1. −log D = softplus(−d), −log(1 − D) = softplus(d), so ℓ = softplus(d) − t·d.

    One demonstration (d = .5, t = .9) weighs ½, two responses (d = −1 and 2, t = .1) ¼ each.
    """
    logits = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    shown = torch.tensor([True, False, False])
    loss, sums = discriminator_loss(logits, shown, smoothing=0.1, demonstrations=1, responses=2)
    expected = 0.5 * (softplus(0.5) - 0.45) + 0.25 * (softplus(-1.0) + 0.1) + 0.25 * (softplus(2.0) - 0.2)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    parts = [
        discriminator_loss(logits[i], shown[i], smoothing=0.1, demonstrations=1, responses=2)[1]
        for i in (torch.tensor([0, 2]), torch.tensor([1]))
    ]
    assert sum(float(part["loss/discriminator"]) for part in parts) == pytest.approx(expected, rel=1e-12)
    assert float(sums["loss/discriminator"]) == float(loss)
    none, _ = discriminator_loss(
        torch.zeros(4), torch.arange(4) < 2, smoothing=0.0, demonstrations=2, responses=2
    )
    assert float(none) == pytest.approx(math.log(2.0))  # no opinion


@pytest.mark.parametrize(("smoothing", "ratio"), [(0.0, 3.0), (0.1, 2.8 / 1.2)])
def test_the_loss_is_smallest_at_the_log_ratio(smoothing: float, ratio: float) -> None:
    """ρ_E = (3, 1)/4 and π = (1, 3)/4 as four demonstrations and four responses of two kinds.

    Without smoothing d* = ±log 3; with α = .1 it is log[(.9·3 + .1·1)/(.1·3 + .9·1)] = log(2.8/1.2).
    """
    rho, policy = torch.tensor([0.75, 0.25]).double(), torch.tensor([0.25, 0.75]).double()
    best = best_logit(rho, policy, smoothing)
    assert best.tolist() == pytest.approx([math.log(ratio), -math.log(ratio)])
    kinds = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1])
    shown = torch.arange(8) < 4
    for start, expected in ((best, 0.0), (best + 0.5, None)):
        d = start.clone().requires_grad_()
        loss, _ = discriminator_loss(d[kinds], shown, smoothing=smoothing, demonstrations=4, responses=4)
        (gradient,) = torch.autograd.grad(loss, d)
        if expected is None:
            assert (gradient > 1e-3).all()
        else:
            assert gradient.abs().max() < 1e-12


def test_smoothing_bounds_the_best_logit() -> None:
    """Where only demonstrations are, ρ/π = ∞, the best logit is log((1 − α)/α); without smoothing it is ∞."""
    only = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    assert best_logit(*only, 0.05).tolist() == pytest.approx([math.log(19.0), -math.log(19.0)])
    assert best_logit(*only, 0.0).tolist() == [math.inf, -math.inf]


def test_calibration_by_hand() -> None:
    """D = .75 twice (one demonstration), D = .25 once (none), and D = .95 once (one): U = 4.

    2/4·|.75 − .5| + 1/4·|.25 − 0| + 1/4·|.95 − 1| = .125 + .0625 + .0125 = .2
    """
    logits = torch.tensor([0.75, 0.75, 0.25, 0.95]).double().logit()
    assert calibration_error(logits, torch.tensor([True, False, False, True])) == pytest.approx(0.2)
    assert calibration_error(torch.tensor([50.0, -50.0]), torch.tensor([True, False])) == pytest.approx(0.0)


def test_accuracy_of_each_kind() -> None:
    """Demonstrations 2, −1, 0: (1 + 0 + ½)/3; fresh −3, 4: ½; replayed −1: 1; all responses 2/3."""
    logits = torch.tensor([2.0, -1.0, 0.0, -3.0, 4.0, -1.0])
    shown = torch.arange(6) < 3
    fresh = torch.tensor([False, False, False, True, True, False])
    found = classification_metrics(logits, shown, fresh)
    assert found["discriminator/accuracy_demonstrations"] == pytest.approx(0.5)
    assert found["discriminator/accuracy_fresh"] == pytest.approx(0.5)
    assert found["discriminator/accuracy_replayed"] == 1.0
    assert found["discriminator/accuracy"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert found["discriminator/logit_fresh"] == pytest.approx(0.5)
    alone = classification_metrics(logits[:5], shown[:5], fresh[:5])
    assert "discriminator/accuracy_replayed" not in alone


def test_the_penalty_has_a_gradient_of_its_own() -> None:
    """d_i = Σ_t a·e_it: each of the L places has gradient a, so the sum over N sequences is N·L·‖a‖².

    Its derivative by a is 2·N·L·a: here N·L = 6 and a = (1, −2), 6·5 = 30 and (12, −24).
    """
    a = torch.tensor([1.0, -2.0], requires_grad=True)
    embedded = torch.randn(2, 3, 2, requires_grad=True)
    penalty = penalty_of((embedded @ a).sum(1), embedded)
    assert float(penalty.detach()) == pytest.approx(30.0)
    assert torch.autograd.grad(penalty, a)[0].tolist() == pytest.approx([12.0, -24.0])


def test_packing_changes_neither_logits_nor_penalty(tmp_path: Path) -> None:
    """Three sequences in one row give what each gives alone: the penalty is a sum over them."""
    torch.set_num_threads(1)
    model = load_classifier(save_model(tmp_path), precision="float32", device="cpu", attention="eager")
    torch.nn.init.normal_(model.score.weight)
    module = Discriminator(model)
    pairs = [((1, 2, 3), (4,)), ((5,), (6,)), ((7, 8, 9, 10, 11), (2,))]

    def answers(some: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[torch.Tensor, torch.Tensor]:
        (batch,) = pack(some, micro_batch_tokens=64)
        logits, penalty = module(
            batch.input_ids, batch.position_ids, batch.positions, batch.targets, penalty=True
        )
        ordered = torch.zeros(len(some))
        ordered[batch.sequence] = logits[0].detach()
        return ordered, penalty

    logits, penalty = answers(pairs)
    alone = [answers([pair]) for pair in pairs]
    assert logits.tolist() == pytest.approx([float(one[0]) for one in alone], abs=1e-5)
    assert float(penalty.detach()) == pytest.approx(sum(float(one[1].detach()) for one in alone), rel=1e-4)
    assert float(penalty.detach()) > 0.1
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert float(logits[0]) == pytest.approx(float(model(input_ids=ids).logits), abs=1e-5)
        plain, nothing = module(ids, torch.arange(4)[None], torch.tensor([2]), torch.tensor([4]))
    assert float(plain) == pytest.approx(float(logits[0]), abs=1e-5)
    assert float(nothing) == 0.0
    # The penalty's derivative by the head against a central difference.
    weight = model.score.weight
    (exact,) = torch.autograd.grad(penalty, weight)
    step = torch.zeros_like(weight)
    step[0, 3] = 1e-2
    with torch.no_grad():
        weight += step
    above = float(answers(pairs)[1].detach())
    with torch.no_grad():
        weight -= 2 * step
    below = float(answers(pairs)[1].detach())
    assert float(exact[0, 3]) == pytest.approx((above - below) / 2e-2, rel=2e-2)


# --- which sequences ---------------------------------------------------------------------------------------


def test_an_epoch_shows_every_demonstration_once() -> None:
    first = [in_turn(start, 2, 5, seed=3) for start in (0, 2, 4)]
    flat = [number for part in first for number in part]
    assert sorted(flat[:5]) == [0, 1, 2, 3, 4]
    assert flat == in_turn(0, 6, 5, seed=3)
    epochs = [tuple(in_turn(5 * epoch, 5, 5, seed=3)) for epoch in range(6)]
    assert len(set(epochs)) > 1
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert sorted(in_turn(0, 15, 5, seed=0)) == sorted([0, 1, 2, 3, 4] * 3)  # more than there are


def test_a_plan_takes_every_fresh_response_once_and_as_many_demonstrations_as_responses() -> None:
    """8 responses in 2 updates of 4; a quarter replayed: 4·.25/.75 = 1.33, so 1; 5 demonstrations each."""
    plan = {"demonstrations": 7, "updates": 2, "replay": 0.25, "seed": 1, "step": 3}
    plans = plan_updates(fresh=8, replayable=20, consumed=4, **plan)  # type: ignore[arg-type]
    assert sorted(number for one in plans for number in one.fresh) == list(range(8))
    assert [len(one.replayed) for one in plans] == [1, 1]
    assert [*plans[0].demonstrations, *plans[1].demonstrations] == in_turn(4, 10, 7, seed=1)
    assert plans == plan_updates(fresh=8, replayable=20, consumed=4, **plan)  # type: ignore[arg-type]
    empty = plan_updates(fresh=8, replayable=0, consumed=0, **plan)  # type: ignore[arg-type]
    assert [(len(one.fresh), len(one.replayed), len(one.demonstrations)) for one in empty] == [(4, 0, 4)] * 2
    few = plan_updates(fresh=1, replayable=0, consumed=0, **plan)  # type: ignore[arg-type]
    assert [one.fresh for one in few] == [(0,)]


def test_the_replay_keeps_the_newest_and_survives_a_checkpoint() -> None:
    replay = Replay(3)
    replay.add([((1, 2), (3,)), ((4,), (5, 6, 7)), ((8,), (9,)), ((1,), (1, 1))])
    assert [replay[i] for i in range(len(replay))] == [((4,), (5, 6, 7)), ((8,), (9,)), ((1,), (1, 1))]
    again = Replay(3)
    again.restore(replay.tensors())
    assert [again[i] for i in range(3)] == [replay[i] for i in range(3)]
    again.restore(Replay(3).tensors())
    assert len(again) == 0

"""Losses of reward models against numbers worked out by hand, and how parts add up."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from rewards.preferences.ensembles import combine, disagreement, standardise
from rewards.preferences.losses import (
    bradley_terry,
    classification,
    length_residual_fit,
    odin,
    odin_head_penalty,
    odin_heads,
    pearson,
)

LOG3 = math.log(3)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_pairs(count: int, rows: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (count,) if rows is None else (rows, count)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_bradley_terry_by_hand() -> None:
    # σ(log 3) = 3/4 and σ(−log 3) = 1/4: L = (log 4/3 + log 4)/2. One of two pairs is right.
    loss, figures = bradley_terry(tensor(LOG3, 0.0), tensor(0.0, LOG3))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert figures["preference/accuracy"] == pytest.approx(0.5)
    assert figures["preference/margin"] == pytest.approx(0.0)
    assert figures["preference/reward"] == pytest.approx(LOG3 / 2)
    # A margin of log 3 uses up the first pair's lead: σ(0) = 1/2.
    loss, _ = bradley_terry(tensor(LOG3), tensor(0.0), margin=tensor(LOG3))
    assert loss.item() == pytest.approx(math.log(2))
    # Centring: 0.01·(1 + 3)² = 0.16 on top of −log σ(−2).
    loss, figures = bradley_terry(tensor(1.0), tensor(3.0), centring=0.01)
    assert loss.item() == pytest.approx(math.log1p(math.exp(2)) + 0.16)
    assert figures["loss/centring"] == pytest.approx(0.16)
    assert figures["loss/preference"] == pytest.approx(math.log1p(math.exp(2)))


def test_a_tie_is_wrong() -> None:
    assert bradley_terry(tensor(1.0), tensor(1.0))[1]["preference/accuracy"] == 0.0


def test_gradient_of_bradley_terry() -> None:
    # ∂/∂r_w −log σ(r_w − r_l) = −σ(r_l − r_w) = −1/4 at a lead of log 3; half of it each of two pairs.
    chosen, rejected = tensor(LOG3, 0.0).requires_grad_(), tensor(0.0, 0.0).requires_grad_()
    bradley_terry(chosen, rejected)[0].backward()
    torch.testing.assert_close(chosen.grad, tensor(-0.125, -0.25))
    torch.testing.assert_close(rejected.grad, tensor(0.125, 0.25))


def test_classification_by_hand() -> None:
    # −½·(log σ(log 3) + log σ(−0)) = ½·(log 4/3 + log 2); both 0 is log 2, as for Bradley-Terry.
    loss, _ = classification(tensor(LOG3), tensor(0.0))
    assert loss.item() == pytest.approx(0.5 * (math.log(4 / 3) + math.log(2)))
    assert classification(tensor(0.0), tensor(0.0))[0].item() == pytest.approx(math.log(2))


def test_far_rewards_stay_finite() -> None:
    for loss in (bradley_terry, classification):
        value = loss(tensor(-2000.0), tensor(2000.0))[0]
        assert math.isfinite(value.item())
        assert value.item() >= 2000.0


@pytest.mark.parametrize("loss", [bradley_terry, classification])
def test_parts_add_up_and_a_weight_is_a_repetition(loss) -> None:
    chosen, rejected = random_pairs(12)
    weight = torch.arange(1, 13, dtype=torch.float64)
    options = {"centring": 0.1} if loss is bradley_terry else {}
    whole, figures = loss(chosen, rejected, weight=weight, **options)
    parts = [
        loss(chosen[rows], rejected[rows], weight=weight[rows], count=12.0, **options)
        for rows in (slice(0, 5), slice(5, 6), slice(6, 12))
    ]
    assert sum(part.item() for part, _ in parts) == pytest.approx(whole.item(), abs=1e-12)
    for name, value in figures.items():
        assert sum(part[name] for _, part in parts) == pytest.approx(value, abs=1e-12)
    times = weight.long()
    repeated, again = loss(
        chosen.repeat_interleave(times), rejected.repeat_interleave(times), count=12.0, **options
    )
    assert repeated.item() == pytest.approx(whole.item(), abs=1e-12)
    assert again == pytest.approx(figures, abs=1e-12)


def test_odin_against_scipy() -> None:
    chosen, rejected = random_pairs(9, rows=2)
    lengths = torch.tensor(np.random.default_rng(1).integers(1, 40, (2, 9)))
    loss, figures = odin(chosen, rejected, lengths, coefficient=0.7)
    lead = (chosen - rejected).sum(dim=0).numpy()
    quality, following = (np.concatenate([chosen[k], rejected[k]]) for k in (0, 1))
    flat = lengths.reshape(-1).numpy()
    rho_l, rho_q, rho_sum = (
        stats.pearsonr(flat, values).statistic for values in (following, quality, quality + following)
    )
    expected = np.log1p(np.exp(-lead)).mean() + 0.7 * ((1 - rho_l) + abs(rho_q) + abs(rho_sum))
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert figures["odin/correlation_quality"] == pytest.approx(rho_q)
    assert figures["odin/correlation_length"] == pytest.approx(rho_l)
    # Accuracy is that of the quality head: it is the reward.
    assert figures["preference/accuracy"] == pytest.approx(float((chosen[0] > rejected[0]).double().mean()))


def test_odin_drives_length_out_of_quality() -> None:
    # The label follows quality and length alike. Descending ODIN in the weights of a linear reward must leave
    # length to the second head; Bradley-Terry alone gives it to whichever head there is.
    rng = np.random.default_rng(0)
    features = torch.tensor(rng.normal(size=(2, 400, 2)))  # (side, pair, quality and length)
    lead = (features[0] - features[1]).sum(dim=1).numpy()
    first = torch.tensor(rng.random(400) < 1 / (1 + np.exp(-lead)))[:, None]
    chosen = torch.where(first, features[0], features[1])
    rejected = torch.where(first, features[1], features[0])
    weight = torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss, _ = odin(weight @ chosen.T, weight @ rejected.T, torch.stack([chosen[:, 1], rejected[:, 1]]))
        loss.backward()
        optimizer.step()
    quality, following = (weight.detach() @ torch.cat([chosen, rejected]).T).numpy()
    length = torch.cat([chosen, rejected])[:, 1].numpy()
    assert abs(stats.pearsonr(quality, length).statistic) < 0.1
    assert stats.pearsonr(following, length).statistic > 0.9


def test_odin_heads_by_hand() -> None:
    # (1, 2, 3) is centred to (−1, 0, 1), of norm √2; (0, 0, 3) to (−1, −1, 2), of norm √6. ŵ_Q·ŵ_L = 3/√12.
    weight = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    heads = odin_heads(weight)
    torch.testing.assert_close(heads[0], tensor(-1, 0, 1) / math.sqrt(2))
    assert odin_head_penalty(weight).item() == pytest.approx(3 / math.sqrt(12))
    assert odin_head_penalty(torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])).item() == pytest.approx(
        0.0, abs=1e-7
    )


def test_what_does_not_vary_has_no_correlation_and_no_gradient() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.arange(7, dtype=dtype)
        y = torch.full((7,), 0.1, dtype=dtype, requires_grad=True)
        rho = pearson(x, y)
        rho.backward()
        assert rho.item() == 0.0
        assert y.grad is not None
        assert not y.grad.any()


def test_length_residual_by_hand() -> None:
    # Through (1, 1), (2, 3), (3, 5): slope 2, intercept −1.
    assert length_residual_fit(tensor(1, 3, 5), tensor(1, 2, 3)) == pytest.approx((2.0, -1.0))
    # Two prompts, each of slope 1, the second 10 higher and 2 longer. Within: centred lengths ∓½, rewards ∓½:
    # slope 1; mean reward 6.5, mean length 2.5: intercept 4. Pooled: lengths ∓1.5, ∓.5; rewards ∓5.5, ∓4.5;
    # slope (8.25 + 2.25 + 2.25 + 8.25)/5 = 4.2.
    rewards, lengths = tensor(1, 2, 11, 12), tensor(1, 2, 3, 4)
    assert length_residual_fit(rewards, lengths, torch.tensor([5, 5, 9, 9])) == pytest.approx((1.0, 4.0))
    assert length_residual_fit(rewards, lengths)[0] == pytest.approx(4.2)
    assert length_residual_fit(tensor(1, 2), tensor(3, 3)) == pytest.approx((0.0, 1.5))
    with pytest.raises(ValueError, match="not finite"):
        length_residual_fit(tensor(1, math.nan), tensor(1, 2))


def test_ensembles_by_hand() -> None:
    # Means 1 and 10, deviations 1 and 5: (0, 2) → (−1, 1); (5, 25) → (−1, 3).
    scores = standardise(
        torch.tensor([[0.0, 2.0], [5.0, 25.0]]), torch.tensor([1.0, 10.0]), torch.tensor([1.0, 5.0])
    )
    torch.testing.assert_close(scores, torch.tensor([[-1.0, 1.0], [-1.0, 3.0]]))
    # Second response: mean 2, least 1, variance ((1−2)² + (3−2)²)/2 = 1.
    assert combine(scores, "mean").tolist() == [-1.0, 2.0]
    assert combine(scores, "worst").tolist() == [-1.0, 1.0]
    assert combine(scores, "uncertainty", 0.5).tolist() == [-1.0, 1.5]
    assert disagreement(scores).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="choose one of mean, worst, uncertainty"):
        combine(scores, "median")


def test_an_ensemble_of_one_is_its_member() -> None:
    scores = torch.tensor([[1.0, -2.0]])
    for rule in ("mean", "worst", "uncertainty"):
        assert torch.equal(combine(scores, rule), scores[0])
    assert disagreement(scores).tolist() == [0.0, 0.0]

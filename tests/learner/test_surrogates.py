"""Surrogates by hand, and whole objectives against the formulas of their papers on random tensors."""

import itertools
import math
from typing import Any

import pytest
import torch
from published_losses import OBJECTIVES, Response, published_loss
from torch import Tensor

from learner.batch import Sample, Share, make_share
from learner.objectives import kl_loss, policy_loss
from learner.presets import PRESETS
from learner.settings import CorrectionSettings, PPOSettings
from learner.surrogates import divisor, token_scales
from learner.targets import Batch, Targets, prepare

LIMIT = 7


def loss_of(kind: str, log_ratios: list[float], advantages: list[float], sequence: list[int], **options: Any):
    """The loss at the given log ρ, its sums, and the gradient with respect to log π."""
    settings: dict[str, Any] = {"clip": 0.2, "dual_clip": None, "count": 1.0} | options
    old = torch.full((len(log_ratios),), -1.5, dtype=torch.float64)
    logprobs = (old + torch.tensor(log_ratios, dtype=torch.float64)).requires_grad_()
    loss, sums = policy_loss(
        logprobs,
        old,
        torch.tensor(advantages, dtype=torch.float64),
        torch.ones(len(log_ratios), dtype=torch.float64),
        surrogate=kind,
        sequence=torch.tensor(sequence),
        **settings,
    )
    loss.backward()
    return loss.item(), sums, logprobs.grad.tolist()


def test_the_geometric_mean_is_one_ratio_for_all_tokens_of_a_response() -> None:
    # Response 0: log ρ = 0.1 and −0.3, s = e^−0.1 = 0.905 inside the range; A = 2.
    # Response 1: log ρ = 0.5, s = e^0.5 = 1.65; A = 1 is clipped at 1.2, no gradient.
    # Σ_t s_t gives 2 tokens · (−0.905·2) and −1.2; ∂s_t/∂log π_t = s.
    s = math.exp(-0.1)
    loss, sums, gradient = loss_of("geometric_clip", [0.1, 0.5, -0.3], [2.0, 1.0, 2.0], [0, 1, 0])
    assert loss == pytest.approx(-4 * s - 1.2)
    assert gradient == pytest.approx([-2 * s, 0.0, -2 * s])
    assert float(sums["ppo/clip_fraction"]) == 1.0  # one token over a count of 1


def test_the_product_counts_a_response_once_whatever_its_length() -> None:
    # Response 0: log ρ = 0.05 twice, s = e^0.1 = 1.105, A = 2: −2s, of which each token carries half the
    # value and all of the gradient. Response 1: s = e^0.3 > 1.2, A = −1: not clipped, the larger loss: +s.
    s, other = math.exp(0.1), math.exp(0.3)
    loss, _, gradient = loss_of("sequence_clip", [0.05, 0.05, 0.3], [2.0, 2.0, -1.0], [0, 0, 1])
    assert loss == pytest.approx(-2 * s + other)
    assert gradient == pytest.approx([-2 * s, -2 * s, other])
    # A = 1 and s = e^0.3: clipped at 1.2, over both tokens together.
    loss, _, gradient = loss_of("sequence_clip", [0.1, 0.2], [1.0, 1.0], [0, 0])
    assert loss == pytest.approx(-1.2)
    assert gradient == [0.0, 0.0]


def test_cispo_keeps_the_gradient_of_what_it_clips() -> None:
    # log ρ = 1: the weight is cut at 1.5, and −1.5·A stays the gradient; log ρ = −2: e^−2 is cut at 0.8.
    loss, sums, gradient = loss_of("cispo", [1.0, -2.0, 0.1], [2.0, 1.0, -1.0], [0, 0, 0], clip_high=0.5)
    assert gradient == pytest.approx([-3.0, -0.8, math.exp(0.1)])
    assert loss == pytest.approx(3.0 * 0.5 + 0.8 * 3.5 - math.exp(0.1) * 1.4)
    assert float(sums["ppo/clip_fraction"]) == 2.0
    # ε = 1 leaves the weight free below.
    _, _, gradient = loss_of("cispo", [-2.0], [1.0], [0], clip=1.0, clip_high=0.5)
    assert gradient == pytest.approx([-math.exp(-2)])


def test_the_range_may_be_wider_above_than_below() -> None:
    # ρ = 1.25: within [0.8, 1.28]. ρ = 0.75 with A < 0: clipped at 0.8, as with ε_high = ε.
    up, down = math.log(1.25), math.log(0.75)
    loss, _, gradient = loss_of("token_clip", [up, down], [1.0, -1.0], [0, 0], clip_high=0.28)
    assert loss == pytest.approx(-1.25 + 0.8)
    assert gradient == pytest.approx([-1.25, 0.0])


@pytest.mark.parametrize(("kind", "length"), [("token_clip", 1), ("geometric_clip", 2), ("sequence_clip", 2)])
def test_dual_clip_bounds_every_kind_of_ratio(kind: str, length: int) -> None:
    """A = −1 and s = e² > 3: the loss is 3 for a token or, of a product, for the response; no gradient."""
    each = 2.0 if kind != "sequence_clip" else 2.0 / length
    advantages = [-1.0] * length
    loss, _, gradient = loss_of(kind, [each] * length, advantages, [0] * length, dual_clip=3.0)
    assert loss == pytest.approx(3.0 * (length if kind == "geometric_clip" else 1))
    assert gradient == [0.0] * length


@pytest.mark.parametrize("kind", ["token_clip", "sequence_clip", "geometric_clip", "cispo"])
def test_at_ratio_one_all_have_the_policy_gradient(kind: str) -> None:
    """−A ∇log π a token; GSPO's 1/|y| is a matter of how its tokens are added up."""
    advantages = [0.5, 0.5, -2.0, 0.5]
    _, sums, gradient = loss_of(kind, [0.0] * 4, advantages, [0, 0, 1, 0])
    assert gradient == pytest.approx([-a for a in advantages])
    assert float(sums["ppo/clip_fraction"]) == 0.0


def test_scales_and_divisors_by_hand() -> None:
    # Two responses of 3 and 1 tokens of at most 10, all losses 1.
    mask = torch.tensor([[True, True, True], [True, False, False]])
    expected = {
        "token_mean": 4 / 4,
        "sequence_mean": (1 + 1) / 2,
        "sequence_sum": (3 + 1) / 2,
        "constant": (3 + 1) / 20,
    }
    for kind, value in expected.items():
        scales = token_scales(mask, kind)
        assert (scales[~mask] == 0).all()
        by = divisor(kind, tokens=4, sequences=2, limit=10)
        assert float(scales.sum() / by) == pytest.approx(value), kind
    torch.testing.assert_close(token_scales(mask, "sequence_mean")[0], torch.full((3,), 1 / 3))


# --- Whole objectives --------------------------------------------------------------------------------------


def random_step(seed: int) -> tuple[Share, Tensor, Tensor]:
    """A rank's share, (log π_old, log π) as (B, T) float64: 4 groups of 3, responses of 1 to 7 tokens."""
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for number in range(12):
        length = int(torch.randint(1, LIMIT + 1, (1,), generator=draw))
        reference = (-torch.rand(length, generator=draw) * 3).tolist()
        reward = float(torch.rand(1, generator=draw))
        tokens = tuple(range(length))
        samples.append(
            Sample((1,), tokens, tuple(reference), tuple(reference), (0,) * length, reward, True, number % 4)
        )
    share = make_share(samples)
    old = torch.where(share.mask, -torch.rand(share.mask.shape, generator=draw).double() * 3, 0.0)
    new = old + 0.4 * torch.randn(share.mask.shape, generator=draw).double()
    return share, old, torch.where(share.mask, new, 0.0)


def alone(values: Tensor, *, maximum: bool = False) -> Tensor:
    """One rank has nothing to add up."""
    return values


def targets_of(objective: str, share: Share, old: Tensor) -> tuple[PPOSettings, Targets]:
    """What the learner prepares before the first update, on one rank."""
    settings = PPOSettings(**PRESETS[objective]["ppo"])
    batch = Batch(
        groups=torch.tensor([sample.group for sample in share.samples]),
        mine=torch.arange(len(share.samples)),
        limit=LIMIT,
        largest_lag=0,
        kl_coef=settings.kl_coef,
        rank=0,
        ranks=1,
    )
    targets, _ = prepare(
        share,
        old,
        torch.zeros_like(old),
        settings=settings,
        correction=CorrectionSettings(weights="none"),
        batch=batch,
        reduce=alone,
    )
    return settings, targets


def part_of_loss(
    share: Share, settings: PPOSettings, targets: Targets, logprobs: Tensor, rows: list[int]
) -> Tensor:
    """The loss of the responses `rows`, divided as if with all others."""
    chosen = torch.zeros_like(share.mask)
    chosen[rows] = True
    chosen &= share.mask
    by = divisor(
        settings.aggregation, tokens=int(share.mask.sum()), sequences=len(share.samples), limit=LIMIT
    )
    loss, _ = policy_loss(
        logprobs[chosen],
        targets.anchor[chosen],
        targets.advantages[chosen],
        targets.weights[chosen],
        clip=targets.clip[chosen],
        clip_high=targets.clip_high[chosen],
        dual_clip=settings.dual_clip or None,
        count=by,
        surrogate=settings.surrogate,
        sequence=chosen.nonzero()[:, 0],
    )
    if settings.kl_in == "loss":
        distance, _ = kl_loss(
            logprobs[chosen],
            share.reference_logprobs[chosen],
            targets.scales[chosen],
            estimator=settings.kl_estimator,
            count=by,
        )
        loss = loss + targets.kl_loss_coef * distance
    return loss


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_are_those_of_the_paper(objective: str, seed: int) -> None:
    """On random log-probabilities with ρ far from 1; parts of the batch add up to the whole."""
    share, old, new = random_step(seed)
    settings, targets = targets_of(objective, share, old)
    assert targets.values is None
    logprobs = new.clone().requires_grad_()
    loss = part_of_loss(share, settings, targets, logprobs, list(range(12)))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    leaf = new.clone().requires_grad_()
    responses = [
        Response(
            leaf[row, :length],
            old[row, :length],
            share.reference_logprobs[row, :length].double(),
            old[row, :length],
            sample.reward,
            sample.group,
        )
        for row, sample in enumerate(share.samples)
        for length in [len(sample.response)]
    ]
    expected = published_loss(objective, responses, LIMIT)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)
    assert float(gradient.abs().max()) > 1e-3
    bounds = [0, 1, 5, 12]
    parts = [
        part_of_loss(share, settings, targets, new, list(range(a, b))) for a, b in itertools.pairwise(bounds)
    ]
    assert float(sum(parts)) == pytest.approx(float(loss), abs=1e-9)


def test_a_group_may_be_split_over_ranks() -> None:
    """Three ranks own samples 0–4, 5 and 6–11: the advantages are those of one rank that owns them all."""
    share, old, _ = random_step(0)
    _, whole = targets_of("rloo", share, old)
    settings = PPOSettings(**PRESETS["rloo"]["ppo"])
    groups = torch.tensor([sample.group for sample in share.samples])
    parts = [range(5), range(5, 6), range(6, 12)]
    totals = torch.zeros(12, dtype=torch.float64)
    for row, sample in enumerate(share.samples):
        length = len(sample.response)
        distance = (old - share.reference_logprobs)[row, :length].sum()
        totals[row] = sample.reward - settings.kl_coef * distance

    for rank, rows in enumerate(parts):
        mine = make_share([share.samples[row] for row in rows])
        width = mine.mask.shape[1]
        batch = Batch(groups, torch.tensor(list(rows)), LIMIT, 0, settings.kl_coef, rank, 3)

        def reduce(values: Tensor, *, maximum: bool = False, rows: range = rows) -> Tensor:
            """Adds what the other ranks would; only the returns, (12,), are looked at here."""
            if values.shape != (12,):
                return values
            torch.testing.assert_close(values[list(rows)], totals[list(rows)], atol=1e-6, rtol=0)
            assert int((values != 0).sum()) == len(rows)
            return totals

        found, _ = prepare(
            mine,
            old[list(rows), :width],
            torch.zeros(len(rows), width, dtype=torch.float64),
            settings=settings,
            correction=CorrectionSettings(weights="none"),
            batch=batch,
            reduce=reduce,
        )
        torch.testing.assert_close(found.advantages, whole.advantages[list(rows), :width], atol=1e-6, rtol=0)

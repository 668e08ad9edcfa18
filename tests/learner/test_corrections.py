"""Weights, masks, clip range and damping: by hand, by enumeration, and their identities."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.corrections import (
    contracted_clip,
    correct,
    correction_metrics,
    damping,
    geometric_keep,
    harmful,
    icepop,
    m2_limit,
    raw_weights,
    sequence_keep,
    truncated,
)
from learner.mismatch import effective_share
from learner.settings import CorrectionSettings

EVERY_OPTION: list[dict[str, Any]] = [
    {"weights": "none"},
    {"weights": "tis"},
    {"weights": "icepop"},
    {"weights": "sequence"},
    {"mask": "sequence"},
    {"mask": "geometric"},
    {"mask": "m2po"},
]

# Two sequences, of 3 tokens and of 2; w = 4, 1, ½ and 8, 2.
WEIGHTS = torch.tensor([[4.0, 1.0, 0.5], [8.0, 2.0, 7.0]], dtype=torch.float64)
TRUSTED = torch.tensor([[True, True, True], [True, True, False]])
ADVANTAGES = torch.tensor([[1.0, 1.0, -1.0], [-1.0, 1.0, 5.0]], dtype=torch.float64)


def corrected(**options: Any) -> tuple[list[float], dict[str, float]]:
    """Weights of the example, one sequence after the other, and what was done to them."""
    result = correct(WEIGHTS.log(), TRUSTED, ADVANTAGES, CorrectionSettings(**options))
    return result.weights.flatten().tolist(), correction_metrics(result.sums)


def test_weights_and_masks_by_hand() -> None:
    """Products are 2 and 16; geometric means 2^(1/3) ≈ 1.26 and 4. The 7 is distrusted: always 0."""
    ones, done = corrected(weights="none")
    assert ones == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    assert done == {
        "correction/cut_fraction": 0.0,
        "correction/masked_tokens": 0.0,
        "correction/masked_sequences": 0.0,
        "correction/weight_mean": 1.0,
    }
    cut, done = corrected(weights="tis", cap=2.0)
    assert cut == pytest.approx([2.0, 1.0, 0.5, 2.0, 2.0, 0.0])
    assert done["correction/cut_fraction"] == pytest.approx(2 / 5)  # 4 and 8, not 2 itself
    assert done["correction/weight_mean"] == pytest.approx(7.5 / 5)
    popped, done = corrected(weights="icepop", icepop_low=0.6, icepop_high=5.0)
    assert popped == pytest.approx([4.0, 1.0, 0.0, 0.0, 2.0, 0.0])
    assert done["correction/cut_fraction"] == pytest.approx(2 / 5)
    whole, done = corrected(weights="sequence", cap=8.0)
    assert whole == pytest.approx([2.0, 2.0, 2.0, 8.0, 8.0, 0.0])
    assert done["correction/cut_fraction"] == pytest.approx(2 / 5)
    for mask in ({"mask": "sequence", "sequence_cap": 3.0}, {"mask": "geometric", "geometric_high": 1.3}):
        masked, done = corrected(weights="none", **mask)
        assert masked == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
        assert done["correction/masked_tokens"] == pytest.approx(2 / 5)
        assert done["correction/masked_sequences"] == pytest.approx(1 / 2)
        assert done["correction/weight_mean"] == pytest.approx(3 / 5)
    both, _ = corrected(weights="tis", mask="sequence")
    assert both == pytest.approx([2.0, 1.0, 0.5, 0.0, 0.0, 0.0])


def test_a_sequence_mask_has_no_lower_bound_and_a_geometric_one_has() -> None:
    tiny = torch.tensor([[-9.0, -9.0]], dtype=torch.float64)
    assert sequence_keep(tiny.sum(1), cap=3.0).tolist() == [True]
    assert geometric_keep(tiny.sum(1), torch.tensor([2]), low=0.5, high=5.0).tolist() == [False]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), copies=st.integers(2, 5))
def test_a_geometric_mask_does_not_ask_how_long_a_sequence_is(seed: int, copies: int) -> None:
    ratios = 0.3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    counts = torch.full((6,), 4)
    once = geometric_keep(ratios.sum(1), counts, low=0.8, high=1.25)
    again = geometric_keep(ratios.repeat(1, copies).sum(1), copies * counts, low=0.8, high=1.25)
    assert once.tolist() == again.tolist()


def test_harm_is_moving_further_away_from_the_sampler() -> None:
    """A > 0 raises π, which is harm where π > μ already (ℓ > 0); A < 0 lowers it, harm where ℓ < 0."""
    ratios = torch.tensor([0.3, -0.3, 0.3, -0.3, 0.0])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    assert harmful(ratios, advantages).tolist() == [True, False, False, True, False]


def test_second_moment_by_hand() -> None:
    """Squares 1, 2, 3, 6: mean 3. Budget 2.5: without the 6 the mean is 2. Budget 1.4: without 3 too, 1.5 is
    still above; without 2, 1 is within.
    """
    squares = torch.tensor([6.0, 1.0, 3.0, 2.0])
    assert m2_limit(squares, budget=3.0) == math.inf
    assert m2_limit(squares, budget=2.5) == 3.0
    assert m2_limit(squares, budget=1.4) == 1.0
    assert m2_limit(squares, budget=0.5) < 0  # nothing may stay
    assert m2_limit(torch.zeros(0), budget=0.5) == math.inf
    # Of 1, 2, 2 with budget 1.6 one 2 would have to go: both do.
    assert m2_limit(torch.tensor([2.0, 1.0, 2.0]), budget=1.6) == 1.0


def test_m2po_masks_harmful_tokens_only() -> None:
    """ℓ = log 4, 0, −log 2 | log 8, log 2 with A = +, +, − | −, +: harmful are log 4, −log 2 and log 2, with
    squares 4u, u, u (u = log² 2). A budget of 1.5u lets u, u stay. The 8, of A < 0, is left alone.
    """
    unit = math.log(2) ** 2
    limit = m2_limit(torch.tensor([4 * unit, unit, unit], dtype=torch.float64), budget=1.5 * unit)
    chosen = CorrectionSettings(weights="none", mask="m2po")
    result = correct(WEIGHTS.log(), TRUSTED, ADVANTAGES, chosen, largest_square=limit)
    assert result.weights.tolist() == [[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    assert correction_metrics(result.sums)["correction/masked_tokens"] == pytest.approx(1 / 5)


@settings(max_examples=100, deadline=None)
@given(
    squares=st.lists(st.floats(0, 4), min_size=1, max_size=12),
    budget=st.floats(0.01, 2),
)
def test_m2po_keeps_as_many_as_the_budget_allows(squares: list[float], budget: float) -> None:
    limit = m2_limit(torch.tensor(squares, dtype=torch.float64), budget=budget)
    kept = [value for value in squares if value <= limit]
    assert not kept or sum(kept) / len(kept) <= budget * (1 + 1e-9)
    gone = sorted(value for value in squares if value > limit)
    if gone:  # with the next one (and all its ties) it would be too much
        more = kept + [value for value in gone if value == gone[0]]
        assert sum(more) / len(more) > budget * (1 - 1e-9)


def test_clip_range_and_damping_by_hand() -> None:
    clip = contracted_clip(torch.tensor([0, 1, 4]), clip=0.2, rate=0.5)
    torch.testing.assert_close(clip, torch.tensor([0.2, 0.2 / 1.5, 0.2 / 3], dtype=torch.float64))
    assert contracted_clip(torch.tensor([0, 9]), clip=0.2, rate=0.0).tolist() == [0.2, 0.2]
    assert damping(0.25, target=1.0) == 0.5
    assert damping(0.25, target=0.5) == pytest.approx(0.5**0.5)
    assert damping(0.6, target=0.5) == 1.0


def test_damping_is_the_spread_of_a_weighted_mean() -> None:
    """The variance of Σ w·g / Σ w over independent g is Σw²/(Σw)² = 1/(B·ESS share): a rate in proportion to
    √share moves the weights as noisily as one of an unweighted batch.
    """
    weights = torch.tensor([3.0, 1.0, 1.0, 1.0])
    share = effective_share(4.0, float(weights.sum()), float(weights.square().sum()))
    variance = float((weights.square().sum()) / weights.sum() ** 2)
    assert damping(share, target=1.0) ** 2 * variance == pytest.approx(1 / 4)


@pytest.mark.parametrize("options", EVERY_OPTION)
def test_on_policy_every_option_weighs_with_exactly_one(options: dict[str, Any]) -> None:
    trusted = torch.tensor([[True, True, False], [True, False, False]])
    result = correct(torch.zeros(2, 3).double(), trusted, torch.randn(2, 3), CorrectionSettings(**options))
    assert torch.equal(result.weights, trusted.float())
    done = correction_metrics(result.sums)
    assert done["correction/weight_mean"] == 1.0
    assert done["correction/cut_fraction"] == done["correction/masked_tokens"] == 0.0


def test_sums_of_parts_add_up() -> None:
    chosen = CorrectionSettings(mask="sequence")
    whole = correct(WEIGHTS.log(), TRUSTED, ADVANTAGES, chosen).sums
    parts = [correct(WEIGHTS[i].log(), TRUSTED[i], ADVANTAGES[i], chosen).sums for i in ([0], [], [1])]
    torch.testing.assert_close(whole, sum(parts))


def test_huge_ratios_stay_finite() -> None:
    raw = raw_weights(torch.tensor([900.0, -900.0]))
    assert raw.isfinite().all()
    assert truncated(raw, cap=2.0)[0].item() == 2.0
    assert icepop(raw, low=0.5, high=5.0).tolist() == [0.0, 0.0]


# --- Which weights give the right gradient, by enumeration of all two-token responses over 3 symbols -------

MU_FIRST = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MU_THEN = torch.tensor([[0.6, 0.2, 0.2], [0.3, 0.4, 0.3], [0.2, 0.2, 0.6]], dtype=torch.float64)
PI_FIRST = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
PI_THEN = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1], [0.5, 0.4, 0.1]], dtype=torch.float64)
REWARD = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.5, 0.0], [0.0, 1.0, 3.0]], dtype=torch.float64)


def first_step_gradient(weights: Tensor) -> Tensor:
    """E_μ[w·R·∇ log π(a₁)] with respect to the logits of the first token, w (3, 3) by response.

    ∂ log π(a₁)/∂ logit_k = 1[a₁ = k] − π(k).
    """
    probability = MU_FIRST[:, None] * MU_THEN
    score = torch.eye(3, dtype=torch.float64) - PI_FIRST[None]  # (a₁, k)
    return torch.einsum("ab,ab,ab,ak->k", probability, weights, REWARD, score)


def test_sequence_weights_are_exact_and_token_weights_are_not() -> None:
    """Truth: ∂E_π[R]/∂logit_k = π(k)·(Q_k − J), with Q_k = Σ_b π(b|k)·R(k, b) and J = Σ_k π(k)·Q_k.

    Q = (1.3, 0.5, 0.7), J = 0.82: (0.144, −0.096, −0.048). Token weights w₁ take the second token from μ:
    Q^μ = (0.6, 0.5, 2.0), J^μ = 1.13 stand for Q and J, which gives (−0.159, −0.189, 0.348): of three signs
    two are wrong.
    """
    token = (PI_FIRST / MU_FIRST)[:, None].expand(3, 3)
    sequence = token * PI_THEN / MU_THEN
    truth = torch.tensor([0.144, -0.096, -0.048], dtype=torch.float64)
    torch.testing.assert_close(first_step_gradient(sequence), truth)
    biased = torch.tensor([-0.159, -0.189, 0.348], dtype=torch.float64)
    torch.testing.assert_close(first_step_gradient(token), biased)


def test_truncation_is_biased_towards_the_sampler() -> None:
    """C = 1 on two symbols, μ = (¾, ¼), π = (¼, ¾), R = (0, 1): E_μ[min(w, 1)·R] = ¼·1, not π's ¾ (w = 3)."""
    ratios = torch.tensor([1 / 4, 3 / 4]).log() - torch.tensor([3 / 4, 1 / 4]).log()
    estimate = float(
        (torch.tensor([0.75, 0.25]) * truncated(raw_weights(ratios), cap=1.0) * torch.tensor([0, 1])).sum()
    )
    assert estimate == pytest.approx(0.25)

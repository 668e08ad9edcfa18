"""What the updates of a step are computed from: rewards, advantages, value targets, weights and masks.

    log π_prox, V ─► r_t = −β·k1 + R ─► GAE ─► whitening ─► (M2PO needs the sign of the advantage)
                                     └► value targets: GAE or V-trace
    ℓ = log π_prox − log μ ─► measured as it is ─► weights, masks, clip range, damping

Everything is fixed before the first update. `reduce` adds up (or takes the largest) over ranks and is the
only thing here that is not a function of tensors; every rank makes the same calls of it.

Legend: B sequences on this rank, T their longest response.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from learner import advantages as adv
from learner import mismatch
from learner.batch import Share
from learner.corrections import (
    contracted_clip,
    correct,
    correction_metrics,
    damping,
    harmful,
    m2_limit,
    raw_weights,
)
from learner.kl import k1, k3
from learner.settings import CorrectionSettings, PPOSettings


class Reduce(Protocol):
    """The sum (or maximum) over ranks, on the CPU; leaves its argument alone."""

    def __call__(self, values: Tensor, *, maximum: bool = False) -> Tensor:
        """Collective."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What all ranks know of a step: its samples and largest lag, β, and this rank's place."""

    samples: int
    largest_lag: int
    kl_coef: float
    rank: int
    ranks: int


@dataclass(frozen=True, slots=True)
class Targets:
    """What the updates of a step are computed from, all (B, T) on this rank.

    `old_logprobs` is log π_prox, `anchor` what the ratio is taken against (π_prox or μ) and `clip` its range.
    `lr_factor` multiplies the policy's learning rate.
    """

    old_logprobs: Tensor
    anchor: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    clip: Tensor
    lr_factor: float


def prepare(
    share: Share,
    old_logprobs: Tensor,
    old_values: Tensor,
    *,
    settings: PPOSettings,
    correction: CorrectionSettings,
    batch: Batch,
    reduce: Reduce,
) -> tuple[Targets, dict[str, float]]:
    """Everything that stays fixed during the updates, and what there is to say about it."""
    rewards, metrics = _rewards(share, old_logprobs, settings, batch, reduce)
    advantages, returns = adv.generalised_advantages(
        rewards, old_values, share.mask, gamma=settings.gamma, lam=settings.gae_lambda
    )
    spread = reduce(adv.moments(advantages, share.mask))
    whitened = advantages
    if settings.whiten_advantages:
        whitened = adv.whiten(advantages, share.mask, spread, shift_mean=True)
    ratios = mismatch.log_ratios(old_logprobs, share.sampler_logprobs)
    if correction.value_target == "vtrace":
        # A token whose sampler is not known counts as on-policy, so that the trace goes on.
        returns = adv.vtrace_targets(
            rewards,
            old_values,
            torch.where(share.trusted, raw_weights(ratios), 1.0).to(old_values),
            share.mask,
            gamma=settings.gamma,
            lam=settings.gae_lambda,
            rho_cap=correction.vtrace_rho,
            c_cap=correction.vtrace_c,
        )
    metrics |= _value_metrics(old_values, returns, share.mask, reduce)
    metrics["advantage/mean"], metrics["advantage/std"] = adv.mean_and_std(spread)
    metrics |= measure(share, ratios, batch.largest_lag + 1, reduce)
    limit = torch.inf
    if correction.mask == "m2po":
        squares = ratios.square()[share.trusted & harmful(ratios, whitened)]
        everywhere = gather(squares, batch, reduce)
        limit = m2_limit(everywhere, budget=correction.m2_budget)
        metrics["correction/m2"] = float(everywhere.mean()) if len(everywhere) else 0.0
    corrected = correct(ratios, share.trusted, whitened, correction, largest_square=limit)
    metrics |= correction_metrics(reduce(corrected.sums))
    clip = contracted_clip(share.lags, clip=settings.clip, rate=correction.clip_by_lag)
    metrics["correction/clip_range_min"] = settings.clip / (1 + correction.clip_by_lag * batch.largest_lag)
    factor = _lr_factor(metrics, correction)
    metrics["correction/lr_factor"] = factor
    anchor = old_logprobs
    if correction.ratio == "behaviour":
        # Where the sampler is not known the weight is 0; π_prox keeps the ratio there a ratio.
        anchor = torch.where(share.trusted, share.sampler_logprobs, old_logprobs)
    targets = Targets(old_logprobs, anchor, old_values, whitened, returns, corrected.weights, clip, factor)
    return targets, metrics


def measure(share: Share, ratios: Tensor, lag_count: int, reduce: Reduce) -> dict[str, float]:
    """How far the sampler was from the learner, over all ranks; see `learner.mismatch`."""
    sums = mismatch.lag_sums(ratios, share.trusted, share.lags, lag_count=lag_count)
    totals, counts = mismatch.sequence_totals(ratios, share.trusted)
    log_weights = totals[counts > 0]
    extremes = torch.tensor([-torch.inf, 0.0], dtype=torch.float64)
    if len(log_weights):
        extremes = torch.stack([log_weights.max(), ratios[share.trusted].abs().max()])
    largest_weight, largest_ratio = reduce(extremes, maximum=True).tolist()
    sequences = reduce(mismatch.sequence_sums(log_weights, largest_weight))
    untrusted = reduce((share.mask & ~share.trusted).sum().double().reshape(1))
    metrics = mismatch.mismatch_metrics(reduce(sums), sequences, largest_ratio)
    return metrics | {"mismatch/nonfinite_tokens": float(untrusted)}


def gather(values: Tensor, batch: Batch, reduce: Reduce) -> Tensor:
    """The (N,) values of all ranks, one after another, float64: each fills in its part of a sum of zeros."""
    counts = torch.zeros(batch.ranks, dtype=torch.float64)
    counts[batch.rank] = len(values)
    sizes = [int(count) for count in reduce(counts).tolist()]
    start = sum(sizes[: batch.rank])
    whole = torch.zeros(sum(sizes), dtype=torch.float64)
    whole[start : start + len(values)] = values
    return reduce(whole)


def _rewards(
    share: Share, old_logprobs: Tensor, settings: PPOSettings, batch: Batch, reduce: Reduce
) -> tuple[Tensor, dict[str, float]]:
    """Token rewards, (B, T), and the distance to the reference."""
    mask, reference = share.mask, share.reference_logprobs
    deltas = torch.where(mask, k1(old_logprobs, reference), 0.0)
    rewards = adv.token_rewards(share.rewards, deltas, mask, kl_coef=batch.kl_coef)
    if settings.whiten_rewards:
        spread = reduce(adv.moments(rewards, mask))
        rewards = adv.whiten(rewards, mask, spread, shift_mean=False)
    positive = torch.where(mask, k3(old_logprobs, reference), 0.0)
    sums = torch.stack([deltas.double().sum(), positive.double().sum(), mask.sum().double()])
    k1_sum, k3_sum, tokens = reduce(sums).tolist()
    return rewards, {
        "kl/sequence": k1_sum / batch.samples,
        "kl/token": k1_sum / tokens,
        "kl/token_k3": k3_sum / tokens,
        "kl/coef": batch.kl_coef,
        "kl/penalty": batch.kl_coef * k1_sum / batch.samples,
    }


def _value_metrics(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce) -> dict[str, float]:
    return_moments = reduce(adv.moments(returns, mask))
    error_moments = reduce(adv.moments(returns - values, mask))
    mean, std = adv.mean_and_std(return_moments)
    return {
        "value/explained_variance": adv.explained_variance(return_moments, error_moments),
        "value/mean": adv.mean_and_std(reduce(adv.moments(values, mask)))[0],
        "return/mean": mean,
        "return/std": std,
    }


def _lr_factor(metrics: dict[str, float], correction: CorrectionSettings) -> float:
    """1 without damping, and where no token can be weighed."""
    name = {"none": "", "token": "mismatch/ess", "sequence": "mismatch/sequence_ess"}[
        correction.damp_lr_by_ess
    ]
    if name not in metrics:
        return 1.0
    return damping(metrics[name], target=correction.damp_ess_target)

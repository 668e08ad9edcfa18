"""What the updates of a step are computed from: rewards, advantages, value targets, weights and masks.

    log π_prox, V ─► r_t = −β·k + R ─► advantages ─► whitening ─► (M2PO needs the sign of the advantage)
                                    └► value targets: GAE or V-trace
    ℓ = log π_prox − log μ ─► measured as it is ─► weights, masks, clip range, damping

Everything is fixed before the first update. `reduce` adds up (or takes the largest) over ranks and is the
only thing here that is not a function of tensors; every rank makes the same calls of it.

Legend: S sequences of the step, B of them on this rank, T their longest response.
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
from learner.group_advantages import group_advantages, overlong_penalties
from learner.kl import estimate, k1, k3
from learner.settings import CorrectionSettings, PPOSettings
from learner.surrogates import token_scales


class Reduce(Protocol):
    """The sum (or maximum) over ranks, on the CPU; leaves its argument alone."""

    def __call__(self, values: Tensor, *, maximum: bool = False) -> Tensor:
        """Collective."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What all ranks know of a step: its samples' groups, largest lag, β, and this rank's place.

    `groups`, (S,), numbers the group of every sample, and `mine`, (B,), says which samples are this rank's.
    `limit` is the longest response that is sampled, in tokens.
    """

    groups: Tensor
    mine: Tensor
    limit: int
    largest_lag: int
    kl_coef: float
    rank: int
    ranks: int

    @property
    def samples(self) -> int:
        """S."""
        return len(self.groups)


@dataclass(frozen=True, slots=True)
class ValueTargets:
    """What the value model learns, and what it said before; both (B, T)."""

    old_values: Tensor
    returns: Tensor

    def chosen(self, places: tuple[Tensor, Tensor]) -> "ValueTargets":
        """Those of a micro-batch's tokens, (N,)."""
        return ValueTargets(self.old_values[places], self.returns[places])


@dataclass(frozen=True, slots=True)
class Targets:
    """What the updates of a step are computed from, all (B, T) on this rank.

    `old_logprobs` is log π_prox, `anchor` what the ratio is taken against (π_prox or μ), `clip` and
    `clip_high` its range. `scales` is what `ppo.aggregation` multiplies a token with; `weights` has it as
    well, beside the correction. `kl_loss_coef` is β of a penalty in the loss, `lr_factor` multiplies the
    policy's learning rate.
    """

    old_logprobs: Tensor
    anchor: Tensor
    advantages: Tensor
    values: ValueTargets | None
    weights: Tensor
    scales: Tensor
    clip: Tensor
    clip_high: Tensor
    kl_loss_coef: float
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
    ratios = mismatch.log_ratios(old_logprobs, share.sampler_logprobs)
    values = None
    if settings.has_values:
        advantages, values = _with_values(
            share, rewards, old_values, ratios, settings=settings, correction=correction
        )
        metrics |= _value_metrics(values, share.mask, reduce)
    else:
        advantages = _without_values(rewards, share.mask, settings, batch, reduce)
    spread = reduce(adv.moments(advantages, share.mask))
    whitened = advantages
    if settings.whiten_advantages:
        whitened = adv.whiten(advantages, share.mask, spread, shift_mean=True)
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
    clip, clip_high = (
        contracted_clip(share.lags, clip=width, rate=correction.clip_by_lag)
        for width in (settings.clip, settings.clip_high or settings.clip)
    )
    metrics["correction/clip_range_min"] = settings.clip / (1 + correction.clip_by_lag * batch.largest_lag)
    factor = _lr_factor(metrics, correction)
    metrics["correction/lr_factor"] = factor
    anchor = old_logprobs
    if correction.ratio == "behaviour":
        # Where the sampler is not known the weight is 0; π_prox keeps the ratio there a ratio.
        anchor = torch.where(share.trusted, share.sampler_logprobs, old_logprobs)
    scales = token_scales(share.mask, settings.aggregation)
    targets = Targets(
        old_logprobs=old_logprobs,
        anchor=anchor,
        advantages=whitened,
        values=values,
        weights=corrected.weights * scales,
        scales=scales,
        clip=clip,
        clip_high=clip_high,
        kl_loss_coef=batch.kl_coef if settings.kl_in == "loss" else 0.0,
        lr_factor=factor,
    )
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
    outcomes, metrics = _outcomes(share, settings, batch, reduce)
    penalties = deltas
    if settings.kl_estimator != "k1":
        penalties = torch.where(mask, estimate(settings.kl_estimator, old_logprobs, reference), 0.0)
    inside = batch.kl_coef if settings.kl_in == "reward" else 0.0
    rewards = adv.token_rewards(outcomes, penalties, mask, kl_coef=inside)
    if settings.whiten_rewards:
        spread = reduce(adv.moments(rewards, mask))
        rewards = adv.whiten(rewards, mask, spread, shift_mean=False)
    positive = torch.where(mask, k3(old_logprobs, reference), 0.0)
    sums = torch.stack([deltas.double().sum(), positive.double().sum(), mask.sum().double()])
    k1_sum, k3_sum, tokens = reduce(sums).tolist()
    return rewards, metrics | {
        "kl/sequence": k1_sum / batch.samples,
        "kl/token": k1_sum / tokens,
        "kl/token_k3": k3_sum / tokens,
        "kl/coef": batch.kl_coef,
        "kl/penalty": batch.kl_coef * k1_sum / batch.samples,
    }


def _outcomes(
    share: Share, settings: PPOSettings, batch: Batch, reduce: Reduce
) -> tuple[Tensor, dict[str, float]]:
    """R of each of this rank's samples, (B,), less what it loses for its length."""
    if not settings.overlong_fraction:
        return share.rewards, {}
    lengths = share.mask.sum(dim=1)
    penalties = overlong_penalties(lengths, limit=batch.limit, fraction=settings.overlong_fraction)
    penalties = settings.overlong_penalty * penalties
    total = float(reduce(penalties.sum().reshape(1)))
    return share.rewards + penalties.float(), {"length/overlong_penalty": total / batch.samples}


def _with_values(
    share: Share,
    rewards: Tensor,
    old_values: Tensor,
    ratios: Tensor,
    *,
    settings: PPOSettings,
    correction: CorrectionSettings,
) -> tuple[Tensor, ValueTargets]:
    """Generalised advantages, (B, T), and what the value model is to learn."""
    advantages, returns = adv.generalised_advantages(
        rewards, old_values, share.mask, gamma=settings.gamma, lam=settings.gae_lambda
    )
    if correction.value_target == "vtrace":
        # A token whose sampler is not known counts as on-policy, so that the trace goes on.
        known = torch.where(share.trusted, raw_weights(ratios), 1.0).to(old_values)
        returns = adv.vtrace_targets(
            rewards,
            old_values,
            known,
            share.mask,
            gamma=settings.gamma,
            lam=settings.gae_lambda,
            rho_cap=correction.vtrace_rho,
            c_cap=correction.vtrace_c,
        )
    return advantages, ValueTargets(old_values, returns)


def _without_values(
    rewards: Tensor, mask: Tensor, settings: PPOSettings, batch: Batch, reduce: Reduce
) -> Tensor:
    """Advantages, (B, T), from the rewards to come or from the returns of whole groups."""
    if settings.advantage == "reward_to_go":
        return adv.rewards_to_go(rewards, mask, gamma=settings.gamma)
    assert settings.advantage != "gae", "generalised advantages need a value model"
    # A group may be split over ranks: each fills in the returns of its own samples.
    returns = torch.zeros(batch.samples, dtype=torch.float64)
    returns[batch.mine] = rewards.double().sum(dim=1)
    everyone = group_advantages(
        settings.advantage, reduce(returns), batch.groups, epsilon=settings.group_epsilon
    )
    return everyone[batch.mine].to(rewards)[:, None] * mask


def _value_metrics(targets: ValueTargets, mask: Tensor, reduce: Reduce) -> dict[str, float]:
    values, returns = targets.old_values, targets.returns
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

"""One step of PPO or its family: old log-probabilities, rewards and advantages, then the updates.

    samples ─ this rank's share ─ packed forward, no gradient ─► log π_old, V_old
      ─► rewards, advantages, value targets, correction for the sampler's lag (`learner.targets`)
      ─► epochs × minibatches: packed micro-batches ─► losses / global count ─► one update each

Which member of the family it is, the settings alone say; without a value model nothing of values is computed.

All ranks run the same number of forward and backward passes; a rank that has run out of micro-batches runs
a dummy at weight 0.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from actors.packing import MicroBatch, pack
from learner.batch import (
    Sample,
    Share,
    assign_owners,
    make_share,
    plan_minibatches,
    sample_metrics,
    scatter_padded,
)
from learner.engine import TrainingEngine, all_reduce
from learner.kl import KLController
from learner.objectives import Sums, entropy_bonus, kl_loss, policy_loss, value_loss
from learner.settings import CorrectionSettings, PPOSettings
from learner.surrogates import divisor
from learner.targets import Batch, Targets, ValueTargets, prepare


@dataclass(slots=True)
class Totals:
    """Sums over the updates of a step on this rank, added up over ranks once at the end."""

    sums: dict[str, float] = field(default_factory=dict)
    ratio_max: float = 0.0
    first_ratio_deviation: float = 0.0
    grad_norms: list[float] = field(default_factory=list)
    critic_grad_norms: list[float] = field(default_factory=list)
    real_tokens: int = 0
    computed_tokens: int = 0

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add one micro-batch's sums."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def count(self, batches: Sequence[MicroBatch]) -> None:
        """Count what these micro-batches compute."""
        self.real_tokens += sum(batch.real_tokens for batch in batches)
        self.computed_tokens += sum(batch.total_tokens for batch in batches)


LOSS_KEYS = (
    "loss/policy",
    "loss/total",
    "policy/entropy",
    "ppo/clip_fraction",
    "ppo/approx_kl",
    "ppo/ratio_mean",
)
VALUE_KEYS = ("loss/value", "ppo/value_clip_fraction")


@dataclass(frozen=True, slots=True)
class Counts:
    """What a minibatch's sums over all ranks are divided by: its tokens, and by `ppo.aggregation`."""

    tokens: int
    divisor: float


@dataclass(frozen=True, slots=True)
class PPO:
    """The step, given the engines and the settings; it keeps nothing between steps."""

    policy: TrainingEngine
    critic: TrainingEngine | None
    settings: PPOSettings
    correction: CorrectionSettings
    micro_batch_tokens: int
    rank: int
    ranks: int
    max_new_tokens: int = 0
    """The longest response that is sampled; where it is 0, no setting may need it."""

    def step(
        self,
        samples: Sequence[Sample],
        *,
        controller: KLController,
        seed: int,
        rates: Sequence[tuple[float, float]],
    ) -> dict[str, float]:
        """Train on the samples of all ranks; `rates` has a learning rate (policy, critic) for each update."""
        started = time.perf_counter()
        lengths = [sample.length for sample in samples]
        plan = plan_minibatches(
            len(samples), epochs=self.settings.epochs, minibatches=self.settings.minibatches, seed=seed
        )
        owner = assign_owners(lengths, plan[0], self.ranks)
        mine = [index for index in range(len(samples)) if owner[index] == self.rank]
        place = {index: number for number, index in enumerate(mine)}
        share = make_share([samples[index] for index in mine])
        totals = Totals()
        old_logprobs, old_values = self.score(share, totals)
        largest_lag = max(lag for sample in samples for lag in sample.lags)
        targets, metrics = prepare(
            share,
            old_logprobs,
            old_values,
            settings=self.settings,
            correction=self.correction,
            batch=Batch(
                groups=torch.tensor([sample.group for sample in samples]),
                mine=torch.tensor(mine, dtype=torch.long),
                limit=self.max_new_tokens,
                largest_lag=largest_lag,
                kl_coef=controller.coef,
                rank=self.rank,
                ranks=self.ranks,
            ),
            reduce=self._reduced,
        )
        rates = [(rate * targets.lr_factor, critic_rate) for rate, critic_rate in rates]
        prepared = time.perf_counter()
        minibatches = [members for epoch in plan for members in epoch]
        for update, (members, rate) in enumerate(zip(minibatches, rates, strict=True)):
            counts = self._counts([len(samples[index].response) for index in members])
            local = [place[index] for index in members if index in place]
            self._update(share, local, targets, totals, counts=counts, rate=rate, first=update == 0)
        metrics |= sample_metrics(samples) | self._reduce(totals, len(minibatches))
        metrics["optimizer/lr"] = rates[-1][0]
        if self.settings.has_values:
            metrics["optimizer/critic_lr"] = rates[-1][1]
        metrics["timing_s/old_logprobs"] = prepared - started
        metrics["timing_s/updates"] = time.perf_counter() - prepared
        return metrics

    # --- Before the updates ------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, share: Share, totals: Totals) -> tuple[Tensor, Tensor]:
        """log π_old and V_old of this rank's samples, both (B, T)."""
        batches = self._pack([sample.pair for sample in share.samples])
        totals.count(batches)
        logprobs: list[Tensor] = []
        values: list[Tensor] = []
        for batch in self.policy.in_step(batches):
            used = batch or self.policy.dummy_micro_batch()
            logprob, _, value = self.policy.forward(used)
            if self.critic is not None:
                value = self.critic.forward(used)
            if batch is not None:
                logprobs.append(logprob)
                values.append(value)
        return (
            scatter_padded(batches, logprobs, share.mask),
            scatter_padded(batches, values, share.mask),
        )

    def _reduced(self, values: Tensor, *, maximum: bool = False) -> Tensor:
        """The sum or maximum over ranks, on the CPU."""
        # A copy: on the CPU `to` gives the tensor itself, and the reduction is in place.
        return all_reduce(values.to(self.policy.device, copy=True), maximum=maximum).cpu()

    # --- Updates -----------------------------------------------------------------------------------------

    def _update(
        self,
        share: Share,
        members: Sequence[int],
        targets: Targets,
        totals: Totals,
        *,
        counts: Counts,
        rate: tuple[float, float],
        first: bool,
    ) -> None:
        """One optimizer update from the samples `members` of this rank and those of the other ranks."""
        batches = self._pack([share.samples[index].pair for index in members])
        totals.count(batches)
        padded = self.policy.in_step(batches)
        rows = torch.tensor(members, dtype=torch.long)
        for number, batch in enumerate(padded):
            last = number == len(padded) - 1
            if batch is None:
                self._dummy(last=last)
                continue
            chosen = (rows[batch.sequence], batch.offset)
            self._micro_batch(batch, share, targets, chosen, totals, counts=counts, last=last, first=first)
        totals.grad_norms.append(self.policy.step(rate[0], head_lr=rate[1]))
        if self.critic is not None:
            totals.critic_grad_norms.append(self.critic.step(rate[1]))

    def _micro_batch(
        self,
        batch: MicroBatch,
        share: Share,
        targets: Targets,
        chosen: tuple[Tensor, Tensor],
        totals: Totals,
        *,
        counts: Counts,
        last: bool,
        first: bool,
    ) -> None:
        """Losses and gradients of one micro-batch; `chosen` are its tokens' places in the (B, T) tensors."""
        settings, device = self.settings, self.policy.device
        logprobs, entropies, values = self.policy.forward(batch)
        total, sums = policy_loss(
            logprobs,
            targets.anchor[chosen].to(device),
            targets.advantages[chosen].to(device),
            targets.weights[chosen].to(device),
            clip=targets.clip[chosen].to(device),
            clip_high=targets.clip_high[chosen].to(device),
            dual_clip=settings.dual_clip or None,
            count=counts.divisor,
            surrogate=settings.surrogate,
            sequence=batch.sequence.to(device),
            tokens=counts.tokens,
        )
        bonus, entropy_sums = entropy_bonus(entropies, count=counts.tokens)
        sums |= entropy_sums
        if settings.entropy_coef:
            total = total + settings.entropy_coef * bonus
        if settings.kl_in == "loss":
            distance, kl_sums = kl_loss(
                logprobs,
                share.reference_logprobs[chosen].to(device),
                targets.scales[chosen].to(device),
                estimator=settings.kl_estimator,
                count=counts.divisor,
            )
            total = total + targets.kl_loss_coef * distance
            sums |= kl_sums
        if targets.values is not None:
            old = targets.values.chosen(chosen)
            worth, value_sums = self._value_loss(batch, values, old, count=counts.tokens, last=last)
            total = total + worth
            sums |= value_sums
        self.policy.backward(total, last=last)
        totals.add(sums | {"loss/total": total.detach()})
        detached = logprobs.detach()
        ratio = (detached - targets.anchor[chosen].to(device)).exp()
        totals.ratio_max = max(totals.ratio_max, float(ratio.max()))
        if first:
            change = (detached - targets.old_logprobs[chosen].to(device)).exp() - 1.0
            totals.first_ratio_deviation = max(totals.first_ratio_deviation, float(change.abs().max()))

    def _value_loss(
        self, batch: MicroBatch, values: Tensor, targets: ValueTargets, *, count: int, last: bool
    ) -> tuple[Tensor | float, Sums]:
        """What a value head adds to the policy's loss: nothing where a critic has a gradient of its own."""
        if self.critic is not None:
            values = self.critic.forward(batch)
        worth, sums = value_loss(
            values,
            targets.old_values.to(values.device),
            targets.returns.to(values.device),
            clip=self.settings.clip_value or None,
            count=count,
        )
        if self.critic is None:
            return self.settings.value_coef * worth, sums
        self.critic.backward(worth, last=last)
        return 0.0, sums

    def _dummy(self, *, last: bool) -> None:
        """A pass that changes no gradient, to keep this rank's collectives in step with the others'.

        It goes back through the same outputs as a real one: ZeRO-3 notes each, and ranks that note different
        ones wait for each other for ever.
        """
        batch = self.policy.dummy_micro_batch()
        logprobs, entropies, values = self.policy.forward(batch)
        if self.critic is not None:
            self.critic.backward(0.0 * self.critic.forward(batch).sum(), last=last)
        self.policy.backward(0.0 * (logprobs.sum() + entropies.sum() + values.sum()), last=last)

    def _counts(self, lengths: Sequence[int]) -> Counts:
        """Of a minibatch whose responses, over all ranks, have these lengths."""
        tokens = sum(lengths)
        by = divisor(
            self.settings.aggregation, tokens=tokens, sequences=len(lengths), limit=self.max_new_tokens
        )
        return Counts(tokens, by)

    def _pack(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[MicroBatch]:
        return pack(pairs, micro_batch_tokens=self.micro_batch_tokens) if pairs else []

    def _reduce(self, totals: Totals, updates: int) -> dict[str, float]:
        """Means over the updates of a step, over all ranks."""
        keys: tuple[str, ...] = LOSS_KEYS
        if self.settings.has_values:
            keys += VALUE_KEYS
        if self.settings.kl_in == "loss":
            keys += ("loss/kl",)
        local = [totals.sums.get(key, 0.0) for key in keys]
        local += [float(totals.real_tokens), float(totals.computed_tokens)]
        *sums, real, computed = self._reduced(torch.tensor(local, dtype=torch.float64)).tolist()
        extremes = torch.tensor([totals.ratio_max, totals.first_ratio_deviation], dtype=torch.float64)
        metrics = {key: value / updates for key, value in zip(keys, sums, strict=True)}
        metrics["ppo/ratio_max"], metrics["ppo/first_ratio_deviation"] = self._reduced(
            extremes, maximum=True
        ).tolist()
        metrics["perf/padding_fraction"] = 1.0 - real / computed
        metrics["optimizer/grad_norm"] = sum(totals.grad_norms) / updates
        if totals.critic_grad_norms:
            metrics["optimizer/critic_grad_norm"] = sum(totals.critic_grad_norms) / updates
        return metrics

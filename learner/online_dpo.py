"""Online DPO: pairs of fresh samples, labelled by the rewards, on the path of the policy-gradient family.

    samples ─ groups ─► the best against the worst of each (a tie has no label) ─► pairs
      this rank's share ─ packed forward, no gradient ─► log π, distance to reference and sampler
      ─► epochs × minibatches of pairs ─► −log σ(β(h_best − h_worst)) / pairs ─► one update each

h = log π − log π_ref of a whole response, at the sampling temperature, as the reference's are. The labels
hold whichever policy drew the samples, so their lag needs no correction; it is measured as it always is.

Source: Guo et al., arXiv 2402.04792.

Legend: S samples of the step, B of them on this rank, T their longest response, N tokens of a micro-batch.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.packing import MicroBatch, pack
from learner import mismatch
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
from learner.kl import KLController, k1, k3
from learner.preference_objectives import dpo_loss
from learner.preference_settings import OnlineDPOSettings
from learner.preference_training import pack_together, plan_parts, sequence_sums
from learner.targets import measure

Labelled = tuple[int, int]
"""Numbers of a group's best and worst samples."""


def label_groups(samples: Sequence[Sample], least_gap: float) -> list[Labelled]:
    """(best, worst) of each group by reward, where they differ by more than `least_gap`; the first of equals.

    A group of three or more gives its widest pair only, so that each prompt has one vote.
    """
    groups: dict[int, list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault(sample.group, []).append(number)
    pairs = []
    for members in groups.values():
        best = max(members, key=lambda i: samples[i].reward)
        worst = min(members, key=lambda i: samples[i].reward)
        if samples[best].reward - samples[worst].reward > least_gap:
            pairs.append((best, worst))
    return pairs


@dataclass(slots=True)
class _Tokens:
    """What forward passes computed: tokens, and those of them that were padding."""

    real: int = 0
    computed: int = 0

    def count(self, batches: Sequence[MicroBatch]) -> None:
        self.real += sum(batch.real_tokens for batch in batches)
        self.computed += sum(batch.total_tokens for batch in batches)


@dataclass(frozen=True, slots=True)
class OnlineDPO:
    """The step, given the engine and the settings; it keeps nothing between steps."""

    policy: TrainingEngine
    settings: OnlineDPOSettings
    epochs: int
    minibatches: int
    micro_batch_tokens: int
    rank: int
    ranks: int

    def step(
        self,
        samples: Sequence[Sample],
        *,
        controller: KLController,
        seed: int,
        rates: Sequence[tuple[float, float]],
    ) -> dict[str, float]:
        """Train on the samples of all ranks; `rates` has a learning rate for each update, and one not used.

        A step whose groups are all tied has no update. One with fewer pairs than minibatches has fewer.
        """
        del controller  # β is constant here, and in the loss
        started = time.perf_counter()
        pairs = label_groups(samples, self.settings.least_gap)
        tokens = _Tokens()
        logprobs, metrics = self._look(samples, tokens)
        metrics |= sample_metrics(samples) | self._figures(samples, pairs, logprobs)
        scored = time.perf_counter()
        losses, norms = [], []
        minibatches = min(self.minibatches, len(pairs))
        plan = (
            plan_minibatches(len(pairs), epochs=self.epochs, minibatches=minibatches, seed=seed)
            if pairs
            else []
        )
        for members, (rate, _) in zip((part for epoch in plan for part in epoch), rates, strict=False):
            loss, norm = self._update(samples, [pairs[i] for i in members], tokens, rate)
            losses.append(loss)
            norms.append(norm)
        total, real, computed = self._reduced(
            torch.tensor([sum(losses), tokens.real, tokens.computed], dtype=torch.float64)
        ).tolist()
        if losses:
            metrics["loss/preference"] = total / len(losses)
            metrics["optimizer/grad_norm"] = sum(norms) / len(norms)
        metrics["perf/padding_fraction"] = 1.0 - real / computed
        metrics["optimizer/lr"] = rates[-1][0]
        metrics["timing_s/old_logprobs"] = scored - started
        metrics["timing_s/updates"] = time.perf_counter() - scored
        return metrics

    # --- Before the updates ------------------------------------------------------------------------------

    @torch.no_grad()
    def _look(self, samples: Sequence[Sample], tokens: _Tokens) -> tuple[Tensor, dict[str, float]]:
        """(S,) log π of all samples with the present weights; entropy, distance to reference and sampler."""
        owner = assign_owners([sample.length for sample in samples], [range(len(samples))], self.ranks)
        mine = [number for number, rank in enumerate(owner) if rank == self.rank]
        share = make_share([samples[number] for number in mine])
        batches = (
            pack([one.pair for one in share.samples], micro_batch_tokens=self.micro_batch_tokens)
            if mine
            else []
        )
        tokens.count(batches)
        values: list[Tensor] = []
        entropy = torch.zeros((), dtype=torch.float64)
        for batch in self.policy.in_step(batches):
            logprob, entropies, _ = self.policy.forward(batch or self.policy.dummy_micro_batch())
            if batch is not None:
                values.append(logprob)
                entropy += entropies.double().sum().cpu()
        padded = scatter_padded(batches, values, share.mask)
        whole = torch.zeros(len(samples), dtype=torch.float64)
        whole[torch.tensor(mine, dtype=torch.long)] = padded.double().sum(dim=1)
        largest_lag = max(lag for sample in samples for lag in sample.lags)
        ratios = mismatch.log_ratios(padded, share.sampler_logprobs)
        metrics = self._distance(share, padded, entropy, len(samples))
        metrics |= measure(share, ratios, largest_lag + 1, self._reduced)
        return self._reduced(whole), metrics

    def _distance(self, share: Share, logprobs: Tensor, entropy: Tensor, samples: int) -> dict[str, float]:
        """Entropy and KL(π‖π_ref) over all ranks from this rank's (B, T) log π."""
        mask, reference = share.mask, share.reference_logprobs
        first = torch.where(mask, k1(logprobs, reference), 0.0).double().sum()
        third = torch.where(mask, k3(logprobs, reference), 0.0).double().sum()
        sums = self._reduced(torch.stack([first, third, mask.sum().double(), entropy])).tolist()
        first_sum, third_sum, count, entropy_sum = sums
        return {
            "kl/sequence": first_sum / samples,
            "kl/token": first_sum / count,
            "kl/token_k3": third_sum / count,
            "policy/entropy": entropy_sum / count,
        }

    def _figures(
        self, samples: Sequence[Sample], pairs: Sequence[Labelled], logprobs: Tensor
    ) -> dict[str, float]:
        """What the pairs are like before they are trained on; (S,) log π."""
        groups = len({sample.group for sample in samples})
        figures = {
            "online_dpo/pairs": float(len(pairs)),
            "online_dpo/tied_groups": float(groups - len(pairs)),
        }
        if not pairs:
            return figures
        sides = [[pair[side] for pair in pairs] for side in (0, 1)]
        h = logprobs - _reference_sums(samples)
        rewards = [self.settings.beta * h[side] for side in sides]
        gaps = [samples[best].reward - samples[worst].reward for best, worst in pairs]
        longer = [len(samples[best].response) - len(samples[worst].response) for best, worst in pairs]
        return figures | {
            "online_dpo/reward_gap": sum(gaps) / len(gaps),
            "online_dpo/length_gap": sum(longer) / len(longer),
            "preference/accuracy": float((rewards[0] > rewards[1]).double().mean()),
            "preference/chosen_reward": float(rewards[0].mean()),
            "preference/rejected_reward": float(rewards[1].mean()),
            "preference/margin": float((rewards[0] - rewards[1]).mean()),
            "preference/chosen_logprob": float(logprobs[sides[0]].mean()),
            "preference/rejected_logprob": float(logprobs[sides[1]].mean()),
        }

    def _reduced(self, values: Tensor, *, maximum: bool = False) -> Tensor:
        """The sum or maximum over ranks, on the CPU."""
        # A copy: on the CPU `to` gives the tensor itself, and the reduction is in place.
        return all_reduce(values.to(self.policy.device, copy=True), maximum=maximum).cpu()

    # --- Updates -----------------------------------------------------------------------------------------

    def _update(
        self, samples: Sequence[Sample], pairs: Sequence[Labelled], tokens: _Tokens, rate: float
    ) -> tuple[float, float]:
        """One optimizer update on these pairs of all ranks: this rank's share of the loss, and the norm."""
        lengths = [samples[best].length + samples[worst].length for best, worst in pairs]
        owner = assign_owners(lengths, [range(len(pairs))], self.ranks)
        mine = [number for number, rank in enumerate(owner) if rank == self.rank]
        parts = [
            [pairs[mine[place]] for place in part]
            for part in plan_parts([lengths[number] for number in mine], self.micro_batch_tokens)
        ]
        packed = [pack_together([samples[i].pair for pair in part for i in pair]) for part in parts]
        tokens.count(packed)
        padded = self.policy.in_step(packed)
        total = 0.0
        for number, batch in enumerate(padded):
            last = number == len(padded) - 1
            values = self.policy.forward(batch or self.policy.dummy_micro_batch())[0]
            if batch is None:
                self.policy.backward(0.0 * values.sum(), last=last)
                continue
            here = [samples[i] for pair in parts[number] for i in pair]
            h = sequence_sums(values, batch, len(here)) - _reference_sums(here).to(values.device)
            loss = dpo_loss(
                h[0::2],
                h[1::2],
                beta=self.settings.beta,
                label_smoothing=self.settings.label_smoothing,
                count=len(pairs),
            )
            self.policy.backward(loss, last=last)
            total += float(loss.detach())
        return total, self.policy.step(rate)


def _reference_sums(samples: Sequence[Sample]) -> Tensor:
    """(S,) log π_ref of each response, float64."""
    return torch.tensor([sum(sample.reference_logprobs) for sample in samples], dtype=torch.float64)

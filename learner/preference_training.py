"""One update of a preference objective.

    batch of examples ─ this rank's share ─ the two responses of a pair always in one micro-batch
      ─► log π of each sequence ─► scores ─► loss / usual weight ─► gradient, summed over parts and ranks

Losses are sums over examples, so neither ranks nor micro-batches change the result, and each pair is computed
once. KTO's reference point belongs to the whole batch: it comes from a pass of its own, without gradient.

Legend: S sequences of the job, N tokens of a micro-batch, U sequences at hand.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.packing import PADDING_GOAL, MicroBatch, Pair, pack
from learner.batch import assign_owners
from learner.engine import TrainingEngine, all_reduce
from learner.preference_batch import (
    Examples,
    Responses,
    loss_of,
    measure,
    needs_reference,
    reference_point_of,
    scores_of,
    usual_weight,
)
from learner.preference_settings import KTOSettings, Method

# --- Packing -----------------------------------------------------------------------------------------------


def plan_parts(lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Which examples share a micro-batch, given each one's tokens: first-fit decreasing.

    An example that is too long by itself has a part to itself.
    """
    room = max(1, int(micro_batch_tokens * (1.0 - PADDING_GOAL)))
    parts: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = lengths[index]
        fits = next((number for number, left in enumerate(free) if left >= size), None)
        if fits is None:
            parts.append([index])
            free.append(room - size)
        else:
            parts[fits].append(index)
            free[fits] -= size
    return parts


def pack_together(pairs: Sequence[Pair]) -> MicroBatch:
    """All pairs in one micro-batch, of which `PADDING_GOAL` at most is padding.

    Rows that meet that goal hold at most total/(1 − goal) tokens, and one row for all of them meets it.
    """
    total = sum(len(prompt) + len(response) for prompt, response in pairs)
    (batch,) = pack(pairs, micro_batch_tokens=math.ceil(total / (1.0 - PADDING_GOAL)))
    return batch


def sequence_sums(values: Tensor, batch: MicroBatch, count: int) -> Tensor:
    """(count,) float64: the sum of each sequence's (N,) values."""
    sums = torch.zeros(count, dtype=torch.float64, device=values.device)
    return sums.index_add(0, batch.sequence.to(values.device), values.double())


# --- Passes over the model ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """Examples of this rank that share a micro-batch; `sequences` are theirs, in the order of packing."""

    members: list[int]
    sequences: list[int]
    batch: MicroBatch


@dataclass(frozen=True, slots=True)
class Passes:
    """Forward and backward passes of one rank over responses. Collective: all ranks make the same calls."""

    engine: TrainingEngine
    responses: Responses
    micro_batch_tokens: int
    rank: int
    ranks: int

    @torch.no_grad()
    def logprobs(self, numbers: Sequence[int]) -> list[float]:
        """log π(y|x) of these sequences at temperature 1 with the present weights, the same on all ranks."""
        mine = self._mine([self.responses.sequences.size(i) for i in numbers])
        pairs = [self.responses[numbers[i]] for i in mine]
        batches = pack(pairs, micro_batch_tokens=self.micro_batch_tokens) if pairs else []
        sums = torch.zeros(len(numbers), dtype=torch.float64)
        for batch in self.engine.in_step(batches):
            values = self._forward(batch)
            if batch is not None:
                sums[torch.tensor(mine, dtype=torch.long)] += sequence_sums(values, batch, len(mine)).cpu()
        answer: list[float] = all_reduce(sums.to(self.engine.device)).tolist()
        return answer

    def update(
        self,
        method: Method,
        examples: Examples,
        *,
        batch: Sequence[int],
        reference: Sequence[float],
        lr: float,
    ) -> dict[str, float]:
        """One update on the examples of `batch`; `reference` (S,) is log π_ref of every sequence.

        The figures are those of the weights before the update. A method without a reference is given none.
        """
        logged: dict[int, float] = {}
        if isinstance(method, KTOSettings):
            others = sorted({examples.mismatched[i] for i in batch})
            logged = dict(zip(others, self.logprobs(others), strict=True))
        point = reference_point_of(
            method, self.responses, examples, batch, logprobs=logged, reference=reference
        )
        parts = self._parts(examples, batch)
        padded = self.engine.in_step([part.batch for part in parts])
        count = usual_weight(examples, batch)
        for number, packed in enumerate(padded):
            last = number == len(padded) - 1
            values = self._forward(packed)
            if packed is None:
                self.engine.backward(0.0 * values.sum(), last=last)
                continue
            part = parts[number]
            sums = sequence_sums(values, packed, len(part.sequences))
            loss = loss_of(
                method,
                examples,
                part.members,
                self._scored(method, part, sums, reference),
                {index: place for place, index in enumerate(part.sequences)},
                reference_point=point,
                count=count,
            )
            self.engine.backward(loss, last=last)
            logged |= dict(zip(part.sequences, sums.detach().tolist(), strict=True))
        norm = self.engine.step(lr)
        logged |= self._together(logged, sorted({s for i in batch for s in examples.sequences(i)}))
        found = measure(method, self.responses, examples, batch, logprobs=logged, reference=reference)
        return {
            "loss/preference": found.loss,
            **found.figures,
            "optimizer/grad_norm": norm,
            "optimizer/lr": lr,
        }

    def _forward(self, batch: MicroBatch | None) -> Tensor:
        """(N,) log-probabilities of a micro-batch, or of a dummy in its place."""
        values: Tensor = self.engine.forward(batch or self.engine.dummy_micro_batch(), temperature=1.0)[0]
        return values

    def _mine(self, lengths: Sequence[int]) -> list[int]:
        """The places that this rank works on."""
        owner = assign_owners(lengths, [range(len(lengths))], self.ranks)
        return [place for place, rank in enumerate(owner) if rank == self.rank]

    def _parts(self, examples: Examples, batch: Sequence[int]) -> list[_Part]:
        """This rank's examples of a batch, packed."""
        size = self.responses.sequences.size
        mine = self._mine([sum(map(size, examples.sequences(i))) for i in batch])
        numbers = [batch[place] for place in mine]
        lengths = [sum(map(size, examples.sequences(i))) for i in numbers]
        parts = []
        for plan in plan_parts(lengths, self.micro_batch_tokens):
            members = [numbers[place] for place in plan]
            sequences = [s for i in members for s in examples.sequences(i)]
            parts.append(_Part(members, sequences, pack_together([self.responses[s] for s in sequences])))
        return parts

    def _scored(self, method: Method, part: _Part, sums: Tensor, reference: Sequence[float]) -> Tensor:
        """(U,) scores of a part's sequences, with their gradient."""
        frozen = torch.zeros_like(sums)
        if needs_reference(method):
            frozen = torch.tensor([reference[s] for s in part.sequences], dtype=sums.dtype).to(sums)
        return scores_of(method, sums, frozen, self.responses.lengths(part.sequences).to(sums))

    def _together(self, mine: dict[int, float], numbers: Sequence[int]) -> dict[int, float]:
        """The sums of these sequences from the ranks that computed them: their mean, where several did."""
        seen = torch.tensor(
            [[mine.get(i, 0.0) for i in numbers], [float(i in mine) for i in numbers]], dtype=torch.float64
        )
        values, times = all_reduce(seen.to(self.engine.device)).cpu()
        return dict(zip(numbers, (values / times).tolist(), strict=True))

"""Examples of preferences, their loss and their figures, from log-probabilities of whole responses.

    log π, log π_ref, |y| ─► scores (h or ℓ) ─► the objective's loss over the examples of a batch

No model and no processes here: ranks and the driver work the same things out of the same numbers.

Legend: S sequences of the job, N examples (pairs, or single responses with KTO), U sequences at hand.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.packing import Pair
from learner.preference_objectives import (
    dpo_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    simpo_loss,
)
from learner.preference_settings import IPOSettings, KTOSettings, Method, SimPOSettings
from learner.reward_module import Sequences

NONE = -1
"""In `Examples`: there is no such sequence."""


@dataclass(frozen=True, slots=True)
class Responses:
    """Numbered responses with their prompts; the first `prompt_tokens` (S,) of a sequence are the prompt."""

    sequences: Sequences
    prompt_tokens: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, number: int) -> Pair:
        ids, split = self.sequences[number], int(self.prompt_tokens[number])
        return ids[:split], ids[split:]

    def lengths(self, numbers: Sequence[int]) -> Tensor:
        """(U,) tokens of each response, its end token included; float64."""
        sizes = [self.sequences.size(i) - int(self.prompt_tokens[i]) for i in numbers]
        return torch.tensor(sizes, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Examples:
    """What is learned from, all (N,): numbers of sequences, `NONE` where an example has none.

    A pair has `chosen` and `rejected`. With KTO an example is one response: `chosen` where it is good,
    `rejected` where it is bad; `mismatched` is then its prompt with the response of another one.
    """

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    mismatched: tuple[int, ...]
    margin: tuple[float, ...]
    weight: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.chosen)

    def sequences(self, number: int) -> list[int]:
        """The sequences that an example's gradient needs."""
        return [index for index in (self.chosen[number], self.rejected[number]) if index != NONE]


@dataclass(frozen=True, slots=True)
class PreferenceData:
    """A job's responses; the examples that are trained. Held-out ones are among the responses only."""

    responses: Responses
    train: Examples


# --- From log-probabilities to a loss ----------------------------------------------------------------------


def needs_reference(method: Method) -> bool:
    """Whether the objective knows a reference."""
    return not isinstance(method, SimPOSettings)


def scores_of(method: Method, logprobs: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """h or ℓ of sequences from log π, log π_ref and |y|, all (U,)."""
    if isinstance(method, SimPOSettings):
        return logprobs / lengths
    ratios = logprobs - reference
    return ratios / lengths if isinstance(method, IPOSettings) and method.average else ratios


def reward_scale(method: Method) -> float:
    """What makes a score an implicit reward."""
    return method.tau if isinstance(method, IPOSettings) else method.beta


def loss_of(
    method: Method,
    examples: Examples,
    members: Sequence[int],
    scores: Tensor,
    place: Mapping[int, int],
    *,
    reference_point: float,
    count: float,
) -> Tensor:
    """The loss of the examples `members`; `scores[place[s]]` is sequence s's score."""
    weight = torch.tensor([examples.weight[i] for i in members], dtype=scores.dtype, device=scores.device)
    if isinstance(method, KTOSettings):
        desirable = [examples.chosen[i] != NONE for i in members]
        rows = [place[examples.sequences(i)[0]] for i in members]
        return kto_loss(
            scores[rows],
            torch.tensor(desirable, device=scores.device),
            reference_point,
            beta=method.beta,
            desirable_weight=method.desirable_weight,
            undesirable_weight=method.undesirable_weight,
            weight=weight,
            count=count,
        )
    chosen = scores[[place[examples.chosen[i]] for i in members]]
    rejected = scores[[place[examples.rejected[i]] for i in members]]
    if isinstance(method, IPOSettings):
        return ipo_loss(chosen, rejected, tau=method.tau, weight=weight, count=count)
    if isinstance(method, SimPOSettings):
        return simpo_loss(chosen, rejected, beta=method.beta, gamma=method.gamma, weight=weight, count=count)
    margin = None
    if method.margin:
        margin = torch.tensor([examples.margin[i] for i in members], dtype=scores.dtype, device=scores.device)
    return dpo_loss(
        chosen,
        rejected,
        beta=method.beta,
        label_smoothing=method.label_smoothing,
        margin=margin,
        weight=weight,
        count=count,
    )


def total_weight(examples: Examples, members: Sequence[int]) -> float:
    """What the mean loss of these examples is divided by; 1 where all weights are 0, and so the loss."""
    return math.fsum(examples.weight[i] for i in members) or 1.0


def usual_weight(examples: Examples, members: Sequence[int]) -> float:
    """What so many examples weigh in the mean: what a batch's loss is divided by when it is descended.

    With the batch's own weight instead, a batch of light examples would move the model as far as one of heavy
    ones.
    """
    return len(members) * math.fsum(examples.weight) / len(examples) or 1.0


def reference_point_of(
    method: Method,
    data: Responses,
    examples: Examples,
    members: Sequence[int],
    *,
    logprobs: Mapping[int, float],
    reference: Sequence[float],
) -> float:
    """KTO's z₀ of a whole batch from log π of its mismatched sequences; 0 where the objective has none."""
    if not isinstance(method, KTOSettings):
        return 0.0
    others = [examples.mismatched[i] for i in members]
    scores = select_scores(method, data, others, logprobs, reference)
    weight = torch.tensor([examples.weight[i] for i in members], dtype=scores.dtype)
    return float(kto_reference_point(scores, weight))


@dataclass(frozen=True, slots=True)
class Measured:
    """A loss and its figures; an example is in the right order where its `better` score is above its `worse`.

    Those are the scores of a pair's responses. A single response is held against the reference point: it is
    the better one where it is good, the worse one where it is bad.
    """

    loss: float
    better: list[float]
    worse: list[float]
    figures: dict[str, float]


def measure(
    method: Method,
    data: Responses,
    examples: Examples,
    members: Sequence[int],
    *,
    logprobs: Mapping[int, float],
    reference: Sequence[float],
) -> Measured:
    """Loss and figures of examples from log π of their sequences and `reference` (S,) of all of them."""
    used = sorted({index for i in members for index in examples.sequences(i)})
    place = {index: number for number, index in enumerate(used)}
    scores = select_scores(method, data, used, logprobs, reference)
    point = reference_point_of(method, data, examples, members, logprobs=logprobs, reference=reference)
    loss = loss_of(
        method,
        examples,
        members,
        scores,
        place,
        reference_point=point,
        count=total_weight(examples, members),
    )
    values = dict(zip(used, scores.tolist(), strict=True))
    better = [values.get(examples.chosen[i], point) for i in members]
    worse = [values.get(examples.rejected[i], point) for i in members]
    right = sum(a > b for a, b in zip(better, worse, strict=True))
    figures = {"preference/accuracy": right / len(members)}
    sides = (("chosen", examples.chosen), ("rejected", examples.rejected))
    for name, numbers in sides:
        mine = [numbers[i] for i in members if numbers[i] != NONE]
        if mine:
            rewards = [reward_scale(method) * values[index] for index in mine]
            figures[f"preference/{name}_reward"] = math.fsum(rewards) / len(mine)
            figures[f"preference/{name}_logprob"] = math.fsum(logprobs[k] for k in mine) / len(mine)
    if {"preference/chosen_reward", "preference/rejected_reward"} <= figures.keys():
        figures["preference/margin"] = (
            figures["preference/chosen_reward"] - figures["preference/rejected_reward"]
        )
    if isinstance(method, KTOSettings):
        figures["preference/reference_point"] = point
    return Measured(float(loss), better, worse, figures)


def select_scores(
    method: Method,
    data: Responses,
    numbers: Sequence[int],
    logprobs: Mapping[int, float],
    reference: Sequence[float],
) -> Tensor:
    """(U,) scores of these sequences, float64."""
    own = torch.tensor([logprobs[i] for i in numbers], dtype=torch.float64)
    frozen = torch.zeros_like(own)
    if needs_reference(method):
        frozen = torch.tensor([reference[i] for i in numbers], dtype=torch.float64)
    return scores_of(method, own, frozen, data.lengths(numbers))

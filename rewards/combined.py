"""Several rewards as one: the weighted sum of those that are trained on, and the values of all.

groups ─▶ each [[reward]] in turn ─▶ Σ weight · value, with every raw value as a component
              ├─ group by group, or all groups in one call where that is faster
              ├─ of role `evaluate`: only groups of an evaluation are asked, and nothing is added to the sum
              └─ an error in any of them ─▶ RewardError; the later ones are not asked
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rewards.base import Reward, RewardError, RewardRequest, Score


class Part(NamedTuple):
    """One reward of the sum.

    `evaluate`: it scores groups of an evaluation only, and is no part of the sum. `together`: it scores all
    groups of a call at once, because it is a model; the others see one group in a call.
    """

    weight: float
    reward: Reward
    evaluate: bool = False
    together: bool = False


@dataclass(frozen=True, slots=True)
class ScoredRequests:
    """One answer for each request of a group, and the group's share of the time."""

    answers: list[Score | RewardError]
    seconds: float


@dataclass(slots=True)
class _Ledger:
    """What is known of one group so far."""

    requests: Sequence[RewardRequest]
    evaluation: bool
    totals: list[float] = field(default_factory=list)
    components: list[dict[str, float]] = field(default_factory=list)
    errors: dict[int, RewardError] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.totals = [0.0] * len(self.requests)
        self.components = [{} for _ in self.requests]

    def open(self) -> Iterator[int]:
        """Places of the requests that no reward has failed on."""
        return (i for i in range(len(self.requests)) if i not in self.errors)

    def enter(self, place: int, part: Part, answer: Score | RewardError) -> None:
        """Take one reward's answer to one request."""
        if isinstance(answer, RewardError):
            self.errors[place] = answer
            return
        label = part.reward.label
        if not part.evaluate:
            self.totals[place] += part.weight * answer.value
        self.components[place][label] = answer.value
        self.components[place].update({f"{label}/{k}": v for k, v in answer.components.items()})


# The learner works in single precision, and squares rewards for their variance: (10¹⁵)² is 10³⁰ of 3·10³⁸.
LARGEST_TOTAL = 1e15


class CombinedReward:
    """The weighted sum of several rewards. Its components are `{label: raw value}` and `label/key` extras."""

    label = "reward"

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)

    @property
    def rewards(self) -> list[Reward]:
        """The single rewards, in the order of their tables."""
        return [part.reward for part in self._parts]

    def score(self, requests: Sequence[RewardRequest]) -> list[Score | RewardError]:
        """One answer for each request of a training group: a finite total, or the first reward's error."""
        return self.score_groups([requests], [False])[0].answers

    def score_groups(
        self, groups: Sequence[Sequence[RewardRequest]], evaluation: Sequence[bool]
    ) -> list[ScoredRequests]:
        """The answers for each group; `evaluation` says which groups belong to an evaluation."""
        ledgers = [_Ledger(requests, of) for requests, of in zip(groups, evaluation, strict=True)]
        for part in self._parts:
            asked = [ledger for ledger in ledgers if ledger.evaluation or not part.evaluate]
            for batch in [asked] if part.together else [[ledger] for ledger in asked]:
                _ask(part, batch)
        return [ScoredRequests(self._answers(ledger), ledger.seconds) for ledger in ledgers]

    def _answers(self, ledger: _Ledger) -> list[Score | RewardError]:
        rows = zip(ledger.totals, ledger.components, strict=True)
        return [ledger.errors.get(i) or self._total(*row) for i, row in enumerate(rows)]

    def _total(self, total: float, components: dict[str, float]) -> Score | RewardError:
        if not abs(total) <= LARGEST_TOTAL:  # nor NaN
            return RewardError(
                self.label,
                f"the weighted sum of {components} is {total:g}, beyond ±{LARGEST_TOTAL:g}; scale the reward",
            )
        return Score(total, components)

    def close(self) -> None:
        """Close every reward."""
        for part in self._parts:
            part.reward.close()


def _ask(part: Part, ledgers: Sequence[_Ledger]) -> None:
    """Put the open requests of these groups to a reward in one call; its time is shared by requests."""
    places = [(ledger, i) for ledger in ledgers for i in ledger.open()]
    if not places:
        return
    started = time.monotonic()
    answers = part.reward.score([ledger.requests[i] for ledger, i in places])
    each = (time.monotonic() - started) / len(places)
    for (ledger, i), answer in zip(places, answers, strict=True):
        ledger.enter(i, part, answer)
        ledger.seconds += each

"""What a reward is: it answers every request with a finite score or with a typed error, never with a guess.

No heavy imports: these types are shared by graders, user functions, tasks and the scoring actor.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class RewardError(Exception):
    """A reward could not score a completion: which reward, and why. Not the same as a bad completion."""

    def __init__(self, reward: str, reason: str) -> None:
        super().__init__(reward, reason)  # both, so that it survives a trip between processes
        self.reward = reward
        self.reason = reason

    def __str__(self) -> str:
        return f"reward {self.reward!r}: {self.reason}"


@dataclass(frozen=True, slots=True)
class RewardRequest:
    """One completion to score.

    `prompt` is the data row's own prompt (a string or chat messages), `completion` the response's text
    without its end token, `row` the whole data row, and `finished` whether the policy ended the response
    itself rather than being cut off. `token_ids` are the policy's own of prompt and response, with the end
    token if it sampled one; empty where they are not known.
    """

    prompt: str | list[dict[str, Any]]
    completion: str
    row: Mapping[str, Any]
    finished: bool
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """A finite reward, and numbers logged beside it (a reward's own extra values, by name)."""

    value: float
    components: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in {"the reward": self.value, **self.components}.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}; it must be a finite number")


class Reward(Protocol):
    """Scores completions.

    `score` answers each request in order. The requests of one call belong together: a group is trained on
    whole or not at all, so a reward may answer the requests after a hang or a crash with errors instead of
    running them. A bad function then costs a group one deadline or one start, not one for each sample.
    """

    @property
    def label(self) -> str:
        """The name under which it is logged."""
        ...

    def score(self, requests: Sequence[RewardRequest]) -> list[Score | RewardError]:
        """One answer for each request."""
        ...

    def close(self) -> None:
        """Free what it holds (a child process); safe to call twice."""
        ...

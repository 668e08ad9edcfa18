"""What goes into the adaptive rule and what comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.drift import LagBin

Setting = Literal["window", "publish_every", "ahead"]

WINDOW_CAUSES = ("window", "deadline")  # what a larger window can mend
CAUSES = ("window", "ahead", "deadline", "sampling", "sync")


class AdaptiveSettings(Protocol):
    """What the rule is told by the configuration; `[scheduler]` has these fields."""

    @property
    def max_window(self) -> int:
        """S_max: the window never passes it."""

    @property
    def max_drift(self) -> float:
        """D_max: most KL(μ‖π) at the largest lag, in nats a token."""

    @property
    def min_ess(self) -> float:
        """e_min: least effective sample size, as a share of the tokens."""

    @property
    def wait_tolerance(self) -> float:
        """Share of a step that the learner may wait before that counts."""

    @property
    def sync_share(self) -> float:
        """Share of the actors' time that loading weights may take."""


@dataclass(frozen=True, slots=True)
class StepMeasurement:
    """What one finished learner step showed.

    `wait_seconds` is the learner's wait by cause: "window" (slots are free, but the window is full), "ahead"
    (slots are free, but `ahead` is reached), "deadline" (P groups are ready, but an older one must come
    first), "sampling" (all slots are busy, or nothing is left to admit), "sync" (the actors' weights are too
    old, or loading). A cause that is not named had no wait.
    """

    step: int
    step_seconds: float
    wait_seconds: Mapping[str, float]
    sync_seconds: float  # of the publish that followed the step, where there was one
    published: bool
    ready_left: int  # ready groups left after this step took its P
    bins: tuple[LagBin, ...]
    ess: float  # over all tokens of the step, on raw weights
    saturated_seconds: float = 0.0  # in which every scoring actor was at work


@dataclass(frozen=True, slots=True)
class Decision:
    """One change of one setting: a line of decisions.jsonl."""

    step: int
    setting: Setting
    old: int
    new: int
    reason: str
    inputs: Mapping[str, float | int | None]

"""A simulated annotator: noisy labels of a known gold reward, and a bias for length that can be switched on.

    P(a ≻ b) = (1 − f)·σ(u) + f·(1 − σ(u)),   u = (gold_a − gold_b + b·(length_a − length_b)) / τ

τ is the temperature (0: the better response always wins, a tie is a coin flip), b the length bias, f the
share of labels that are flipped whatever the responses. The coin of a pair is a hash of the seed and the
pair's key: the same pair gets the same label in every run, in either order, whatever else is labelled.
"""

import hashlib
import math
from dataclasses import dataclass

from rewards.preferences.records import Preference, Prompt, pair_key, response_key


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response with its gold reward. `length` is in the unit of `length_bias`; None: its characters."""

    text: str
    gold: float
    length: float | None = None

    @property
    def size(self) -> float:
        """The length that the bias sees."""
        return len(self.text) if self.length is None else self.length


@dataclass(frozen=True, slots=True)
class SimulatedAnnotator:
    """See the module's text. Annotators who disagree are made with different seeds and names."""

    temperature: float = 1.0
    length_bias: float = 0.0
    flip: float = 0.0
    seed: int = 0
    name: str = "simulated"

    def __post_init__(self) -> None:
        for field, value in (("temperature", self.temperature), ("length_bias", self.length_bias)):
            if not math.isfinite(value):
                raise ValueError(f"annotator.{field} = {value}: it must be a finite number")
        if self.temperature < 0:
            raise ValueError(f"annotator.temperature = {self.temperature}: it must be 0 or more")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"annotator.flip = {self.flip}: it is a share of labels, from 0 to 1")

    def probability(self, first: Candidate, second: Candidate) -> float:
        """P(first ≻ second), flips included."""
        utility = first.gold - second.gold + self.length_bias * (first.size - second.size)
        if not math.isfinite(utility):
            raise ValueError(f"gold rewards {first.gold} and {second.gold}: both must be finite numbers")
        clean = _sigmoid(utility, self.temperature)
        return (1 - self.flip) * clean + self.flip * (1 - clean)

    def prefers_first(self, prompt: Prompt, first: Candidate, second: Candidate) -> bool:
        """The label of this pair; with the responses exchanged it is the opposite."""
        if response_key(first.text) == response_key(second.text):
            raise ValueError(
                f"the two responses are the same, {first.text!r:.80}: there is nothing to prefer"
            )
        swapped = response_key(first.text) > response_key(second.text)
        low, high = (second, first) if swapped else (first, second)
        low_wins = self._coin(pair_key(prompt, first.text, second.text)) < self.probability(low, high)
        return low_wins != swapped

    def label(
        self, prompt: Prompt, first: Candidate, second: Candidate, *, weight: float = 1.0, subset: str = ""
    ) -> Preference:
        """The same as a preference, signed with the annotator's name."""
        won, lost = (first, second) if self.prefers_first(prompt, first, second) else (second, first)
        return Preference(prompt, won.text, lost.text, weight=weight, annotator=self.name, subset=subset)

    def _coin(self, key: str) -> float:
        """Uniform in [0, 1), fixed by the seed and the pair."""
        digest = hashlib.sha256(f"annotator:{self.seed}:{key}".encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64


def _sigmoid(utility: float, temperature: float) -> float:
    """σ(utility/temperature), at temperature 0 its limit."""
    if temperature == 0 or utility == 0:
        return 0.5 + 0.5 * ((utility > 0) - (utility < 0))
    scaled = utility / temperature  # may overflow to infinity, which tanh takes
    return 0.5 + 0.5 * math.tanh(scaled / 2)

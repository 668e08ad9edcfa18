"""pass@k of a held-out evaluation: which samples pass, and how likely one of k does, over prompts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from actors.decoding.best_of_n import pass_at_k
from actors.records import Group, Trajectory


@dataclass(frozen=True, slots=True)
class PassRule:
    """What passes: the reward `label` (the whole training reward where that is "") reaches `threshold`.

    Without a threshold it is 1 where that reward is 0 or 1 for every sample, of which each prompt then needs
    two or more; otherwise nothing is said to pass or fail.
    """

    threshold: float | None = None
    label: str = ""

    def counts(self, groups: Iterable[Group]) -> dict[str, list[int]]:
        """Prompt id → [c, n]: c of n samples pass. Prompts of which one lacks the reward are missing."""
        values = {group.prompt.id: [self._value(one) for one in group.trajectories] for group in groups}
        judged = {
            prompt: [value for value in found if value is not None]
            for prompt, found in values.items()
            if None not in found
        }
        threshold = self.threshold
        if threshold is None:
            if not all(len(found) > 1 and set(found) <= {0.0, 1.0} for found in judged.values()):
                return {}
            threshold = 1.0
        return {
            prompt: [sum(value >= threshold for value in found), len(found)]
            for prompt, found in judged.items()
        }

    def _value(self, trajectory: Trajectory) -> float | None:
        return trajectory.components.get(self.label) if self.label else trajectory.reward


def values_of_k(samples: int) -> list[int]:
    """The powers of two up to n, and n itself."""
    return sorted({1 << power for power in range(samples.bit_length())} | {samples})


def over_prompts(counts: Mapping[str, Sequence[int]]) -> dict[int, tuple[float, float | None]]:
    """k → (mean over prompts of pass@k, half width of its 95 % t interval); `counts`: prompt id → [c, n].

    k goes to the smallest n. One prompt alone has no interval.
    """
    if not counts:
        return {}
    found: dict[int, tuple[float, float | None]] = {}
    for k in values_of_k(min(n for _, n in counts.values())):
        each = np.array([pass_at_k([1.0] * c + [0.0] * (n - c), k) for c, n in counts.values()])
        half = None
        if len(each) > 1:
            half = float(stats.t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / math.sqrt(len(each)))
        found[k] = float(each.mean()), half
    return found

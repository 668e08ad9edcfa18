"""The proof of a weight sync: an engine's log-probabilities of fixed sequences against the learner's.

Pure functions of the two tables; `actors.rollout` asks the engine and refuses what is not proved.
"""

import math
from collections.abc import Sequence

from actors.settings import SyncSettings

Table = Sequence[Sequence[float]]
"""Log-probabilities of a probe: a row a sequence, a number a token but the first."""
DEFAULT_TOLERANCE = {"float32": 0.01, "bfloat16": 0.25, "float16": 0.1}
_STALE_TOKENS = 16  # fewer are too few to tell old weights from new ones by a mean


def probe_tolerance(sync: SyncSettings, dtype: str) -> float:
    """Largest accepted |difference| of a probe log-probability, in nats."""
    return DEFAULT_TOLERANCE[dtype] if sync.tolerance is None else sync.tolerance


def max_abs_diff(found: Table, expected: Table) -> float:
    """max |a − b| over two ragged tables; infinite where either is not a number.

    A row of `found` may be shorter by one: the engine can't score the last place of a sequence as long as
    its context. More missing places prove nothing, so they count as an infinite difference.
    """
    worst = 0.0
    for row, expected_row in zip(found, expected, strict=True):
        if len(row) < max(1, len(expected_row) - 1):
            worst = math.inf
        for a, b in zip(row, expected_row, strict=False):
            worst = max(worst, abs(a - b)) if math.isfinite(a) and math.isfinite(b) else math.inf
    return worst


def mean_abs_diff(found: Table, expected: Table) -> float:
    """mean |a − b| over the places that both tables have."""
    gaps = [
        abs(a - b)
        for row, expected_row in zip(found, expected, strict=True)
        for a, b in zip(row, expected_row, strict=False)
    ]
    return sum(gaps) / len(gaps)


def runs_old_weights(found: Table, old: Table, new: Table) -> bool:
    """Whether a probe shows the weights before an update rather than those after it.

    True where mean |found − old| < ½·mean |found − new|. This sees an update that never arrived even where
    it moves no log-probability by as much as the tolerance. Numerical noise, which the engine adds to
    either, is far from both tables alike, so it is not mistaken for old weights. Of fewer than 16 tokens
    nothing is concluded.
    """
    if sum(len(row) for row in found) < _STALE_TOKENS:
        return False
    return mean_abs_diff(found, old) < 0.5 * mean_abs_diff(found, new)

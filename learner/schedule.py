"""The learning rate of each update: linear warm-up, then constant, linear or cosine decay."""

import math
from typing import Literal


def learning_rate(
    update: int,
    *,
    peak: float,
    total: int,
    warmup: int,
    schedule: Literal["constant", "linear", "cosine"],
    floor: float = 0.0,
) -> float:
    """The rate of update number `update` (the first is 0) of `total`; a decay ends at `floor`·peak.

    The first update of a warm-up over n updates runs at peak/n, so that none is wasted at rate 0. Updates
    beyond `total` keep the last rate.
    """
    if update < warmup:
        return peak * (update + 1) / warmup
    if schedule == "constant":
        return peak
    done = min(1.0, (update - warmup) / max(1, total - warmup))
    remaining = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (floor + (1.0 - floor) * remaining)

"""How well labels of the same pair agree.

A pair with n ≥ 2 labels, of which k name one response and n − k the other, has n(n − 1)/2 pairs of labels.

    raw agreement = the mean over pairs of [k(k − 1) + (n − k)(n − k − 1)] / [n(n − 1)]
    alpha         = 1 − D/E     (Krippendorff, nominal)
    D             = Σ n·(1 − agreement of the pair) / N,   N = Σ n
    E             = N/(2N − 1)

Which response of a pair is listed first means nothing. So each pair counts in both orders: the two categories
are then equally frequent, and the disagreement expected by chance is E, whatever the order in the file.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewards.preferences.shares import NO_SHARE, Share, share

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement over the pairs with at least two labels; `alpha` with its 95 % interval over prompts."""

    pairs: int
    labels: int
    raw: Share
    alpha: float | None
    alpha_low: float | None
    alpha_high: float | None


def agreement(cluster: Ints, first: Ints, second: Ints) -> Agreement:
    """Agreement of labels: of pair i `first[i]` name the one response and `second[i]` the other.

    `cluster` (N,) is the prompt that a pair belongs to.
    """
    counts = first + second
    repeated = counts >= 2
    cluster, first, second, counts = (part[repeated] for part in (cluster, first, second, counts))
    if not len(counts):
        return Agreement(0, 0, NO_SHARE, None, None, None)
    agree = (first * (first - 1) + second * (second - 1)) / (counts * (counts - 1))
    _, place = np.unique(cluster, return_inverse=True)
    labels = int(counts.sum())
    raw = share(np.bincount(place, agree), np.bincount(place))
    # D is a share too, of labels instead of pairs: alpha and its interval are linear in it.
    disagree = share(np.bincount(place, counts * (1 - agree)), np.bincount(place, counts), len(counts))
    expected = labels / (2 * labels - 1)
    alpha, low, high = (1 - d / expected for d in (disagree.value, disagree.high, disagree.low))
    return Agreement(len(counts), labels, raw, alpha, low, high)

"""Do preferences order the responses of a prompt? Cycles among three, and what Bradley-Terry lets expect.

Three responses of which every pair has a label are a triad. It is cyclic if a ≻ b, b ≻ c and c ≻ a. Coin
flips make a quarter of all triads cyclic. Under Bradley-Terry with rewards drawn from a normal distribution
of standard deviation s (in logits), x = r_a − r_b and y = r_b − r_c,

    cycles(s)    = 2·E[σ(x)·σ(y)·σ(−x − y)]        1/4 at s = 0, falling to 0
    agreement(s) = E[σ(x)² + σ(−x)²]               of two labels of a pair: 1/2 at s = 0, rising to 1

So the agreement of repeated labels tells s, and s how many cycles noise alone makes. More than those speak
against one scale of reward, whatever the noise. Without repeated labels cycles only tell which s they need:
in a complete comparison of a prompt's responses they say no more than the spread of the numbers of wins does
(Kendall and Babington Smith, Biometrika 31, 1940).
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from rewards.preferences.shares import Share, share

Ints = NDArray[np.int64]
CHANCE = 0.25
LARGEST_SPREAD = 60.0  # logits: a label of such a pair is wrong in less than 1 of 100 cases


@dataclass(frozen=True, slots=True)
class Triads:
    """How many triads were complete in each prompt that has any, and how many of them are cyclic.

    `pairs` are the labelled pairs of those prompts.
    """

    complete: Ints
    cyclic: Ints
    pairs: int

    @property
    def rate(self) -> Share:
        """The share of cyclic triads, its interval over prompts."""
        return share(self.cyclic, self.complete, independent=max(1.0, self.pairs / 3))


def count_triads(group: Ints, winner: Ints, loser: Ints) -> Triads:
    """Triads within each group (a prompt), from labels: `group`, `winner`, `loser` (N,) are numbers.

    The first label of a pair counts: a second one would lower the noise of some pairs and not of others.
    """
    if not len(group):
        return Triads(np.zeros(0, np.int64), np.zeros(0, np.int64), 0)
    low, high = np.minimum(winner, loser), np.maximum(winner, loser)
    _, first = np.unique(np.stack([group, low, high]), axis=1, return_index=True)  # sorted by group
    group, winner, loser = group[first], winner[first], loser[first]
    bounds = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(group)]
    complete, cyclic, pairs = [], [], 0
    for start, end in itertools.pairwise(bounds):
        if end - start < 3:
            continue
        found, bad = _triads_of(winner[start:end].tolist(), loser[start:end].tolist())
        if found:
            complete.append(found)
            cyclic.append(bad)
            pairs += end - start
    return Triads(np.array(complete, np.int64), np.array(cyclic, np.int64), pairs)


def _triads_of(winner: list[int], loser: list[int]) -> tuple[int, int]:
    """Complete and cyclic triads of one graph in O(E·√E): each is found once from each of its three edges."""
    beats: dict[int, set[int]] = {}
    beaten_by: dict[int, set[int]] = {}
    for a, b in zip(winner, loser, strict=True):
        beats.setdefault(a, set()).add(b)
        beaten_by.setdefault(b, set()).add(a)
    nothing: set[int] = set()
    met = {a: beats.get(a, nothing) | beaten_by.get(a, nothing) for a in {*beats, *beaten_by}}
    complete = sum(len(met[a] & met[b]) for a, b in zip(winner, loser, strict=True))
    cyclic = sum(
        len(beats.get(b, nothing) & beaten_by.get(a, nothing)) for a, b in zip(winner, loser, strict=True)
    )
    return complete // 3, cyclic // 3


def cycle_rate(spread: float) -> float:
    """cycles(s) of the module's text, by the trapezoid rule in two dimensions."""
    z = np.linspace(-6, 6, 601)
    a, b = np.meshgrid(z, z)
    # x = s√2·a and y = s·(−a + √3·b)/√2 have variances 2s² and covariance −s².
    x, y = spread * np.sqrt(2) * a, spread * (np.sqrt(3) * b - a) / np.sqrt(2)
    return float(
        np.average(2 * _sigmoid(x) * _sigmoid(y) * _sigmoid(-x - y), weights=np.exp(-(a**2 + b**2) / 2))
    )


def agreement_rate(spread: float) -> float:
    """agreement(s) of the module's text."""
    z = np.linspace(-8, 8, 1601)
    p = _sigmoid(spread * np.sqrt(2) * z)
    return float(np.average(p**2 + (1 - p) ** 2, weights=np.exp(-(z**2) / 2)))


def label_accuracy(spread: float) -> float:
    """E[σ(|x|)]: how often a label names the response of higher reward."""
    z = np.linspace(-8, 8, 1601)
    return float(np.average(_sigmoid(np.abs(spread * np.sqrt(2) * z)), weights=np.exp(-(z**2) / 2)))


def spread_from_agreement(agreement: float) -> float:
    """The s that makes two labels of a pair agree so often; 0 at chance, at most `LARGEST_SPREAD`."""
    if agreement <= 0.5:
        return 0.0
    if agreement >= agreement_rate(LARGEST_SPREAD):
        return LARGEST_SPREAD
    return float(brentq(lambda s: agreement_rate(s) - agreement, 0.0, LARGEST_SPREAD, xtol=1e-6))


def spread_from_cycles(cycles: float) -> float:
    """The s that makes so many triads cyclic; 0 at chance or above, at most `LARGEST_SPREAD`."""
    if cycles >= CHANCE:
        return 0.0
    if cycles <= cycle_rate(LARGEST_SPREAD):
        return LARGEST_SPREAD
    return float(brentq(lambda s: cycle_rate(s) - cycles, 0.0, LARGEST_SPREAD, xtol=1e-4))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(x / 2))

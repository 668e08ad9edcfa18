"""How often one policy's responses beat another's, prompt by prompt: those after training, those before."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.evaluation import Evaluation
from rewards.preferences.length_control import length_controlled_win_rate

ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Means:
    """Means over the samples of each prompt, by prompt: of every reward, by its label, and of tokens."""

    rewards: Mapping[str, Mapping[str, float]]
    lengths: Mapping[str, float]


def win_rates(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Any]]:
    """Of the trained policy over the one before training; see `wins_over`."""
    return wins_over(Means(before.components, before.lengths), Means(after.components, after.lengths))


def wins_over(before: Means, after: Means) -> dict[str, dict[str, Any]]:
    """By reward: `raw` and `length_controlled` win rates, each with its 95 % interval, over common prompts.

    A prompt is won where the mean reward of its samples is higher in `after` than in `before`. A tie is half
    a win, and so is a difference below `ROUNDING` times the largest of these means: the order of a sum, or
    what else was in a model's batch, can make it. Lengths are mean response tokens. `length_coefficient` is
    φ, above 0 where longer responses win; `strength` is C, which cross-validation chose. Where length alone
    decides every prompt, `identified` is False and the length-controlled win rate None. Rewards that both did
    not measure on two prompts or more are left out.
    """
    found = {}
    for label in sorted(before.rewards.keys() & after.rewards.keys()):
        theirs, mine = before.rewards[label], after.rewards[label]
        common = sorted(theirs.keys() & mine.keys() & before.lengths.keys() & after.lengths.keys())
        if "/" in label or len(common) < 2:  # a number beside a reward is none
            continue
        means = np.array([[mine[key], theirs[key]] for key in common])
        difference = means[:, 0] - means[:, 1]
        tied = np.abs(difference) <= ROUNDING * np.abs(means).max()
        rate = length_controlled_win_rate(
            np.where(tied, 0.5, difference > 0),
            [after.lengths[key] for key in common],
            [before.lengths[key] for key in common],
            prompts=common,
        )
        found[label] = {
            "raw": rate.raw,
            "raw_ci95": [rate.raw_low, rate.raw_high],
            "length_controlled": rate.controlled if rate.identified else None,
            "length_controlled_ci95": [rate.low, rate.high] if rate.identified else None,
            "identified": rate.identified,
            "length_coefficient": rate.phi,
            "strength": rate.strength,
            "prompts": rate.prompts,
        }
    return found

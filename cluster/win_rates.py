"""How often the trained policy's responses beat those of the policy before training, prompt by prompt."""

from typing import Any

import numpy as np

from cluster.evaluation import Evaluation
from rewards.preferences.length_control import length_controlled_win_rate


def win_rates(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Any]]:
    """By reward: `raw` and `length_controlled` win rates, each with its 95 % interval, over common prompts.

    A prompt is won where the mean reward of its samples is higher after training than before; a tie is half
    a win. Lengths are mean response tokens. Rewards that both evaluations did not measure on two prompts or
    more are left out.
    """
    found = {}
    for label in sorted(before.components.keys() & after.components.keys()):
        theirs, mine = before.components[label], after.components[label]
        common = sorted(theirs.keys() & mine.keys() & before.lengths.keys() & after.lengths.keys())
        if "/" in label or len(common) < 2:  # a number beside a reward is none
            continue
        difference = np.array([mine[key] - theirs[key] for key in common])
        rate = length_controlled_win_rate(
            (difference > 0) + 0.5 * (difference == 0),
            [after.lengths[key] for key in common],
            [before.lengths[key] for key in common],
            prompts=common,
        )
        found[label] = {
            "raw": rate.raw,
            "raw_ci95": [rate.raw_low, rate.raw_high],
            "length_controlled": rate.controlled,
            "length_controlled_ci95": [rate.low, rate.high],
            "prompts": rate.prompts,
        }
    return found

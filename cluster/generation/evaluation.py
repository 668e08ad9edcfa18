"""What samples of a policy say: mean reward, pass@k, and best-of-n against its KL, all from the same samples.

Rewards and pass@k are means over prompts of estimates that are unbiased for each prompt; KL and win rate are
those of the samples' own distribution, in which ties are seen. All have 95 % t intervals over prompts, but
for the KL's bound, which is a number of n alone.
Best-of-n chooses by the reward; the rewards of role `evaluate` say what the choice is worth.

Legend: P prompts, N samples of each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.decoding.best_of_n import (
    best_of_n_estimate,
    best_of_n_win_rate,
    kl_bound,
    pass_at_k,
    sampled_kl,
)
from cluster.evaluation import half_width

Array = NDArray[np.float64]
RELIABLE = 4  # samples for each candidate, from which an estimate of best-of-n is to be trusted


@dataclass(frozen=True, slots=True)
class PromptSamples:
    """N samples of one prompt: rewards, components by label, tokens, and whether each was finished."""

    rewards: Array
    components: Mapping[str, Array]
    tokens: Array
    finished: Array


def estimate(values: Sequence[float]) -> dict[str, float | None]:
    """Mean over prompts, and half of its 95 % interval; None for a single prompt."""
    found = np.asarray(values, dtype=np.float64)
    return {"mean": float(found.mean()), "ci95": half_width(found) if len(found) > 1 else None}


def evaluate_samples(
    prompts: Sequence[PromptSamples], judges: Sequence[str], threshold: float | None
) -> dict[str, Any]:
    """The tables of evaluation.json; `judges` are the components of role `evaluate`.

    `threshold`: a reward from which a sample passes; None: 1 where all rewards are 0 or 1, else no pass@k.
    """
    N = len(prompts[0].rewards)
    labels = sorted(set().union(*(one.components for one in prompts)))
    return {
        "prompts": len(prompts),
        "samples": N,
        "reward": _over(prompts, lambda one: float(one.rewards.mean())),
        "components": {
            label: _over(prompts, lambda one, label=label: float(one.components[label].mean()))  # type: ignore[misc]
            for label in labels
        },
        "response_tokens": _over(prompts, lambda one: float(one.tokens.mean())),
        "finished_fraction": _over(prompts, lambda one: float(one.finished.mean())),
        "pass_at_k": _pass_at_k(prompts, N, threshold),
        "best_of_n": [_best_of_n(prompts, n, N, judges) for n in _powers_of_two(N)],
    }


def _over(prompts: Sequence[PromptSamples], of: Callable[[PromptSamples], float]) -> dict[str, float | None]:
    return estimate([of(one) for one in prompts])


def _pass_at_k(prompts: Sequence[PromptSamples], N: int, threshold: float | None) -> dict[str, Any] | None:
    if threshold is None:
        if not all(np.isin(one.rewards, (0.0, 1.0)).all() for one in prompts):
            return None
        threshold = 1.0
    passed = [one.rewards >= threshold for one in prompts]
    rows: list[dict[str, Any]] = [
        {"k": k, **estimate([pass_at_k(one, k) for one in passed])} for k in _powers_of_two(N)
    ]
    return {"threshold": threshold, "rows": rows}


def _best_of_n(prompts: Sequence[PromptSamples], n: int, N: int, judges: Sequence[str]) -> dict[str, Any]:
    """One row of the curve. `kl` sees ties, `kl_bound` holds for any rewards."""
    flat = np.full(N, 1 / N)
    return {
        "n": n,
        "kl": _over(prompts, lambda one: sampled_kl(one.rewards, n)),
        "kl_bound": kl_bound(n),
        "win_rate": _over(prompts, lambda one: best_of_n_win_rate(flat, one.rewards, n)),
        "reward": _over(prompts, lambda one: best_of_n_estimate(one.rewards, one.rewards, n)),
        "judged": {
            label: _over(
                prompts,
                lambda one, label=label: best_of_n_estimate(one.rewards, one.components[label], n),  # type: ignore[misc]
            )
            for label in judges
        },
        "reliable": RELIABLE * n <= N,
    }


def _powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … up to `most`, which is among them."""
    found = [1 << power for power in range(most.bit_length()) if 1 << power <= most]
    return found if found[-1] == most else [*found, most]

"""How good a trained reward model is, on held-out pairs and on pairs from elsewhere: `evaluation.json`.

Legend: P pairs of a set, N its distinct responses, K members.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.reward_job.inputs import HELDOUT, TRAIN, PairSet
from learner.reward_training import PairData
from rewards.models.card import EVALUATION, RewardCard
from rewards.models.loading import scores_from_raw, without_length
from rewards.preferences.evaluation import (
    Estimate,
    accuracy,
    accuracy_by_subset,
    accuracy_difference,
    calibration,
    length_report,
    pooled_spearman,
    within_prompt_spearman,
)

Array = NDArray[np.float64]
_POINTS = 400  # responses that the picture of score against length shows


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What a reward model's folder says of how good it was found to be; empty where it says nothing."""
    try:
        found = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def evaluate_model(
    raw: Array, card: RewardCard, data: PairData, sets: Mapping[str, PairSet], seed: int
) -> dict[str, Any]:
    """Every set but the training pairs, by name; `raw` (K, all sequences) are the members' raw scores."""
    result: dict[str, Any] = {}
    estimates: dict[str, Estimate] = {}
    for name, pairs in sets.items():
        if name == TRAIN:
            continue
        estimates[name], result[name] = evaluate_pairs(raw, card, data.lengths, pairs, seed)
        if name != HELDOUT:
            drop = accuracy_difference(estimates[HELDOUT], estimates[name])
            result[name]["accuracy_drop"] = plain(drop)
            result[name]["drop_detected"] = drop.low > 0
    train = sets[TRAIN]
    scores = scores_from_raw(raw, np.array(data.lengths, dtype=np.float64), card).value
    result[TRAIN] = {
        "pairs": len(train),
        "accuracy": plain(accuracy(scores[train.chosen], scores[train.rejected], train.prompts)),
    }
    return result


def evaluate_pairs(
    raw: Array, card: RewardCard, lengths: Sequence[int], pairs: PairSet, seed: int
) -> tuple[Estimate, dict[str, Any]]:
    """The accuracy, and everything that is known of these pairs as plain values.

    Calibration takes differences of raw scores (the mean over members, less what length explains). With one
    member and the Bradley-Terry loss those are the logits that the loss fitted. ODIN fitted the sum of its
    two heads and keeps one, a residual model has had its slope on length taken out since, and classification
    fitted responses by themselves: there it says how far the differences are from log-odds of a preference.
    All else takes the score that a policy would get.
    """
    length = np.asarray(lengths, dtype=np.float64)
    scores = scores_from_raw(raw, length, card)
    logits = without_length(raw, length, card).mean(axis=0)
    chosen, rejected = np.array(pairs.chosen), np.array(pairs.rejected)
    value = scores.value
    right = accuracy(value[chosen], value[rejected], pairs.prompts)
    reliability = calibration(logits[chosen], logits[rejected], seed=seed)
    responses, prompts, gold = _responses(pairs)
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "prompts": len(set(pairs.prompts)),
        "accuracy": plain(right),
        "accuracy_of_members": [float(np.mean(one[chosen] > one[rejected])) for one in scores.members],
        "log_likelihood": float(-np.logaddexp(0.0, logits[rejected] - logits[chosen]).mean()),
        "calibration": plain(reliability),
        "length": plain(length_report(value[responses], length[responses], prompts, gold, seed=seed)),
        "longer_wins": float(
            np.mean(value[chosen] > value[rejected], where=length[chosen] > length[rejected])
        )
        if (length[chosen] > length[rejected]).any()
        else None,
        "shorter_wins": float(
            np.mean(value[chosen] > value[rejected], where=length[chosen] < length[rejected])
        )
        if (length[chosen] < length[rejected]).any()
        else None,
        "members_std": float(scores.std[responses].mean()) if card.members > 1 else None,
        "points": _points(value[responses], length[responses], seed),
    }
    if any(pairs.subsets):
        by_subset = accuracy_by_subset(value[chosen], value[rejected], pairs.subsets, pairs.prompts)
        found["subsets"] = {name or "(none)": plain(one) for name, one in by_subset.items()}
    if gold is not None:
        found["gold"] = {
            "spearman_within": plain(within_prompt_spearman(value[responses], gold, prompts, seed=seed)),
            "spearman_pooled": plain(pooled_spearman(value[responses], gold, prompts, seed=seed)),
        }
    return right, found


def _responses(pairs: PairSet) -> tuple[NDArray[np.int64], list[str], Array | None]:
    """Distinct responses of the pairs, their prompts, and gold rewards where all are known."""
    first: dict[int, tuple[str, float]] = {}
    gold = pairs.gold if pairs.has_gold else [(math.nan, math.nan)] * len(pairs)
    for chosen, rejected, prompt, (better, worse) in zip(
        pairs.chosen, pairs.rejected, pairs.prompts, gold, strict=True
    ):
        first.setdefault(chosen, (prompt, better))
        first.setdefault(rejected, (prompt, worse))
    values = np.array([number for _, number in first.values()])
    return (
        np.array(list(first), dtype=np.int64),
        [prompt for prompt, _ in first.values()],
        values if pairs.has_gold else None,
    )


def _points(values: Array, lengths: Array, seed: int) -> list[list[float]]:
    """(length, score) of some responses, drawn at random where there are many."""
    drawn = np.random.default_rng(seed).permutation(len(values))[:_POINTS]
    return [[float(lengths[i]), float(values[i])] for i in sorted(drawn)]


def plain(value: Any) -> Any:
    """Dataclasses as JSON can hold them; numbers that are not finite become null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value

"""`headrace evaluate --against`: wins over another policy on the same prompts, raw and at equal length.

samples.jsonl of an earlier evaluation ─► means by prompt ─┐
the samples of this one ─────────────────► means by prompt ─┴─► raw and length-controlled win rates
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.win_rates import Means, wins_over

SAMPLES = "samples.jsonl"
Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Baseline:
    """An earlier evaluation: its folder, the policy that was sampled, and its means."""

    folder: Path
    policy: str
    means: Means


def read_baseline(folder: Path) -> Baseline:
    """Read an evaluation's samples. ValueError where there are none, or they do not say how long they are."""
    path = folder / SAMPLES
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]  # a text has more line ends
        return Baseline(folder, str(lines[0]["policy"]), means_of(lines))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"--against {folder}: {SAMPLES} there is not what `headrace evaluate` writes ({error!r}); give "
            "the folder that was its --out, and make it again if an earlier version wrote it"
        ) from None


def means_of(lines: Iterable[Line]) -> Means:
    """Means over all samples of a prompt, of each reward by itself and of tokens."""
    rewards: dict[str, dict[str, list[float]]] = {}
    tokens: dict[str, list[float]] = {}
    for line in lines:
        key = prompt_key(line["prompt"], line["row"])
        tokens.setdefault(key, []).extend(line["tokens"])
        for components in line["components"]:
            for label, value in components.items():
                rewards.setdefault(label, {}).setdefault(key, []).append(value)
    return Means({label: _means(by_prompt) for label, by_prompt in rewards.items()}, _means(tokens))


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {key: sum(several) / len(several) for key, several in values.items()}


def prompt_key(prompt: Any, row: Mapping[str, Any]) -> str:
    """What makes two prompts the same: their text or messages, and what rewards read beside them."""
    return json.dumps([prompt, dict(row)], sort_keys=True, ensure_ascii=False, default=str)


def require_comparable(baseline: Baseline, keys: Iterable[str], labels: Sequence[str]) -> None:
    """ValueError unless two of these prompts and one of these rewards are in the baseline."""
    common = set(keys) & baseline.means.lengths.keys()
    if len(common) < 2:
        raise ValueError(
            f"--against {baseline.folder}: {len(common)} of these prompts are among its samples, and 2 are "
            "needed: give the --prompts that it was made with"
        )
    if not set(labels) & baseline.means.rewards.keys():
        raise ValueError(
            f"--against {baseline.folder}: it was judged by {', '.join(sorted(baseline.means.rewards))} and "
            f"this is by {', '.join(labels)}: name one of its rewards"
        )


def compare(baseline: Baseline, lines: Iterable[Line]) -> dict[str, Any]:
    """What evaluation.json has under `against`: the baseline's folder and policy, and win rates over it."""
    return {
        "folder": str(baseline.folder),
        "policy": baseline.policy,
        "win_rates": wins_over(baseline.means, means_of(lines)),
    }

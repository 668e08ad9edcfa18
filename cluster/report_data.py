"""What a run folder holds, read leniently: the run may be going on, or have been killed in mid-line."""

import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from cluster.monitor import DECISIONS, METRICS, SAMPLES, SUMMARY, WARMUP, read_rows
from cluster.redact import redact

_TOLERANCES = {"float32": 0.01, "bfloat16": 0.25}  # what an unset `sync.tolerance` means

Points = tuple[list[float], list[float]]


@dataclass(frozen=True, slots=True)
class RunData:
    """A run folder's contents; whatever is missing is empty."""

    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    warmup: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    quarantined: Mapping[str, int]
    decisions: Sequence[Mapping[str, Any]] = ()

    def points(self, name: str, axis: str = "learner_step") -> Points:
        """(x, y) of the rows that have a number under `name`."""
        rows = self.warmup if axis.startswith("warmup/") else self.metrics
        pairs = [(row.get(axis), row.get(name)) for row in rows]
        good = [(float(x), float(y)) for x, y in pairs if _is_number(x) and _is_number(y)]
        return [x for x, _ in good], [y for _, y in good]

    def setting(self, path: str) -> Any:
        """A value of the configuration, for example `run.steps`; None if it is not there."""
        value: Any = self.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @property
    def steps_done(self) -> int:
        """Learner steps in the metrics."""
        return int(max(self.points("learner_step")[1], default=0))

    @property
    def tolerance(self) -> float:
        """The largest difference that a weight sync's proof may show, in nats."""
        given = self.setting("sync.tolerance")
        precision = self.setting("learner.precision")
        return float(given) if _is_number(given) else _TOLERANCES.get(str(precision), 0.01)

    def heldout(self) -> list[tuple[float, float, float]]:
        """(step, held-out reward, half width of its interval or 0); from the summary where no row has any."""
        rows = [
            (
                float(row.get("learner_step") or 0),
                float(row["heldout/reward"]),
                row.get("heldout/reward_ci95"),
            )
            for row in self.metrics
            if _is_number(row.get("heldout/reward"))
        ]
        if not rows:
            ends = ((0.0, "reward_initial"), (float(self.steps_done), "reward_final"))
            rows = [(x, float(self.summary[k]), None) for x, k in ends if _is_number(self.summary.get(k))]
        return [(x, y, float(half) if _is_number(half) else 0.0) for x, y, half in rows]

    def passes(self) -> list[int]:
        """The k of pass@k that at least two held-out evaluations have, five at most."""
        prefix = "heldout/pass_at/"
        counts = Counter(key for row in self.metrics for key, value in row.items() if _is_number(value))
        found = sorted(
            int(key.removeprefix(prefix))
            for key, count in counts.items()
            if count > 1 and key.startswith(prefix) and not key.endswith("_ci95")
        )
        return [*found[:4], *found[-1:]] if len(found) > 5 else found

    def before_and_after(self) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Pairs of samples of the same held-out prompt, from the first and the last step that have any."""
        by_step: dict[int, dict[str, Mapping[str, Any]]] = {}
        for row in self.samples:
            if "prompt_id" in row and _is_number(row.get("learner_step")):
                by_step.setdefault(int(row["learner_step"]), {}).setdefault(str(row["prompt_id"]), row)
        if len(by_step) < 2:
            return []
        first = by_step[min(by_step)]
        for step in sorted(by_step, reverse=True)[:-1]:
            common = [key for key in first if key in by_step[step]]
            if common:
                return [(first[key], by_step[step][key]) for key in common]
        return []


def load_run(run_dir: Path) -> RunData:
    """Read a run folder; a ValueError if there is no such folder or it holds no run."""
    if not run_dir.is_dir():
        raise ValueError(f"no run folder at {run_dir}: give the folder that `headrace train` wrote")
    known = (METRICS, SUMMARY, WARMUP, "config.toml")
    if not any((run_dir / name).is_file() for name in known):
        raise ValueError(f"{run_dir} is no run folder: it has none of {', '.join(known)}")
    reasons = Counter(str(row.get("reason")) for row in read_rows(run_dir / "quarantine.jsonl"))
    return RunData(
        name=run_dir.resolve().name,
        config=redact(_read_toml(run_dir / "config.toml")),
        summary=redact(_read_json(run_dir / SUMMARY)),
        metrics=list(read_rows(run_dir / METRICS)),
        warmup=list(read_rows(run_dir / WARMUP)),
        samples=list(read_rows(run_dir / SAMPLES)),
        quarantined=dict(reasons.most_common()),
        decisions=list(read_rows(run_dir / DECISIONS)),
    )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}

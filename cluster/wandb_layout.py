"""How a run looks in Weights & Biases: axes, summaries, sections, and the columns of the samples' table.

Pure data. W&B's default workspace makes one section of panels for each part of a name before its first slash,
so the names in `cluster.metrics` are the layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.metrics import SECTIONS

LEARNER_AXIS = "learner_step"
WARMUP_AXIS = "warmup/step"
_WARMUP = "warmup"

# What the overview of a run shows instead of the last value: its extremes, where they say more.
SUMMARIES: dict[str, str] = {
    "reward/mean": "max,last",
    "heldout/reward": "max,last",
    "kl/sequence": "max,last",
    "policy/entropy": "min,last",
    "length/finished_fraction": "min,last",
    "lag/max": "max",
    "mismatch/ess": "min,last",
    "mismatch/kl": "max,last",
    "mismatch/log_ratio_max": "max,last",
    "ppo/clip_fraction": "max,last",
    "value/explained_variance": "max,last",
    "optimizer/grad_norm": "max,last",
    "sync/probe_max_abs_diff": "max",
    "perf/tokens_per_s": "mean,last",
    "perf/efficiency": "mean,last",
    "perf/learner_wait_fraction": "mean,last",
    "perf/rollout_wait_fraction": "mean,last",
    "timing_s/step": "mean,max,last",
    "timing_s/sync": "mean,max,last",
    "memory/learner": "max",
}


@dataclass(frozen=True, slots=True)
class Definition:
    """One call of `define_metric`."""

    name: str
    axis: str | None = None
    summary: str | None = None
    hidden: bool = False


def definitions() -> list[Definition]:
    """Every axis and summary. No two patterns match the same name: W&B does not say which would win."""
    names = [metric.name for section in SECTIONS.values() for metric in section]
    sections = dict.fromkeys(name.split("/")[0] for name in names if "/" in name)
    plain = [name for name in names if "/" not in name and name != LEARNER_AXIS]
    return [
        Definition(LEARNER_AXIS, hidden=True),
        Definition(WARMUP_AXIS, hidden=True),
        *(Definition(name, LEARNER_AXIS) for name in plain),
        *(Definition(f"{name}/*", WARMUP_AXIS if name == _WARMUP else LEARNER_AXIS) for name in sections),
        *(Definition(name, LEARNER_AXIS, summary) for name, summary in SUMMARIES.items()),
    ]


# A table in W&B needs its columns and their types before its first row.
SAMPLE_COLUMNS: dict[str, type] = {
    LEARNER_AXIS: int,
    "phase": str,
    "prompt_id": str,
    "prompt": str,
    "completion": str,
    "reward": float,
    "finished": bool,
    "more": str,
}


def sample_cells(step: int, row: Mapping[str, Any]) -> list[Any]:
    """A sample as a row of the table; values that have no column of their own stand together in the last."""
    others = {name: value for name, value in row.items() if name not in SAMPLE_COLUMNS}
    more = ", ".join(f"{name}: {value}" for name, value in others.items()) or None
    values = {**row, LEARNER_AXIS: step, "more": more}
    cells = ((values.get(name), kind) for name, kind in SAMPLE_COLUMNS.items())
    return [None if value is None else kind(value) for value, kind in cells]

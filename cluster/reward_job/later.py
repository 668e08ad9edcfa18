"""`headrace evaluate-reward`: a trained reward model on pairs that came after it.

    files of pairs ─► those on prompts that it did not learn from ─► scores ─► a table, and a JSON file

What a policy writes after PPO, or when it samples hotter or longer, cannot be among a reward model's held-out
pairs. Label some of it and see what the model is worth there.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.config_file import apply_override, validated
from cluster.data_files import Quarantine
from cluster.labelling.files import quarantine_beside, require_new
from cluster.monitor import dump, write_atomically
from cluster.preferences.report import PreferenceReport
from cluster.preferences.settings import PreferenceSettings
from cluster.reward_job.config import CHOICE_AND_GOLD, EvaluationSettings
from cluster.reward_job.evaluation import evaluate_pairs, plain, read_evaluation
from cluster.reward_job.inputs import HELDOUT, PairSet, SequenceTable, pairs_from_elsewhere
from rewards.models.card import read_label_keys
from rewards.models.loading import RewardModel, load_reward_model
from rewards.preferences.evaluation import Estimate, accuracy_difference
from rewards.settings import Settings


class LaterSettings(Settings):
    """What `--set` may say: how the files are read, and which columns hold true rewards."""

    preferences: PreferenceSettings
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)

    @model_validator(mode="after")
    def _gold_of_both_or_neither(self) -> Self:
        if len(self.evaluation.columns) == 1:
            raise ValueError(
                f"evaluation has the one column {self.evaluation.columns[0]!r}: true rewards are needed of "
                "both responses, or of neither: set chosen_gold_column and rejected_gold_column"
            )
        if self.evaluation.columns and self.preferences.choice_column:
            raise ValueError(
                f"evaluation.chosen_gold_column = {self.evaluation.chosen_gold_column!r} {CHOICE_AND_GOLD}"
            )
        return self


@dataclass(frozen=True, slots=True)
class LaterPairs:
    """The pairs of one file, by the numbers of their sequences, and what its labels are like."""

    name: str
    pairs: PairSet
    report: PreferenceReport


def run_evaluate_reward(options: argparse.Namespace) -> int:
    """Read, score, write, print; ValueError for what the user can mend."""
    require_new(options.out)
    if len(set(options.pairs)) < len(options.pairs):
        raise ValueError("a file of pairs is named twice: name each once")
    settings = _settings(options)
    model = load_reward_model(options.model, device=options.device)
    table = SequenceTable(model.encoder)
    with quarantine_beside(options.out) as quarantine:
        sets = [_read(file, settings, model, table, quarantine) for file in options.pairs]
        quarantine.announce(lambda text: print(text, file=sys.stderr))
    sequences = table.sequences
    raw = model.raw([sequences[number] for number in range(len(sequences))])
    found = _measure(model, raw, table.lengths, sets, options.seed)
    write_atomically(options.out, dump(found, indent=1) + "\n")
    options.out.chmod(0o600)
    _print(found)
    return 0


def _settings(options: argparse.Namespace) -> LaterSettings:
    tables: dict[str, Any] = {"preferences": {"train": options.pairs[0]}}
    for override in options.overrides:
        apply_override(tables, override)
    found: LaterSettings = validated(LaterSettings, tables, "--set")
    columns = [name for name in found.evaluation.columns if name not in found.preferences.keep_columns]
    kept = [*found.preferences.keep_columns, *columns]
    return found.model_copy(
        update={"preferences": found.preferences.model_copy(update={"keep_columns": kept})}
    )


def _read(
    file: str, settings: LaterSettings, model: RewardModel, table: SequenceTable, quarantine: Quarantine
) -> LaterPairs:
    try:
        rows, report = pairs_from_elsewhere(
            file, settings.preferences, quarantine, read_label_keys(model.path)
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    pairs = table.add(rows, file, quarantine, settings.evaluation)
    if not len(pairs):
        raise ValueError(
            f"{file}: none of its {len(rows)} pairs can be read by the model ({quarantine.describe()}); see "
            f"{quarantine.path}"
        )
    return LaterPairs(file, pairs, report)


def _measure(
    model: RewardModel, raw: Any, lengths: Sequence[int], sets: Sequence[LaterPairs], seed: int
) -> dict[str, Any]:
    """By file what a reward model's `evaluation.json` has, the drop from held-out accuracy, and doubts."""
    heldout = read_evaluation(model.path).get(HELDOUT, {}).get("accuracy")
    result: dict[str, Any] = {}
    for one in sets:
        accuracy, found = evaluate_pairs(np.asarray(raw), model.card, lengths, one.pairs, seed)
        if heldout is not None:
            drop = accuracy_difference(Estimate(**heldout), accuracy)
            found |= {"accuracy_drop": plain(drop), "drop_detected": drop.low > 0}
        found["doubts"], found["warnings"] = one.report.doubts, one.report.warnings
        result[one.name] = found
    return {"model": str(model.path), "version": model.card.version, HELDOUT: heldout, "files": result}


def _print(found: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"{escape(found['model'])} (version {found['version'][:12]})")
    for name in (
        "pairs of",
        "pairs",
        "accuracy",
        "drop from held-out",
        "calibration error",
        "score and length",
    ):
        table.add_column(name)
    for name, one in found["files"].items():
        drop = one.get("accuracy_drop")
        table.add_row(
            escape(name),
            f"{one['pairs']:,}",
            _interval(one["accuracy"], sign=""),
            "–" if drop is None else _interval(drop) + (", detected" if one["drop_detected"] else ""),
            f"{one['calibration']['ece']:.3f} (chance: under {one['calibration']['ece_by_chance']:.3f})",
            _interval(one["length"]["pearson"]),
        )
    console.print(table)
    for name, one in found["files"].items():
        for text in (*one["doubts"], *one["warnings"]):
            console.print(f"{name}: {text}", style="yellow", markup=False)


def _interval(estimate: dict[str, float] | None, sign: str = "+") -> str:
    if estimate is None:
        return "–"
    value, low, high = (f"{estimate[name]:{sign}.3f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"

"""Preference rows to pairs: read, checked, deduplicated, split by prompt, and reported.

read_rows → parse_pair → LabelTable → contradictions → split by prompt → PreferenceData
               └────────────┴────────────┴→ Quarantine, with line and reason
"""

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.data_files import BadRow, Quarantine, Reading, read_rows
from cluster.preferences.analysis import analyse
from cluster.preferences.forms import parse_pair
from cluster.preferences.labels import LabelTable
from cluster.preferences.report import LINES_SHOWN, PreferenceReport, SourceCounts
from cluster.preferences.settings import DEFAULT_HELDOUT_FRACTION, PreferenceSettings
from cluster.preferences.split import heldout_prompts, part_of
from rewards.preferences.records import Preference

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PreferenceData:
    """Training and held-out pairs; no prompt is in both. `report` says what the data is like."""

    train: list[Preference]
    heldout: list[Preference]
    report: PreferenceReport


def load_preferences(settings: PreferenceSettings, quarantine: Quarantine) -> PreferenceData:
    """Read training and held-out pairs.

    Raises ValueError where a source cannot be read or has no good pair, no prompt can be held out, or the
    wanted half of the prompts is empty.
    """
    apart = _read("heldout", settings, quarantine, frozenset()) if settings.heldout else None
    source = _read(
        "train", settings, quarantine, frozenset(apart.table.prompt_keys) if apart else frozenset()
    )
    held = apart or source
    aside = np.zeros(len(source.kept), bool) if apart else _held_out(source, settings)
    train_at = source.kept[~aside]
    heldout_at = apart.kept if apart else source.kept[aside]
    train_at = _half(source, train_at, settings)
    train = [source.table.labels[place] for place in train_at]
    heldout = [held.table.labels[place] for place in heldout_at]
    report = PreferenceReport(
        sources=(source.counts, apart.counts) if apart else (source.counts,),
        part=settings.part,
        train_pairs=len(train),
        train_prompts=len(np.unique(source.table.prompt[train_at])),
        heldout_pairs=len(heldout),
        heldout_prompts=len(np.unique(held.table.prompt[heldout_at])),
        with_margin=sum(label.margin != 0 for label in train),
        with_weight=sum(label.weight != 1 for label in train),
        subsets=dict(Counter(label.subset for label in heldout).most_common()),
        policy=settings.contradictions,
        findings=analyse(source.table),
    )
    return PreferenceData(train, heldout, report)


# --- one source ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    """All labels of a source, and the places of those that are not put aside as contradictions."""

    table: LabelTable
    kept: Ints
    counts: SourceCounts


class _LineReading(Reading):
    """A reading that also remembers the first lines of every reason."""

    def __init__(self, source: str, quarantine: Quarantine) -> None:
        super().__init__(source, quarantine)
        self.lines: dict[str, list[int]] = {}

    def reject(self, line: int, bad: BadRow, excerpt: object) -> None:
        """Put a row aside."""
        super().reject(line, bad, excerpt)
        lines = self.lines.setdefault(bad.reason, [])
        if len(lines) < LINES_SHOWN:
            lines.append(line)


def _read(field: str, settings: PreferenceSettings, quarantine: Quarantine, taken: frozenset[str]) -> _Source:
    """The labels of `preferences.train` or `.heldout`; rows whose prompt is in `taken` are put aside."""
    name, split = (
        (settings.train, settings.train_split)
        if field == "train"
        else (settings.heldout, settings.heldout_split)
    )
    reading, table = _LineReading(name, quarantine), LabelTable()
    rows = read_rows(
        name,
        reading,
        field=f"preferences.{field}",
        split=split,
        subset=settings.subset,
        revision=settings.revision,
    )
    for line, row in rows:
        try:
            label = parse_pair(row, line, settings)
            if taken and label.prompt_key in taken:
                raise BadRow("in held-out set", "the same prompt is in preferences.heldout")
            table.add(label)
        except BadRow as bad:
            reading.reject(line, bad, json.dumps(row, ensure_ascii=False))
        if len(table.labels) == settings.max_rows:
            break
    reading.require_good(len(table.labels), f"preferences.{field}")
    aside = table.settle(settings.contradictions)
    for place in sorted(aside):
        label = table.labels[place]
        reading.reject(label.line, aside[place], json.dumps(label.chosen, ensure_ascii=False))
    kept = np.array([place for place in range(len(table.labels)) if place not in aside], np.int64)
    reading.require_good(len(kept), f"preferences.{field}")
    lines = len(kept) + reading.blank + sum(reading.quarantined.values())
    return _Source(
        table,
        kept,
        SourceCounts(
            f"preferences.{field}",
            name,
            lines,
            len(kept),
            reading.blank,
            dict(reading.quarantined),
            reading.lines,
        ),
    )


# --- split ---------------------------------------------------------------------------------------------


def _held_out(source: _Source, settings: PreferenceSettings) -> NDArray[np.bool_]:
    """Which of the kept labels are held out: all those of some prompts."""
    prompts = source.table.prompt[source.kept]
    present = np.unique(prompts)
    keys = [source.table.prompt_keys[number] for number in present]
    fraction = settings.heldout_fraction or DEFAULT_HELDOUT_FRACTION
    chosen = heldout_prompts(keys, fraction, settings.split_seed)
    return np.isin(prompts, present[sorted(chosen)])


def _half(source: _Source, places: Ints, settings: PreferenceSettings) -> Ints:
    """The places whose prompts belong to the wanted half."""
    if settings.part == "all":
        return places
    prompts = source.table.prompt[places]
    keys = source.table.prompt_keys
    mine = [
        number for number in np.unique(prompts) if part_of(keys[number], settings.split_seed) == settings.part
    ]
    if not mine:
        raise ValueError(
            f"preferences.part = {settings.part!r} is empty: all {len(np.unique(prompts))} training prompts "
            "fall into the other half; add prompts, or change preferences.split_seed"
        )
    return places[np.isin(prompts, mine)]

"""Annotations back into preference rows, with an account of every line.

Of one annotator's choices for a pair the last one counts; what is undone does not. Ties and skips make no
row: they are counted, and named in the report.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy import stats

from cluster.data_files import BadRow, Quarantine, Reading, read_rows
from cluster.labelling.files import read_annotations
from cluster.labelling.records import Annotation, Pair
from cluster.preferences.forms import parse_pair
from cluster.preferences.settings import PreferenceSettings
from rewards.preferences.records import Preference

_OWN = frozenset(
    (
        "prompt",
        "chosen",
        "rejected",
        "annotator",
        "margin",
        "weight",
        "key",
        "rule",
        "shown_first",
        "finished",
    )
)
Row = dict[str, Any]


@dataclass(slots=True)
class MergeReport:
    """What became of every annotation: lines = undone + revised + outside + ties + skips + decided
    + problems.

    `revised`: an annotator's earlier choices for a pair chosen about again. `outside`: pairs that are not in
    the ranked file. `decided`: of which `present` were among the existing rows already.
    """

    pairs: int
    lines: int = 0
    decided: int = 0
    ties: int = 0
    skips: int = 0
    undone: int = 0
    revised: int = 0
    present: int = 0
    unlabelled: int = 0
    empty_responses: int = 0
    existing: int = 0
    by_annotator: dict[str, dict[str, int]] = field(default_factory=dict)
    tie_keys: list[str] = field(default_factory=list)
    skip_keys: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    shown_first_chosen: float | None = None
    shown_first_ci95: list[float] | None = None

    def to_json(self) -> str:
        """For a file."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"


def merge(
    pairs: Sequence[Pair],
    files: Iterable[tuple[str, Sequence[Annotation]]],
    existing: frozenset[tuple[str, str]] = frozenset(),
) -> tuple[list[Row], MergeReport]:
    """Preference rows in the order of the ranked file, and the account.

    `files` are names with the annotations of each in their order; `existing` are (key, annotator) of rows
    that need no second one.
    """
    known = {pair.key: pair for pair in pairs}
    report = MergeReport(pairs=len(pairs))
    last = _last_choices(known, files, report)
    order = {pair.key: number for number, pair in enumerate(pairs)}
    rows = []
    for (key, annotator), one in sorted(last.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        counts = Counter(report.by_annotator.get(annotator, {}))
        kind = {"tie": "ties", "skip": "skips"}.get(one.choice, "decided")
        report.by_annotator[annotator] = dict(counts + Counter({kind: 1}))
        if one.choice == "tie":
            report.tie_keys.append(key)
        elif one.choice == "skip":
            report.skip_keys.append(key)
        else:
            report.decided += 1
            if (key, annotator) in existing:
                report.present += 1
            else:
                rows.append(preference_row(known[key], one))
    report.ties, report.skips = len(report.tie_keys), len(report.skip_keys)
    report.unlabelled = len(pairs) - len({key for key, _ in last})
    report.empty_responses = sum(not row[name].strip() for row in rows for name in ("chosen", "rejected"))
    _position(last.values(), report)
    return rows, report


def _last_choices(
    known: Mapping[str, Pair], files: Iterable[tuple[str, Sequence[Annotation]]], report: MergeReport
) -> dict[tuple[str, str], Annotation]:
    """The choice that counts, by pair and annotator."""
    last: dict[tuple[str, str], Annotation] = {}
    for name, annotations in files:
        for one in annotations:
            report.lines += 1
            place = one.key, one.annotator
            if one.key not in known:
                report.outside.append(
                    f"{name}, line {one.line}: pair {one.key[:16]} is not in the ranked file"
                )
            elif one.choice != "undo":
                report.revised += place in last
                last[place] = one
            elif place in last:
                report.undone += 2  # the choice, and the line that takes it back
                del last[place]
            else:
                report.problems.append(f"{name}, line {one.line}: undo, but nothing is chosen for the pair")
    return last


def preference_row(pair: Pair, one: Annotation) -> Row:
    """A row of prompt, chosen and rejected, with the pool's other columns beside them."""
    assert one.choice in ("a", "b")
    chosen, rejected = (pair.a, pair.b) if one.choice == "a" else (pair.b, pair.a)
    row: Row = {
        "prompt": pair.prompt,
        "chosen": chosen.text,
        "rejected": rejected.text,
        "annotator": one.annotator,
        "key": pair.key,
        "rule": pair.rule,
        "finished": {"chosen": chosen.finished, "rejected": rejected.finished},
    }
    if one.margin is not None:
        row["margin"] = one.margin
    if one.first:
        row["shown_first"] = "chosen" if one.first == one.choice else "rejected"
    if chosen.gold is not None and rejected.gold is not None:
        row |= {"gold_chosen": chosen.gold, "gold_rejected": rejected.gold}
    for name, value in pair.row.items():
        row.setdefault(
            f"pool_{name}" if name in _OWN or (name == "subset" and _no_name(value)) else name, value
        )
    return row


def _no_name(value: Any) -> bool:
    """Whether a preference's `subset` cannot be this."""
    return isinstance(value, bool) or not isinstance(value, str | int)


def _position(choices: Iterable[Annotation], report: MergeReport) -> None:
    """How often the response that was shown first won, with a 95 % Wilson interval."""
    decided = [one for one in choices if one.choice in ("a", "b") and one.first]
    if decided:
        won = sum(one.choice == one.first for one in decided)
        interval = stats.binomtest(won, len(decided)).proportion_ci(method="wilson")
        report.shown_first_chosen = won / len(decided)
        report.shown_first_ci95 = [float(interval.low), float(interval.high)]


# ---- files ----------------------------------------------------------------------------------------------


def read_all(paths: Sequence[Path]) -> tuple[list[tuple[str, list[Annotation]]], list[str]]:
    """The annotations of several files, and what is wrong with their other lines."""
    files, problems = [], []
    for path in paths:
        annotations, wrong = read_annotations(path)
        files.append((str(path), annotations))
        problems += wrong
    return files, problems


def read_preferences(name: str, quarantine: Quarantine, field_name: str) -> list[tuple[Row, Preference]]:
    """Preference rows in any of the forms that training reads, each with the pair that it is."""
    reading = Reading(name, quarantine)
    settings = PreferenceSettings(train=name, empty_responses="keep")
    found = []
    for line, row in read_rows(name, reading, field=field_name):
        try:
            found.append((row, parse_pair(row, line, settings)))
        except BadRow as bad:
            reading.reject(line, bad, json.dumps(row, ensure_ascii=False))
    reading.require_good(len(found), field_name)
    return found


def describe(report: MergeReport, rows: int, out: Path, report_path: Path) -> str:
    """The account in words."""
    lines = [
        f"{rows} preferences in {out}"
        + (f", {report.existing} of them as before" if report.existing else ""),
        f"{report.decided} decided, {report.ties} ties and {report.skips} skips (no row), "
        f"{report.unlabelled} of {report.pairs} pairs not annotated",
    ]
    for count, what in (
        (report.undone, "lines are choices taken back, and what took them back"),
        (report.revised, "earlier choices were replaced by the same annotator's later ones"),
        (report.present, "decided pairs stand in --existing with the same annotator"),
        (
            report.empty_responses,
            'responses are empty: set preferences.empty_responses = "keep" to train on them',
        ),
        (len(report.outside), "lines name pairs that are not in the ranked file"),
        (len(report.problems), "lines could not be used"),
    ):
        if count:
            lines.append(f"{count} {what}")
    lines += [f"  {text}" for text in (report.problems + report.outside)[:5]]
    if report.shown_first_chosen is not None and report.shown_first_ci95 is not None:
        low, high = report.shown_first_ci95
        verdict = "" if low <= 0.5 <= high else ": the order of presentation sways the choices"
        lines.append(
            f"the response shown first won {report.shown_first_chosen:.0%} of the time "
            f"(95 % interval {low:.0%} to {high:.0%}){verdict}"
        )
    return "\n".join([*lines, f"all counts: {report_path}"])

"""Rows of single responses, each labelled good or bad: `prompt`, `completion`, `label`.

    read_rows → parse_label → duplicates and contradictions → split by prompt → LabelledData
                    └─────────────────┴→ Quarantine, with line and reason

Columns, files, the held-out split and what becomes of contradictions are set in `[preferences]`, as for
pairs.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cluster.chat import check_messages
from cluster.data_files import BadRow, Quarantine, Reading, read_rows
from cluster.preferences.forms import as_number, unread
from cluster.preferences.settings import DEFAULT_HELDOUT_FRACTION, PreferenceSettings
from cluster.preferences.split import heldout_prompts, part_of
from learner.preference_settings import KTOSettings
from rewards.preferences.records import Prompt, prompt_key, response_key

Sign = tuple[tuple[str, str], bool]
"""A response's identity, and a label of it."""


@dataclass(frozen=True, slots=True)
class LabelledResponse:
    """One response with its label; `line` is where its row stands, `finished` whether it was not cut off."""

    prompt: Prompt
    completion: str
    desirable: bool
    weight: float
    line: int
    finished: bool = True

    @property
    def prompt_key(self) -> str:
        """The prompt's identity: all rows of one prompt have the same."""
        return prompt_key(self.prompt)

    @property
    def key(self) -> tuple[str, str]:
        """The response's identity, whatever its label."""
        return self.prompt_key, response_key(self.completion)


@dataclass(frozen=True, slots=True)
class LabelledData:
    """Training and held-out responses; no prompt is in both."""

    train: list[LabelledResponse]
    heldout: list[LabelledResponse]


def has_labels(settings: PreferenceSettings, kto: KTOSettings, quarantine: Quarantine) -> bool:
    """Whether the training source has single responses: its first row with a label and without a pair.

    What is put aside on the way is put aside again, and counted, when the source is read.
    """
    rows = _rows(settings, "train", Reading(settings.train, quarantine))
    _, first = next(islice(rows, 1), (0, {}))
    quarantine.restart()
    single = kto.completion_column in first and kto.label_column in first
    return single and settings.chosen_column not in first


def load_labelled(settings: PreferenceSettings, kto: KTOSettings, quarantine: Quarantine) -> LabelledData:
    """Read training and held-out responses.

    Raises ValueError where a source cannot be read or has no good row, where no prompt can be held out, or
    where a setting speaks of pairs.
    """
    _refuse_pair_settings(settings)
    if settings.heldout:
        heldout = _read("heldout", settings, kto, quarantine, frozenset())
        train = _read("train", settings, kto, quarantine, frozenset(one.prompt_key for one in heldout))
    else:
        found = _read("train", settings, kto, quarantine, frozenset())
        keys = list(dict.fromkeys(one.prompt_key for one in found))
        fraction = settings.heldout_fraction or DEFAULT_HELDOUT_FRACTION
        aside = {keys[place] for place in heldout_prompts(keys, fraction, settings.split_seed)}
        train = [one for one in found if one.prompt_key not in aside]
        heldout = [one for one in found if one.prompt_key in aside]
    if settings.part != "all":
        train = [one for one in train if part_of(one.prompt_key, settings.split_seed) == settings.part]
    if not train:
        raise ValueError(
            f"preferences.part = {settings.part!r} is empty: all training prompts fall into the other half; "
            "add prompts, or change preferences.split_seed"
        )
    return LabelledData(train, heldout)


def parse_label(
    row: Mapping[str, Any], line: int, settings: PreferenceSettings, kto: KTOSettings
) -> LabelledResponse:
    """The response of a row; raises BadRow."""
    prompt = _present(row, settings.prompt_column)
    if isinstance(prompt, list):
        prompt = check_messages(prompt)
    elif not isinstance(prompt, str):
        raise BadRow("wrong type", f"{settings.prompt_column!r} is no text and no chat messages")
    elif not prompt.strip():
        raise BadRow("empty prompt", "only white space")
    completion = _present(row, kto.completion_column)
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        completion = completion[0].get("content")  # [{"role": "assistant", "content": …}]
    if not isinstance(completion, str):
        raise BadRow("wrong type", f"{kto.completion_column!r} is no text and no single message")
    if not completion.strip():
        raise BadRow("empty response", f"{kto.completion_column!r} has no text")
    label = _present(row, kto.label_column)
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise BadRow("wrong label", f"{kto.label_column!r} is {label!r}, not true, false, 1 or 0")
    weight, finished = _weight(row, settings), _finished(row, settings)
    return LabelledResponse(prompt, completion, bool(label), weight, line, finished)


def _finished(row: Mapping[str, Any], settings: PreferenceSettings) -> bool:
    column = settings.finished_column
    if not column:
        return True
    value = _present(row, column) if settings.required("finished_column") else row.get(column)
    if value is not None and not isinstance(value, bool):
        raise BadRow("wrong type", f"{column!r} is neither true nor false{unread('finished_column')}")
    return value is not False


def _weight(row: Mapping[str, Any], settings: PreferenceSettings) -> float:
    column = settings.weight_column
    if not column:
        return 1.0
    value = _present(row, column) if settings.required("weight_column") else row.get(column)
    if value is None:
        return 1.0
    weight = as_number(value, column, unread("weight_column"))
    if weight < 0:
        raise BadRow("negative weight", f"{column!r} is {weight:g}")
    return weight


def _present(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    if value is None:
        state = "null" if column in row else f"not among {', '.join(map(repr, row)) or 'no columns'}"
        raise BadRow("missing column", f"{column!r} is {state}")
    return value


def _rows(settings: PreferenceSettings, which: str, reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    train = which == "train"
    return read_rows(
        settings.train if train else settings.heldout,
        reading,
        field=f"preferences.{which}",
        split=settings.train_split if train else settings.heldout_split,
        subset=settings.subset,
        revision=settings.revision,
    )


def _read(
    which: str,
    settings: PreferenceSettings,
    kto: KTOSettings,
    quarantine: Quarantine,
    taken: frozenset[str],
) -> list[LabelledResponse]:
    """The good rows of a source; those whose prompt is in `taken` are put aside."""
    reading = Reading(settings.train if which == "train" else settings.heldout, quarantine)
    found: dict[Sign, LabelledResponse] = {}
    votes: Counter[Sign] = Counter()
    for line, row in _rows(settings, which, reading):
        try:
            one = parse_label(row, line, settings, kto)
            if one.prompt_key in taken:
                raise BadRow("in held-out set", "the same prompt is in preferences.heldout")
            sign = (one.key, one.desirable)
            votes[sign] += 1
            if sign in found:
                raise BadRow("duplicate", f"the same label stands in line {found[sign].line}")
            found[sign] = one
        except BadRow as bad:
            reading.reject(line, bad, json.dumps(row, ensure_ascii=False))
        if len(found) == settings.max_rows:
            break
    kept = []
    for sign, one in found.items():
        verdict = _contradicted(sign, found, votes, settings)
        if verdict is None:
            kept.append(one)
        else:
            reading.reject(one.line, verdict, json.dumps(one.completion, ensure_ascii=False))
    reading.require_good(len(kept), f"preferences.{which}")
    return kept


def _contradicted(
    sign: Sign,
    found: Mapping[Sign, LabelledResponse],
    votes: Mapping[Sign, int],
    settings: PreferenceSettings,
) -> BadRow | None:
    """Why a label goes for another one of the same response; None if it stays. ValueError where none may."""
    key, label = sign
    one, other = found[sign], found.get((key, not label))
    if other is None or settings.contradictions == "keep":
        return None
    if settings.contradictions == "refuse":
        raise ValueError(
            'preferences.contradictions = "refuse", but a response is labelled both good and bad (lines '
            f"{one.line} and {other.line}): correct them, or choose another policy"
        )
    against = other.weight * votes[key, not label]
    if settings.contradictions == "majority" and one.weight * votes[sign] > against:
        return None
    return BadRow("contradiction", f"line {other.line} has the same response with the other label")


def _refuse_pair_settings(settings: PreferenceSettings) -> None:
    """ValueError for a setting that would otherwise have no effect."""
    for name in ("system_column", "reply_mark", "keep_columns", "chosen_score_column", "choice_column"):
        if getattr(settings, name):
            raise ValueError(
                f"preferences.{name} = {getattr(settings, name)!r} has no effect on rows of single labelled "
                "responses; leave it out"
            )
    if settings.dialogues != "text":
        raise ValueError(
            f"preferences.dialogues = {settings.dialogues!r} has no effect on rows of single labelled "
            "responses; leave it out"
        )

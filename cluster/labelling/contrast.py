"""`label contrast`: a policy's samples after fine-tuning are preferred to those before it (Init-SFT).

A reward model that is trained on such pairs learns log π_tuned − log π_initial up to a constant for each
prompt: Sun & van der Schaar, arXiv 2405.15624. The k-th response of one pool stands against the k-th of the
other, which are independent draws; each pair has an annotator of its own, so that a pair that was drawn twice
counts twice.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.data_files import BadRow, Quarantine, Reading, read_rows
from cluster.labelling.records import parse_candidates
from rewards.preferences.records import Prompt, prompt_key


@dataclass(frozen=True, slots=True)
class Draws:
    """Responses to a prompt as they were drawn, equal ones too; `finished`: each ended by itself."""

    prompt: Prompt
    responses: list[str]
    finished: list[bool]


def contrast(tuned: str, initial: str, quarantine: Quarantine) -> list[dict[str, Any]]:
    """Preference rows from two pools; ValueError where they have no prompt in common."""
    after, before = read_draws(tuned, "TUNED", quarantine), read_draws(initial, "INITIAL", quarantine)
    rows = [row for key, draws in after.items() if key in before for row in _pairs(draws, before[key])]
    if not rows:
        raise ValueError(
            f"TUNED = {tuned!r} and INITIAL = {initial!r} have no prompt in common: sample both policies on "
            "the same prompts"
        )
    return rows


def read_draws(name: str, field: str, quarantine: Quarantine) -> dict[str, Draws]:
    """A pool's draws by the prompt's key; lines of one prompt are joined. ValueError if none is good."""
    reading = Reading(name, quarantine)
    found: dict[str, Draws] = {}
    for line, row in read_rows(name, reading, field=field):
        try:
            prompt = parse_candidates(line, row).prompt
        except BadRow as bad:
            reading.reject(line, bad, json.dumps(row, ensure_ascii=False))
            continue
        responses = list(row["responses"])
        draws = found.setdefault(prompt_key(prompt), Draws(prompt, [], []))
        draws.responses.extend(responses)
        draws.finished.extend(row.get("finished") or [True] * len(responses))
    reading.require_good(len(found), field)
    return found


def _pairs(after: Draws, before: Draws) -> Iterator[dict[str, Any]]:
    draws = zip(after.responses, after.finished, before.responses, before.finished, strict=False)
    for number, (chosen, chosen_finished, rejected, rejected_finished) in enumerate(draws):
        yield {
            "prompt": after.prompt,
            "chosen": chosen,
            "rejected": rejected,
            "annotator": f"draw {number}",
            "finished": {"chosen": chosen_finished, "rejected": rejected_finished},
        }

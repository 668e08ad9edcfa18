"""Preference rows that a policy's samples after fine-tuning win over those before it (Init-SFT).

    headrace label generate prompts.jsonl --policy SFT     --samples 8 --out tuned.jsonl
    headrace label generate prompts.jsonl --policy INITIAL --samples 8 --out initial.jsonl
    python benchmarks/init_sft_pairs.py tuned.jsonl initial.jsonl --out pairs.jsonl

A reward model that is trained on them (objective = "reward_model", preferences.contradictions = "keep")
learns log π_SFT − log π_initial up to a constant for each prompt: Sun & van der Schaar, arXiv 2405.15624.
Compare it with that closed form, [[reward]] kind = "log_ratio".

The k-th response of one pool stands against the k-th of the other, which are independent draws. Responses
that were cut off are left out, as a row cannot say that they were: within a prompt that moves the log-ratio
by a constant. Each pair has an annotator of its own, so that a pair that was drawn twice counts twice.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def pair_up(tuned: list[Row], initial: list[Row]) -> Iterator[Row]:
    """A row for each pair of finished responses to the same prompt; pools have a line a prompt."""
    before = {_key(row): row for row in initial}
    for row in tuned:
        if _key(row) not in before:
            continue
        draws = zip(_finished(row), _finished(before[_key(row)]), strict=False)  # one pool may have more
        for number, (chosen, rejected) in enumerate(draws):
            yield {
                "prompt": row["prompt"],
                "chosen": chosen,
                "rejected": rejected,
                "annotator": f"draw {number}",
            }


def _key(row: Row) -> str:
    return json.dumps(row["prompt"], sort_keys=True)


def _finished(row: Row) -> list[str]:
    ended = row.get("finished") or [True] * len(row["responses"])
    return [text for text, end in zip(row["responses"], ended, strict=True) if end]


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> int:
    """Read two pools, write the pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tuned", type=Path, help="pool of the fine-tuned policy")
    parser.add_argument("initial", type=Path, help="pool of the policy that the fine-tuning started from")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = list(pair_up(_read(options.tuned), _read(options.initial)))
    if not rows:
        print("the pools have no prompt with finished responses in common", file=sys.stderr)
        return 2
    options.out.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    print(f"{len(rows)} pairs of {len({_key(row) for row in rows})} prompts in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Seconds and peak memory of reading 100,000 preference pairs. Writes preference_reading.json.

    python benchmarks/preference_reading.py [--pairs 100000]

Each form is written to a file and read in a process of its own. `memory_mib` is the highest resident memory
less what the process had before it began to read; `text_mib` is the size of the file.

strings   prompt, chosen, rejected, of about 1.3 kB together
messages  whole conversations in chosen and rejected, without a prompt column
dialogues `Human: … Assistant: …` texts without a prompt column
labels    5 responses a prompt, all 10 pairs of them, 2 annotators, a tenth of the labels at random
prompts   two prompts only, each with all pairs of 317 responses: 10 million triads
"""

import argparse
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from machine import describe

HERE = Path(__file__).resolve().parent
_WORDS = [f"w{number:03d}" for number in range(1000)]


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=words))


def strings(rng: random.Random) -> Iterator[dict[str, Any]]:
    """A prompt and two replies."""
    while True:
        yield {"prompt": _text(rng, 60), "chosen": _text(rng, 100), "rejected": _text(rng, 100)}


def messages(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Two conversations that begin with the same message."""
    for row in strings(rng):
        asked = {"role": "user", "content": row["prompt"]}
        yield {side: [asked, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}


def dialogues(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Two dialogues that begin alike."""
    for row in strings(rng):
        asked = f"\n\nHuman: {row['prompt']}\n\nAssistant:"
        yield {side: f"{asked} {row[side]}" for side in ("chosen", "rejected")}


def labels(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Few prompts compared thoroughly, with contradictions."""
    while True:
        prompt, responses = _text(rng, 60), [_text(rng, 100) for _ in range(5)]
        for (i, j), who in itertools.product(itertools.combinations(range(5), 2), ("ada", "bob")):
            won, lost = (i, j) if rng.random() < 0.95 else (j, i)
            yield {
                "prompt": prompt,
                "chosen": responses[won],
                "rejected": responses[lost],
                "annotator": who,
            }


def prompts(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Two prompts, each with very many responses."""
    while True:
        prompt, responses = _text(rng, 60), [_text(rng, 100) for _ in range(317)]
        for i, j in itertools.combinations(range(317), 2):
            won, lost = (i, j) if rng.random() < 0.8 else (j, i)
            yield {"prompt": prompt, "chosen": responses[won], "rejected": responses[lost]}


FORMS: dict[str, Callable[[random.Random], Iterator[dict[str, Any]]]] = {
    "strings": strings,
    "messages": messages,
    "dialogues": dialogues,
    "labels": labels,
    "prompts": prompts,
}


def read(file: Path) -> dict[str, Any]:
    """Read the file in this process; what it took."""
    from cluster.data_files import Quarantine
    from cluster.preferences.reading import load_preferences
    from cluster.preferences.settings import PreferenceSettings

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, busy = time.perf_counter(), time.process_time()
    data = load_preferences(PreferenceSettings(train=str(file)), Quarantine(file.with_suffix(".quarantine")))
    return {
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - busy,
        "memory_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "text_mib": file.stat().st_size / 2**20,
        "train": len(data.train),
        "heldout": len(data.heldout),
        "put_aside": dict(data.report.sources[0].put_aside),
        "triads": data.report.findings.triads,
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # what the processes of its own do
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.read)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for form, make in FORMS.items():
            file = Path(folder) / f"{form}.jsonl"
            with file.open("w", encoding="utf-8") as out:
                for row in itertools.islice(make(random.Random(0)), options.pairs):
                    out.write(json.dumps(row) + "\n")
            command = [sys.executable, str(Path(__file__).resolve()), "--read", str(file)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"form": form, "pairs": options.pairs, **json.loads(done.stdout)})
            file.unlink()
            print(
                f"{form:9s} {rows[-1]['seconds']:6.1f} s, {rows[-1]['memory_mib']:6.0f} MiB for "
                f"{rows[-1]['text_mib']:.0f} MiB of text, {rows[-1]['triads']} triads",
                flush=True,
            )
    result = {"command": "python benchmarks/preference_reading.py", "machine": describe(), "rows": rows}
    (HERE / "preference_reading.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

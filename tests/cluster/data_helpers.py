"""Data files to read, and reading them, for the tests of data."""

import json
from pathlib import Path
from typing import Any

from cluster.data import DataSettings, PromptData, Quarantine, load_prompts

ALPHABET = "abcdefghijklmnopqrstuvwxyz 0123456789:,{}[]\"<>|/'A\n"
GOOD = [{"prompt": f"say {word}", "answer": word} for word in ("one", "two", "three", "four", "five")]
# Renders <|user|>hi<|assistant|>
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write(path: Path, rows: list[dict[str, Any] | bytes]) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def load(tmp_path: Path, tokenizer: Any, train: str | Path, **options: Any) -> tuple[PromptData, Quarantine]:
    settings = {key: options.pop(key) for key in list(options) if key in DataSettings.model_fields}
    quarantine = Quarantine(tmp_path / "run" / "quarantine.jsonl")
    arguments = {"max_length": 40, "max_new_tokens": 10, "max_heldout": 256, "seed": 0} | options
    data = load_prompts(
        DataSettings(train=str(train), **settings), tokenizer, quarantine=quarantine, **arguments
    )
    return data, quarantine


def put_aside(quarantine: Quarantine) -> list[tuple[int, str]]:
    rows = [json.loads(line) for line in quarantine.path.read_text().splitlines()]
    return [(row["line"], row["reason"]) for row in rows]

"""The shipped examples run, the pretrained one on a folder made here."""

import json
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.scratch import build_tokenizer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
SHORT: dict[str, Any] = {  # of an example with a generated task
    "run.steps": 2,
    "run.batch_size": 32,
    "run.evaluate_prompts": 16,
    "warmup.steps": 5,
    "task.train_size": 256,
    "task.heldout_size": 16,
    "task.demonstrations": 256,
    "monitor.wandb": "disabled",
}
ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def run_example(name: str, run_dir: Path, **settings: Any) -> dict[str, Any]:
    """Run an example from the project's folder, as its first lines say, with smaller numbers."""
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "cluster.cli", "train", f"examples/{name}.toml"),
            *("--run-dir", str(run_dir)),
            *overrides,
        ],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def save_chat_model(folder: Path) -> None:
    """A tiny Qwen2 with tied embeddings and a chat template, as a hub model would lie in a folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer(string.printable, 256)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def test_programs_in_short(tmp_path: Path) -> None:
    summary = run_example(
        "programs",
        tmp_path / "run",
        **SHORT,
    )
    assert summary["status"] == "completed"
    assert summary["groups_dropped"] == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"reward/tests", "reward/tests/all_passed", "reward/tests/wrote_own_answers"} <= row.keys()


def test_pretrained_on_a_local_folder(tmp_path: Path) -> None:
    save_chat_model(tmp_path / "model")
    summary = run_example(
        "pretrained",
        tmp_path / "run",
        **{
            "model.path": tmp_path / "model",
            "model.max_length": 160,
            "run.steps": 2,
            "run.batch_size": 16,
            "run.evaluate_prompts": 8,
            "monitor.wandb": "disabled",
            "rollout.max_new_tokens": 16,
        },
    )
    assert summary["status"] == "completed"
    assert summary["steps"] == 2
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].startswith("<user>What is ")
    assert sample["prompt"].endswith("<assistant>")
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {
        "reward/correct",
        "reward/brief",
        "reward/brief/characters",
        "reward/missing_eos_penalty",
    } <= row.keys()


def test_countdown_in_short(tmp_path: Path) -> None:
    summary = run_example(
        "countdown",
        tmp_path / "run",
        **SHORT,
    )
    assert summary["status"] == "completed"
    assert summary["groups_dropped"] == 0

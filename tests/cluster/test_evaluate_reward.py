"""`headrace evaluate-reward`: figures of a saved reward model on pairs that came after it. No Ray."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_reward_model import save_reward_model

from cluster.cli import EXIT_OK, EXIT_USER, main
from rewards.models.card import EVALUATION
from rewards.models.loading import load_reward_model

LETTERS = "abcdefghij"
HELDOUT = {"value": 0.99, "low": 0.98, "high": 1.0, "count": 400, "prompts": 200}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_reward_model(tmp_path / "model", prompts=("a=", "b="))
    (folder / EVALUATION).write_text(json.dumps({"heldout": {"accuracy": HELDOUT}}))
    return folder


def pairs(path: Path, prompts: list[str]) -> list[dict[str, Any]]:
    """Two pairs of each prompt, responses drawn; gold likes the letter `a`."""
    rng = np.random.default_rng(0)
    rows = []
    for prompt in prompts:
        for _ in range(2):
            one, other = ("".join(rng.choice(list(LETTERS), rng.integers(2, 9))) for _ in range(2))
            gold = {"gold_chosen": float(one.count("a")), "gold_rejected": float(other.count("a"))}
            rows.append({"prompt": prompt, "chosen": one, "rejected": other, **gold})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_pairs_on_new_prompts_are_measured_and_the_drop_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = [f"{one}{other}=" for one in LETTERS for other in LETTERS[:4]]
    rows = pairs(tmp_path / "after.jsonl", [*new, "a="])  # the last one was learned from
    pairs(tmp_path / "hot.jsonl", new[:10])
    out = tmp_path / "found.json"
    columns = ["evaluation.chosen_gold_column=gold_chosen", "evaluation.rejected_gold_column=gold_rejected"]
    command = ["evaluate-reward", str(model), *(str(tmp_path / f"{name}.jsonl") for name in ("after", "hot"))]
    command += ["--out", str(out), *(word for column in columns for word in ("--set", column))]
    assert main(command) == EXIT_OK
    told = json.loads(out.read_text())
    after, hot = told["files"].values()
    kept = [row for row in rows if row["prompt"] != "a="]
    assert (after["pairs"], after["prompts"], hot["pairs"]) == (len(kept), 40, 20)
    scorer = load_reward_model(model)
    chosen, rejected = (
        scorer.score([(row["prompt"], row[side], True) for row in kept]).value
        for side in ("chosen", "rejected")
    )
    assert after["accuracy"]["value"] == pytest.approx(float(np.mean(chosen > rejected)))
    assert after["accuracy_drop"]["value"] == pytest.approx(0.99 - after["accuracy"]["value"])
    assert after["drop_detected"]  # a random model is near one half, and .99 was promised
    assert after["gold"]["spearman_within"] is not None
    assert told["version"] == scorer.card.version
    quarantined = (tmp_path / "found.quarantine.jsonl").read_text()
    assert quarantined.count("the same prompt is trained on") == 2
    shown = capsys.readouterr()
    assert "detected" in shown.out
    assert "warning: 2 rows were put aside (2 × in training set): see " in shown.err


@pytest.mark.parametrize(
    ("prompts", "says"),
    [(["a=", "b="], "all of its prompts are trained on"), (["c=", "d="], "is named twice")],
)
def test_what_cannot_be_measured_is_refused(
    prompts: list[str],
    says: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs(tmp_path / "pairs.jsonl", prompts)
    out = tmp_path / "found.json"
    command = [
        "evaluate-reward",
        str(model),
        *[str(tmp_path / "pairs.jsonl")] * (2 if "twice" in says else 1),
        "--out",
        str(out),
    ]
    assert main(command) == EXIT_USER
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_gold_of_one_side_alone_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs(tmp_path / "pairs.jsonl", ["c=", "d="])
    out = tmp_path / "found.json"
    command = ["evaluate-reward", str(model), str(tmp_path / "pairs.jsonl"), "--out", str(out)]
    assert main([*command, "--set", "evaluation.chosen_gold_column=gold_chosen"]) == EXIT_USER
    assert "of both responses, or of neither" in capsys.readouterr().err
    assert not out.exists()


def test_nothing_is_written_over(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs(tmp_path / "pairs.jsonl", ["c=", "d="])
    out = tmp_path / "found.json"
    out.write_text("mine")
    command = ["evaluate-reward", str(model), str(tmp_path / "pairs.jsonl"), "--out", str(out)]
    assert main(command) == EXIT_USER
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"

"""`headrace label contrast`: one policy's draws preferred to another's, in their order."""

import json
from pathlib import Path

import pytest

from cluster.cli import EXIT_OK, EXIT_USER, main
from cluster.data_files import Quarantine
from cluster.preferences.reading import load_preferences
from cluster.preferences.settings import PreferenceSettings


def test_pools_of_two_policies_become_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = [
        {"prompt": "a>", "responses": ["x", "y", "x"], "finished": [True, False, True]},
        {"prompt": "only here>", "responses": ["x"]},
    ]
    initial = [{"prompt": "a>", "responses": ["u", "x", "x"], "finished": [True, True, True]}]
    for name, rows in (("tuned", tuned), ("initial", initial)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    pools = [str(tmp_path / f"{name}.jsonl") for name in ("tuned", "initial")]
    out = tmp_path / "pairs.jsonl"
    assert main(["label", "contrast", *pools, "--out", str(out)]) == EXIT_OK
    # Draws stand against each other in their order and are told apart, also where they are equal.
    sides = [("x", "u", True), ("y", "x", False), ("x", "x", True)]
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {
            "prompt": "a>",
            "chosen": chosen,
            "rejected": rejected,
            "annotator": f"draw {number}",
            "finished": {"chosen": finished, "rejected": True},
        }
        for number, (chosen, rejected, finished) in enumerate(sides)
    ]
    settings = PreferenceSettings(train=str(out), contradictions="keep", heldout_fraction=0.5)
    with pytest.raises(ValueError, match="only one distinct prompt"):  # it is read, and too little
        load_preferences(settings, Quarantine(tmp_path / "quarantine.jsonl"))
    assert main(["label", "contrast", *pools, "--out", str(out)]) == EXIT_USER  # nothing is written over
    lonely = str(tmp_path / "lonely.jsonl")
    Path(lonely).write_text(json.dumps({"prompt": "z>", "responses": ["x"]}) + "\n")
    assert main(["label", "contrast", pools[0], lonely, "--out", str(tmp_path / "new.jsonl")]) == EXIT_USER
    assert "have no prompt in common" in capsys.readouterr().err

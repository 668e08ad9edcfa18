"""The report of a reward model on evaluations of which little can be said."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.reward_job.report import write_reward_report
from rewards.models.card import EVALUATION

NOTHING = {"value": None, "low": None, "high": None}
ALONE = {"value": 0.5, "low": None, "high": None}  # one prompt: a value without an interval
WHOLE = {"value": 0.75, "low": 0.5, "high": 0.875}


def report(folder: Path, accuracy: dict[str, Any], pearson: dict[str, Any] | None, **summary: Any) -> str:
    """The page for a held-out set with these figures."""
    (folder / "reward_model").mkdir()
    heldout = {
        "pairs": 2,
        "accuracy": accuracy,
        "subsets": {"one": accuracy},
        "length": {"pearson": pearson},
        "points": [[3, 0.1], [4, 0.2]],
    }
    (folder / "reward_model" / EVALUATION).write_text(json.dumps({"heldout": heldout}))
    (folder / "summary.json").write_text(
        json.dumps(
            {"objective": "reward_model", "status": "completed", "reward_model_version": "abc", **summary}
        )
    )
    (folder / "config.toml").write_text('objective = "reward_model"\n')
    (folder / "metrics.jsonl").write_text("")
    return write_reward_report(folder).read_text()


@pytest.mark.parametrize(
    ("accuracy", "pearson", "said"),
    [
        (WHOLE, NOTHING, "0.750 (0.500 to 0.875)"),
        (ALONE, ALONE, "0.500 (interval unknown)"),
        (NOTHING, None, "–"),
    ],
)
def test_what_cannot_be_told_is_left_out(
    accuracy: dict[str, Any], pearson: dict[str, Any] | None, said: str, tmp_path: Path
) -> None:
    assert said in report(tmp_path, accuracy, pearson)


def test_the_page_says_what_the_preferences_are_like(tmp_path: Path) -> None:
    told = {"sentences": ["3 labels & 2 pairs."], "doubts": ["no more than coin flips"], "warnings": ["long"]}
    other = {"sentences": ["Put aside: 2 × duplicate (lines 4, 7)."], "doubts": [], "warnings": []}
    page = report(tmp_path, WHOLE, NOTHING, preferences=told, preferences_elsewhere={"far": other})
    assert '<p class="error">In doubt: no more than coin flips</p><p class="error">long</p>' in page
    assert "<li>3 labels &amp; 2 pairs.</li>" in page
    assert "<h3>far</h3><ul><li>Put aside: 2 × duplicate (lines 4, 7).</li></ul>" in page

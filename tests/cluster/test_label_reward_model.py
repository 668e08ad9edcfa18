"""Ranking and simulated labels with real reward models on disk, against what transformers says of them."""

from pathlib import Path

import pytest
from labelling_helpers import label, read_rows, write_rows
from tiny_reward_model import plain_score, save_reward_model

from rewards.models.card import read_card
from rewards.preferences.acquisition import RULES

ROWS = [
    {"prompt": "abc:", "responses": ["a", "bb", "ccc"], "finished": [True, True, False]},
    {"prompt": "def:", "responses": ["a", "bb", "j" * 40, "É"]},
]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("single") / "reward_model", std=3.0, mean=1.0)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("ensemble") / "reward_model", members=3)


def test_pairs_are_ordered_by_the_differences_that_transformers_gives(tmp_path: Path, single: Path) -> None:
    pool, ranked = write_rows(tmp_path / "pool.jsonl", ROWS), tmp_path / "ranked.jsonl"
    assert label("rank", pool, "--rule", "max-difference", "--reward-model", single, "--out", ranked) == 0
    found = read_rows(ranked)
    # One prompt has 3 pairs, the other 1: the model reads neither 40 letters nor É.
    assert sorted((row["prompt"], *sorted((row["a"], row["b"]))) for row in found) == [
        ("abc:", "a", "bb"),
        ("abc:", "a", "ccc"),
        ("abc:", "bb", "ccc"),
        ("def:", "a", "bb"),
    ]
    for row in found:
        scores = [plain_score(single, row["prompt"], row[name], row[name] != "ccc") for name in ("a", "b")]
        assert row["score"] == pytest.approx(abs(scores[0] - scores[1]), abs=1e-5)
        assert row["provenance"]["predicted"]["difference"] == pytest.approx(scores[0] - scores[1], abs=1e-5)
        assert row["provenance"]["reward_model"] == read_card(single).version
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_works_with_a_real_ensemble(tmp_path: Path, ensemble: Path, rule: str) -> None:
    pool, ranked = write_rows(tmp_path / "pool.jsonl", ROWS), tmp_path / "ranked.jsonl"
    labelled = write_rows(tmp_path / "old.jsonl", [{"prompt": "abc:", "chosen": "bb", "rejected": "a"}])
    arguments = ("--reward-model", ensemble, "--labelled", labelled, "--count", 2, "--out", ranked)
    assert label("rank", pool, "--rule", rule, *arguments) == 0
    found = read_rows(ranked)
    assert len(found) == 2
    assert ("abc:", {"a", "bb"}) not in [(row["prompt"], {row["a"], row["b"]}) for row in found]
    if rule != "random":
        assert found[0]["score"] >= found[1]["score"]


def test_a_rule_for_ensembles_refuses_a_single_model(tmp_path: Path, single: Path) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", ROWS)
    with pytest.raises(ValueError, match="compares the members of an ensemble and there is 1"):
        label("rank", pool, "--rule", "bald", "--reward-model", single, "--out", tmp_path / "ranked.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["pool.jsonl"]


def test_a_reward_model_can_be_the_gold_of_a_simulated_annotator(tmp_path: Path, single: Path) -> None:
    pool, ranked, notes = (
        write_rows(tmp_path / "pool.jsonl", ROWS[:1]),
        tmp_path / "ranked.jsonl",
        tmp_path / "notes.jsonl",
    )
    label("rank", pool, "--out", ranked)
    label("simulate", ranked, "--reward-model", single, "--temperature", 0, "--out", notes)
    for row, note in zip(read_rows(ranked), read_rows(notes), strict=True):
        one, other = (plain_score(single, "abc:", row[name], row[name] != "ccc") for name in ("a", "b"))
        assert note["choice"] == ("a" if one > other else "b")

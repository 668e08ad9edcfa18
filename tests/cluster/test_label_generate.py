"""Candidates sampled from a policy's folder by a real rollout actor on a private Ray."""

import json
from pathlib import Path
from typing import Any

import pytest
from labelling_helpers import label, read_rows, write_rows

from actors.records import Completion, SampledGroup
from cluster.data_files import Quarantine
from cluster.labelling.generating import (
    generation_config,
    open_policy,
    policy_folder,
    pool_row,
    read_prompts,
)
from cluster.scratch import build_scratch_model
from learner.settings import ScratchSettings


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ScratchSettings(hidden_size=64, layers=1, heads=2, max_length=24)
    return build_scratch_model(settings, "abcdefgh>", tmp_path_factory.mktemp("policy") / "model", seed=0)


ROWS: list[dict[str, Any]] = [
    {"prompt": "abc>", "answer": "cba"},
    {"prompt": "abc>"},
    {"prompt": "gh>", "gold": 1},
    {"prompt": "a" * 30},
    {"prompt": "gh>", "answer": "hg"},
]


def test_prompts_that_cannot_be_used_are_put_aside(tmp_path: Path, policy: Path) -> None:
    source = write_rows(tmp_path / "prompts.jsonl", ROWS)
    config = generation_config(
        policy, str(source), 3, ["rollout.max_new_tokens=8", "rollout.temperature=0.5"]
    )
    assert (config.rollout.group_size, config.rollout.temperature) == (3, 0.5)
    found = open_policy(config)
    assert found.version.startswith("model@")
    assert found.max_length == 24
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    prompts = read_prompts(config, found, quarantine)
    assert [(prompt.id, prompt.source) for prompt in prompts] == [("line 1", "abc>"), ("line 5", "gh>")]
    reasons = [(row["line"], row["reason"]) for row in read_rows(quarantine.path)]
    assert reasons == [(2, "repeated prompt"), (3, "reserved column"), (4, "over-long")]
    completions = (
        Completion((5, 2), (-1.0, -1.0), (0, 0), "a", "stop"),
        Completion((5,), (-1.0,), (0,), "b", "length"),
    )
    row = pool_row(SampledGroup(0, prompts[0], completions, "rollout-0", 1.0), "prompt", "model@1")
    assert row == {
        "answer": "cba",
        "prompt": "abc>",
        "responses": ["a", "b"],
        "finished": [True, False],
        "policy": "model@1",
    }


def test_a_policy_is_a_model_a_checkpoint_or_the_newest_of_a_run(tmp_path: Path, policy: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_000003"
    step.mkdir(parents=True)
    (step / "policy").symlink_to(policy)
    (step.parent / "latest.json").write_text(json.dumps({"step": 3, "folder": step.name}))
    assert policy_folder(policy) == policy
    assert policy_folder(step) == policy_folder(tmp_path / "run") == step / "policy"
    with pytest.raises(ValueError, match=r"has no \*\.safetensors"):
        policy_folder(tmp_path)


def test_what_leaves_no_room_is_refused(tmp_path: Path, policy: Path) -> None:
    source = write_rows(tmp_path / "prompts.jsonl", ROWS)
    config = generation_config(policy, str(source), 2, ["rollout.max_new_tokens=24"])
    with pytest.raises(ValueError, match="leaves no room for a prompt in the policy's 24 tokens"):
        read_prompts(config, open_policy(config), Quarantine(tmp_path / "quarantine.jsonl"))
    with pytest.raises(ValueError, match=r"model\.max_length = 100 is beyond the model's 24 tokens"):
        open_policy(generation_config(policy, str(source), 2, ["model.max_length=100"]))


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_rollout_actor_fills_a_pool_that_can_be_ranked(tmp_path: Path, policy: Path) -> None:
    source = write_rows(tmp_path / "prompts.jsonl", ROWS)
    pool, ranked = tmp_path / "pool.jsonl", tmp_path / "ranked.jsonl"
    arguments = (
        "--policy",
        policy,
        "--samples",
        6,
        "--max-new-tokens",
        8,
        "--set",
        "rollout.kv_cache_gib=0.1",
    )
    assert label("generate", source, *arguments, "--out", pool) == 0
    rows = read_rows(pool)
    assert [row["prompt"] for row in rows] == ["abc>", "gh>"]
    for row in rows:
        assert len(row["responses"]) == len(row["finished"]) == 6
        # The alphabet's characters are its tokens, so a response that was cut off has all 8 of them, less any
        # special token that was sampled; a finished one has fewer.
        for text, finished in zip(row["responses"], row["finished"], strict=True):
            assert set(text) <= set("abcdefgh>")
            assert len(text) < 8 if finished else len(text) <= 8
        assert len(set(row["responses"])) > 1
        assert row["policy"].startswith("model@")
    assert rows[0]["answer"] == "cba"
    assert len(read_rows(tmp_path / "pool.quarantine.jsonl")) == 3
    assert label("rank", pool, "--count", 5, "--out", ranked) == 0
    assert len(read_rows(ranked)) == 5

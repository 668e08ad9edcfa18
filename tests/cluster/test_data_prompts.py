"""Prompts out of rows: templates and tokens, ids, and their order."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from data_helpers import ALPHABET, GOOD, TEMPLATE, load, put_aside, write
from pydantic import ValidationError

from actors.records import Prompt
from cluster.data import (
    DataSettings,
    PromptCursor,
)
from cluster.scratch import build_tokenizer
from rewards.build import check_row
from rewards.settings import RewardSettings


def one(tmp_path: Path, tokenizer: Any, row: dict[str, Any], **settings: Any) -> Prompt:
    file = write(tmp_path / "one.jsonl", [row])
    heldout = write(tmp_path / "other.jsonl", [{settings.get("prompt_column", "prompt"): "other"}])
    data, _ = load(tmp_path, tokenizer, file, heldout=str(heldout), max_length=200, **settings)
    return data.train.prompts[0]


def test_a_text_without_a_template_gets_the_tokenizer_s_own_bos(tmp_path: Path, tokenizer: Any) -> None:
    prompt = one(tmp_path, tokenizer, {"prompt": "abc", "level": 3})
    letters = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    assert prompt.token_ids == (tokenizer.bos_token_id, *letters)
    assert (prompt.id, prompt.text, dict(prompt.row)) == ("train:1", "abc", {"prompt": "abc", "level": 3})


USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "case",
    [
        ("hi", {}, "<|user|>hi<|assistant|>", "hi"),
        ("hi", {"apply_chat_template": "always"}, "<|user|>hi<|assistant|>", "hi"),
        ("hi", {"apply_chat_template": "never"}, None, "hi"),
        ("hi", {"system_prompt": "be 1"}, "<|system|>be 1<|user|>hi<|assistant|>", "hi"),
        (USER, {}, "<|user|>hi<|assistant|>", "<|user|>hi<|assistant|>"),
        (
            [{"role": "system", "content": "own"}, *USER],
            {"system_prompt": "be 1"},
            "<|system|>own<|user|>hi<|assistant|>",
            "<|system|>own<|user|>hi<|assistant|>",
        ),
    ],
)
def test_chat_templates(
    case: tuple[Any, dict[str, Any], str | None, str], tmp_path: Path, chat_tokenizer: Any
) -> None:
    value, settings, rendered, text = case
    prompt = one(tmp_path, chat_tokenizer, {"question": value}, prompt_column="question", **settings)
    assert (prompt.text, prompt.source) == (text, value)
    if rendered is None:  # the text as it is, with the tokenizer's BOS
        assert prompt.token_ids == tuple(chat_tokenizer("hi")["input_ids"])
    else:  # the template writes its own special tokens: no second BOS
        assert chat_tokenizer.decode(prompt.token_ids) == rendered


def test_chat_messages_are_put_aside_where_templates_are_off(tmp_path: Path, chat_tokenizer: Any) -> None:
    file = write(tmp_path / "d.jsonl", [{"prompt": USER}, *GOOD])
    _, quarantine = load(tmp_path, chat_tokenizer, file, apply_chat_template="never")
    assert put_aside(quarantine) == [(1, "no chat template")]


def test_a_row_that_the_template_refuses_is_put_aside(tmp_path: Path) -> None:
    strict = build_tokenizer(ALPHABET, 256)
    refusal = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no system here') }}{% endif %}"
    strict.chat_template = refusal + TEMPLATE
    row = {"prompt": [{"role": "system", "content": "s"}, *USER]}
    _, quarantine = load(tmp_path, strict, write(tmp_path / "d.jsonl", [*GOOD, row]))
    assert (6, "chat template refused") in put_aside(quarantine)


def test_always_needs_a_template(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "d.jsonl", list(GOOD))
    with pytest.raises(ValueError, match=r'apply_chat_template = "always".*no chat template'):
        load(tmp_path, tokenizer, file, apply_chat_template="always")


def test_the_limit_is_the_smaller_of_what_is_set_and_what_is_left(tmp_path: Path, tokenizer: Any) -> None:
    # <bos> and n letters are n + 1 tokens; 40 - 10 = 30 are left, or 5 are set.
    rows = [{"prompt": "a" * n} for n in (3, 4, 5, 29, 30)]
    file = write(tmp_path / "d.jsonl", list(rows))
    _, quarantine = load(tmp_path, tokenizer, file)
    assert put_aside(quarantine) == [(5, "over-long")]
    _, quarantine = load(tmp_path, tokenizer, file, max_prompt_tokens=5)
    assert put_aside(quarantine) == [(3, "over-long"), (4, "over-long"), (5, "over-long")]


def test_no_room_for_a_prompt_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "d.jsonl", list(GOOD))
    with pytest.raises(ValueError, match=r"max_new_tokens = 40 leaves no room .*max_length = 40"):
        load(tmp_path, tokenizer, file, max_new_tokens=40)


def test_what_rewards_need_is_required_and_what_nothing_reads_is_not(tmp_path: Path, tokenizer: Any) -> None:
    answers: list[Any] = [["1", 2], None, {"a": 1}, True, " ", "forty", 42]
    rows = [*({"prompt": "p", "answer": 1} for _ in range(2)), {"prompt": "x"}]
    rows += [{"prompt": f"q {i}", "answer": answer} for i, answer in enumerate(answers)]
    file = write(tmp_path / "d.jsonl", list(rows))
    # Row 3 has no answer, rows 4 to 10 have those above: null is missing, only the last one is a number.
    missing, bad = [(3, "missing column"), (5, "missing column")], [4, 6, 7, 8, 9]
    rewards = [RewardSettings(kind="numeric")]
    _, quarantine = load(
        tmp_path, tokenizer, file, required_columns=["answer"], check_row=partial(check_row, rewards)
    )
    assert put_aside(quarantine) == sorted([*missing, *((line, "bad answer") for line in bad)])
    assert "holds no number: 'forty'" in quarantine.path.read_text()
    _, quarantine = load(tmp_path, tokenizer, file)
    assert put_aside(quarantine) == []


def test_an_unknown_token_that_is_also_the_end_token_refuses_no_text(tmp_path: Path) -> None:
    shared = build_tokenizer(ALPHABET, 256)
    rows = [*GOOD, {"prompt": "日"}]
    _, quarantine = load(tmp_path, shared, write(tmp_path / "d.jsonl", list(rows)))
    assert put_aside(quarantine) == [(6, "unknown token")]
    shared.eos_token = "<unk>"  # as GPT-2's tokenizer has it
    _, quarantine = load(tmp_path, shared, tmp_path / "d.jsonl")
    assert put_aside(quarantine) == []


def test_ids_come_from_their_column_and_must_differ(tmp_path: Path, tokenizer: Any) -> None:
    names: list[Any] = ["a", "b", "a", None, 7]
    rows = [{"prompt": f"p {n}", "key": name} for n, name in enumerate(names)]
    data, quarantine = load(tmp_path, tokenizer, write(tmp_path / "d.jsonl", list(rows)), id_column="key")
    assert {p.id for p in (*data.train.prompts, *data.heldout.prompts)} == {"train:a", "train:b", "train:7"}
    assert put_aside(quarantine) == [(3, "duplicate id"), (4, "missing column")]


@pytest.mark.parametrize(
    "settings",
    [
        {"heldout": "h.jsonl", "heldout_fraction": 0.1},
        {"apply_chat_template": "never", "system_prompt": "be brief"},
        {"heldout_fraction": 0.0},
        {"max_rows": 0},
        {"promt_column": "x"},
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataSettings(train="d.jsonl", **settings)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=f"train:{n}", token_ids=(n,), text=str(n)) for n in range(count)]


def test_each_epoch_has_every_prompt_once_in_an_order_of_its_own() -> None:
    cursor = PromptCursor(prompts(50), seed=3)
    epochs = [[cursor.next().id for _ in range(50)] for _ in range(3)]
    assert all(sorted(epoch) == sorted(p.id for p in prompts(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert cursor.epoch == 3.0
    same = PromptCursor(prompts(50), seed=3)
    assert [same.next().id for _ in range(150)] == [i for epoch in epochs for i in epoch]
    other = PromptCursor(prompts(50), seed=4)
    assert [other.next().id for _ in range(50)] != epochs[0]


def test_without_shuffling_the_order_is_the_file_s() -> None:
    cursor = PromptCursor(prompts(3), seed=0, shuffle=False)
    assert [cursor.next().text for _ in range(7)] == list("0120120")


@pytest.mark.parametrize("taken", [0, 1, 9, 10, 11, 25])
def test_a_restored_cursor_goes_on_as_if_nothing_had_happened(taken: int) -> None:
    cursor = PromptCursor(prompts(10), seed=1)
    for _ in range(taken):
        cursor.next()
    state = json.loads(json.dumps(cursor.state()))
    restored = PromptCursor(prompts(10), seed=1)
    restored.restore(state)
    assert [restored.next().id for _ in range(25)] == [cursor.next().id for _ in range(25)]


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        (PromptCursor(prompts(10), seed=2), "seed"),
        (PromptCursor(prompts(11), seed=1), "size"),
        (PromptCursor(prompts(10), seed=1, shuffle=False), "shuffle"),
        (PromptCursor([*prompts(9), Prompt("train:9", (77,), "x")], seed=1), "sha256"),
        (PromptCursor([*prompts(9), Prompt("train:9", (9,), "9", {"answer": 2})], seed=1), "sha256"),
    ],
)
def test_a_state_of_other_data_is_refused(changed: PromptCursor, field: str) -> None:
    state = PromptCursor(prompts(10), seed=1).state()
    with pytest.raises(ValueError, match=f"has {field} = .*resume with the data"):
        changed.restore(state)


def test_prompts_are_found_by_id() -> None:
    cursor = PromptCursor(prompts(5), seed=0)
    assert cursor.prompt_by_id("train:4").token_ids == (4,)
    with pytest.raises(ValueError, match="'train:5'"):
        cursor.prompt_by_id("train:5")
    with pytest.raises(ValueError, match="'train:0' appears twice"):
        PromptCursor([*prompts(2), prompts(1)[0]], seed=0)

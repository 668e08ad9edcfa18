"""Prompts and demonstrations: every kind of bad row, the held-out split, and the order of prompts."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from pydantic import ValidationError

from actors.records import Prompt
from cluster import data_files
from cluster.data import (
    DataSettings,
    PromptCursor,
    PromptData,
    Quarantine,
    load_demonstrations,
    load_prompts,
    split_heldout,
)
from cluster.scratch import build_tokenizer
from rewards.build import check_row
from rewards.settings import RewardSettings

ALPHABET = "abcdefghijklmnopqrstuvwxyz 0123456789:,{}[]\"<>|/'A\n"
GOOD = [{"prompt": f"say {word}", "answer": word} for word in ("one", "two", "three", "four", "five")]
# Renders <|user|>hi<|assistant|>
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a character: ids 0–3 are special."""
    return build_tokenizer(ALPHABET, 256)


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    made = build_tokenizer(ALPHABET, 256)
    made.chat_template = TEMPLATE
    return made


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


BAD_ROWS: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"prompt": "x"', "not JSON"),
    "key twice": (b'{"prompt": "x", "prompt": "y"}', "not JSON"),
    "nested too deep": (b'{"prompt": ' + b"[" * 100_000, "not JSON"),
    "array": (b'["prompt"]', "not an object"),
    "number": (b"3", "not an object"),
    "bad bytes": (b'{"prompt": "\xff\xfe"}', "bad UTF-8"),
    "half a surrogate pair": (b'{"prompt": "\\ud800"}', "bad UTF-8"),
    "no prompt": (b'{"question": "x"}', "missing column"),
    "null prompt": (b'{"prompt": null}', "missing column"),
    "prompt a number": (b'{"prompt": 7}', "wrong type"),
    "prompt an object": (b'{"prompt": {"content": "x"}}', "wrong type"),
    "message a text": (b'{"prompt": ["hi"]}', "wrong type"),
    "message without role": (b'{"prompt": [{"content": "hi"}]}', "wrong type"),
    "message with parts": (b'{"prompt": [{"role": "user", "content": [1]}]}', "wrong type"),
    "assistant last": (b'{"prompt": [{"role": "assistant", "content": "hi"}]}', "wrong type"),
    "empty prompt": (b'{"prompt": ""}', "empty prompt"),
    "white space": (b'{"prompt": " \\n\\t"}', "empty prompt"),
    "no messages": (b'{"prompt": []}', "empty prompt"),
    "message without text": (b'{"prompt": [{"role": "user", "content": " "}]}', "empty prompt"),
    "chat without template": (b'{"prompt": [{"role": "user", "content": "hi"}]}', "no chat template"),
    # 30 tokens fit (40 - 10); <bos> and 30 letters are 31.
    "over-long": (b'{"prompt": "' + b"a" * 30 + b'"}', "over-long"),
    "unknown character": ('{"prompt": "日"}'.encode(), "unknown token"),
    "NaN": (b'{"prompt": "x", "answer": NaN}', "non-finite number"),
    "infinity": (b'{"prompt": "x", "weight": -Infinity}', "non-finite number"),
    "1e999": (b'{"prompt": "x", "weight": 1e999}', "non-finite number"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_put_aside_with_its_line_and_reason(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    bad, reason = BAD_ROWS[kind]
    file = write(tmp_path / "d.jsonl", [GOOD[0], GOOD[1], bad, GOOD[2]])
    data, quarantine = load(tmp_path, tokenizer, file)
    assert put_aside(quarantine) == [(3, reason)]
    assert data.train.counts.quarantined == {reason: 1} == dict(quarantine.counts)
    prompts = {prompt.text for prompt in (*data.train.prompts, *data.heldout.prompts)}
    assert prompts == {"say one", "say two", "say three"}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_file_with_only_bad_rows_is_an_error_that_says_why(
    kind: str, tmp_path: Path, tokenizer: Any
) -> None:
    bad, reason = BAD_ROWS[kind]
    file = write(tmp_path / "d.jsonl", [bad, bad, b'{"prompt": 1.5}'])
    with pytest.raises(ValueError, match="no good row") as error:
        load(tmp_path, tokenizer, file)
    commonest = f"{3 if reason == 'wrong type' else 2} × {reason}"
    assert "d.jsonl" in str(error.value)
    assert f"({commonest}" in str(error.value)
    assert "quarantine.jsonl" in str(error.value)


def test_every_line_is_accounted_for(tmp_path: Path, tokenizer: Any) -> None:
    rows = [GOOD[0], b"", b"nonsense", *GOOD[1:4], b"  ", b'{"a": 1}', GOOD[4]]
    data, _ = load(tmp_path, tokenizer, write(tmp_path / "d.jsonl", rows), max_rows=3)
    counts = data.train.counts
    # Lines 1, 4, 5 are good; 2 blank; 3 not JSON; reading stops at the third good row, before line 6.
    assert (counts.lines, counts.good, counts.blank) == (5, 3, 1)
    assert counts.quarantined == {"not JSON": 1}
    assert len(data.train.prompts) + len(data.heldout.prompts) == counts.good


def test_a_line_that_is_too_long_is_skipped_and_the_next_one_read(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "MAX_LINE_BYTES", 64)
    at_limit = b'{"prompt": "' + b"a" * 20 + b'"' + b" " * 30 + b"}"
    assert len(at_limit) == 64
    rows = [GOOD[0], at_limit, at_limit[:-1] + b" }", b'{"prompt": "' + b"x" * 1000 + b'"}', GOOD[1]]
    data, quarantine = load(tmp_path, tokenizer, write(tmp_path / "d.jsonl", rows))
    assert put_aside(quarantine) == [(3, "line too long"), (4, "line too long")]
    assert data.train.counts.lines == 5


def test_windows_line_ends_and_a_byte_order_mark_do_no_harm(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "d.jsonl"
    body = b"\r\n".join(json.dumps(row).encode() for row in GOOD)
    file.write_bytes(b"\xef\xbb\xbf" + body)  # and no end of line after the last row
    data, quarantine = load(tmp_path, tokenizer, file)
    assert data.train.counts.good == 5
    assert put_aside(quarantine) == []


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "no such file"),
        ("dir/none", None, "Hugging Face hub|no such file"),
        ("d.csv", b"prompt\nx\n", "JSON Lines .* or Parquet"),
        ("d.json", b'[\n{"prompt": "x"}\n]\n', "one JSON array"),
        ("d.jsonl", b"", "has no rows"),
        ("d.parquet", b"PAR1 this is no parquet file PAR1", "cannot be read after row 0"),
    ],
)
def test_a_source_that_cannot_be_read_is_an_error_with_its_name(
    name: str, content: bytes | None, says: str, tmp_path: Path, tokenizer: Any
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        load(tmp_path, tokenizer, tmp_path / name)
    assert name in str(error.value)
    assert "data.train" in str(error.value)


def test_parquet_rows_are_read_and_bad_ones_put_aside(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "d.parquet"
    rows = [
        {"prompt": "one", "score": 1.0, "blob": None},
        {"prompt": "two", "score": float("nan"), "blob": None},
        {"prompt": None, "score": 1.0, "blob": None},
        {"prompt": "four", "score": 2.0, "blob": b"\x00"},
        {"prompt": "five", "score": 3.0, "blob": None},
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(file))
    data, quarantine = load(tmp_path, tokenizer, file)
    expected = [(2, "non-finite number"), (3, "missing column"), (4, "wrong type")]
    assert sorted(put_aside(quarantine)) == expected
    texts = {prompt.text: prompt.row["score"] for prompt in (*data.train.prompts, *data.heldout.prompts)}
    assert texts == {"one": 1.0, "five": 3.0}


def test_a_parquet_file_that_breaks_off_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "d.parquet"
    datasets.Dataset.from_list(GOOD).to_parquet(str(file))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"d\.parquet.* cannot be read .*write the file again"):
        load(tmp_path, tokenizer, file)


@pytest.mark.parametrize("layout", ["jsonl", "parquet", "hub snapshot", "save_to_disk", "one split on disk"])
def test_a_local_folder_is_read_by_split(layout: str, tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    train, test = datasets.Dataset.from_list(GOOD[:4]), datasets.Dataset.from_list(GOOD[4:])
    if layout == "jsonl":
        write(folder / "train.jsonl", list(GOOD[:4]))
        write(folder / "test.jsonl", list(GOOD[4:]))
    elif layout == "parquet":
        train.to_parquet(str(folder / "train.parquet"))
        test.to_parquet(str(folder / "test.parquet"))
    elif layout == "hub snapshot":
        (folder / "data").mkdir()
        for shard in range(2):
            train.shard(2, shard).to_parquet(str(folder / "data" / f"train-0000{shard}-of-00002.parquet"))
        test.to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))
    elif layout == "save_to_disk":
        datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(folder))
    else:
        train.save_to_disk(str(folder))
    if layout == "one split on disk":
        data, _ = load(tmp_path, tokenizer, folder)
        assert data.train.counts.good == 4
        return
    data, _ = load(tmp_path, tokenizer, folder, heldout=str(folder))
    assert {p.text for p in data.train.prompts} == {row["prompt"] for row in GOOD[:4]}
    assert [p.text for p in data.heldout.prompts] == ["say five"]


def test_a_folder_without_the_split_says_what_was_expected(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "test.jsonl", list(GOOD))
    with pytest.raises(ValueError, match=r"no split 'train'.*train\.jsonl"):
        load(tmp_path, tokenizer, tmp_path)


@pytest.mark.timeout(60)
def test_a_hub_name_that_the_hub_does_not_give_is_a_quick_error(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "HUB_TIMEOUT_S", 3.0)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE=1.*local cache") as error:
        load(tmp_path, tokenizer, "headrace-tests/no-such-dataset")
    assert "data.train = 'headrace-tests/no-such-dataset'" in str(error.value)


# --- templates and tokens ------------------------------------------------------------------------------


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


# --- the held-out split --------------------------------------------------------------------------------


def test_the_split_is_by_prompt_and_depends_on_the_seed_only(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"p {n // 2}", "answer": str(n)} for n in range(40)]  # 20 prompts, each twice
    data, _ = load(tmp_path, tokenizer, write(tmp_path / "d.jsonl", list(rows)), heldout_fraction=0.25)
    train = {p.text for p in data.train.prompts}
    heldout = {p.text for p in data.heldout.prompts}
    assert len(heldout) == 5  # a quarter of 20 prompts, with both rows of each
    assert len(data.heldout.prompts) == 10
    assert not train & heldout
    assert len(data.train.prompts) + len(data.heldout.prompts) == 40

    backwards = write(tmp_path / "b.jsonl", list(reversed(rows)))
    again, _ = load(tmp_path, tokenizer, backwards, heldout_fraction=0.25)
    assert {p.text for p in again.heldout.prompts} == heldout
    other, _ = load(tmp_path, tokenizer, backwards, heldout_fraction=0.25, seed=1)
    assert {p.text for p in other.heldout.prompts} != heldout


def test_the_held_out_part_is_never_empty_nor_everything(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "d.jsonl", [GOOD[0], GOOD[1]])
    for fraction in (0.01, 0.99):
        data, _ = load(tmp_path, tokenizer, file, heldout_fraction=fraction)
        assert (len(data.train.prompts), len(data.heldout.prompts)) == (1, 1)
    with pytest.raises(ValueError, match="only one distinct prompt"):
        load(tmp_path, tokenizer, write(tmp_path / "e.jsonl", [GOOD[0], GOOD[0]]))


def test_max_heldout_bounds_the_split(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"p {n}"} for n in range(30)]
    source, _ = load(tmp_path, tokenizer, write(tmp_path / "d.jsonl", list(rows)), max_heldout=4,
                     heldout_fraction=0.5)  # fmt: skip
    assert (len(source.heldout.prompts), len(source.train.prompts)) == (4, 26)
    assert split_heldout(source.train, 0.5, 100, 0).heldout.prompts


def test_training_rows_that_are_held_out_too_are_put_aside(tmp_path: Path, tokenizer: Any) -> None:
    train = write(tmp_path / "d.jsonl", list(GOOD))
    heldout = write(tmp_path / "h.jsonl", [GOOD[3], {"prompt": "new"}])
    data, quarantine = load(tmp_path, tokenizer, train, heldout=str(heldout))
    assert put_aside(quarantine) == [(4, "in held-out set")]
    assert "say four" not in {p.text for p in data.train.prompts}
    assert [p.id for p in data.heldout.prompts] == ["heldout:1", "heldout:2"]


# --- demonstrations ------------------------------------------------------------------------------------


def test_demonstrations_end_with_the_end_token(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[dict[str, Any] | bytes] = [
        {"prompt": "ab", "completion": "ba"},
        {"prompt": "ab", "completion": [{"role": "assistant", "content": "c"}]},
        {"prompt": "ab", "completion": " "},
        {"prompt": "ab"},
        {"prompt": "ab", "completion": 4},
        {"prompt": "abc", "completion": "abcd"},  # 1 + 3 + 4 + 1 tokens: more than 8
        {"prompt": "abc", "completion": "abc"},  # 1 + 3 + 3 + 1 = 8
        b"\xff",
    ]
    quarantine = Quarantine(tmp_path / "q.jsonl")
    file = write(tmp_path / "d.jsonl", rows)
    pairs = load_demonstrations(file, tokenizer, 8, quarantine=quarantine)
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert pairs == [
        ((bos, a, b), (b, a, eos)),
        ((bos, a, b), (c, eos)),
        ((bos, a, b, c), (a, b, c, eos)),
    ]
    reasons = ["empty completion", "missing column", "wrong type", "over-long", "bad UTF-8"]
    assert put_aside(quarantine) == list(zip([3, 4, 5, 6, 8], reasons, strict=True))


def test_demonstrations_of_held_out_prompts_are_put_aside(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": prompt, "completion": "c"} for prompt in ("ab", "a", "ab")]
    quarantine = Quarantine(tmp_path / "q.jsonl")
    taken = frozenset({tuple(tokenizer("ab")["input_ids"])})
    file = write(tmp_path / "d.jsonl", list(rows))
    pairs = load_demonstrations(file, tokenizer, 8, quarantine=quarantine, taken=taken)
    assert [prompt for prompt, _ in pairs] == [tuple(tokenizer("a")["input_ids"])]
    assert put_aside(quarantine) == [(1, "in held-out set"), (3, "in held-out set")]


def test_demonstrations_without_a_good_row_are_an_error(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "d.jsonl", [{"prompt": "a"}])
    with pytest.raises(ValueError, match=r"warmup\.data = .*d\.jsonl.* \(1 × missing column\)"):
        load_demonstrations(file, tokenizer, 8, quarantine=Quarantine(tmp_path / "q.jsonl"))


# --- the order of prompts ------------------------------------------------------------------------------


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


def test_the_hub_is_not_asked_when_it_is_switched_off(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(data_files, "_require_hub", never)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        load(tmp_path, tokenizer, "headrace-tests/no-such-dataset")

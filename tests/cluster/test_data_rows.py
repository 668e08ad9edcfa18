"""Rows of prompts: every kind of bad one, files, folders and hub names."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_helpers import GOOD, load, put_aside, write

from cluster import data_files

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


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_element_by_element(
    indent: int | None, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [GOOD[0], {"prompt": 7}, 3, GOOD[1], {"prompt": "x", "weight": float("nan")}, GOOD[2]]
    file = tmp_path / "d.json"
    file.write_bytes(b"\xef\xbb\xbf " + json.dumps(rows, indent=indent).encode() + b"\n")
    data, quarantine = load(tmp_path, tokenizer, file)
    assert put_aside(quarantine) == [(2, "wrong type"), (3, "not an object"), (5, "non-finite number")]
    prompts = {prompt.text for prompt in (*data.train.prompts, *data.heldout.prompts)}
    assert prompts == {"say one", "say two", "say three"}
    monkeypatch.setattr(data_files, "MAX_ARRAY_BYTES", 20)
    with pytest.raises(ValueError, match=r"one JSON array of 0\.0 GiB, and arrays are held in memory whole"):
        load(tmp_path, tokenizer, file)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "no such file"),
        ("dir/none", None, "Hugging Face hub|no such file"),
        ("d.csv", b"prompt\nx\n", "JSON Lines .* or Arrow"),
        ("d.json", b'[\n{"prompt": "x"}\n', "JSON array that cannot be read after row 1.*jq -c"),
        ("d.json", b'[{"prompt": "x"}, {"prompt"', "JSON array that cannot be read after row 1"),
        ("d.json", b'[{"prompt": "x"}]\n[{"prompt": "y"}]', "after row 1: '\\[.*' follows the array"),
        ("d.json", b'[{"prompt": "\xff"}]', "JSON array that cannot be read after row 0: 'utf-8'"),
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

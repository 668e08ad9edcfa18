"""Label files: what is read, refused, put aside and appended."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from labelling_helpers import make_pair, read_rows, write_pairs, write_rows

from cluster.labelling.files import (
    AnnotationLog,
    quarantine_beside,
    read_annotations,
    read_pairs,
    read_pool,
    require_new,
    write_lines,
)
from cluster.labelling.records import Annotation

CHAT = [{"role": "user", "content": "hi"}]


def read(path: Path) -> Any:
    with quarantine_beside(path.with_name("out.jsonl")) as quarantine:
        pool = read_pool(str(path), quarantine)
        rows = read_rows(quarantine.path)
    return pool, [(row["line"], row["reason"]) for row in rows]


def test_a_pool_joins_lines_of_one_prompt_and_counts_what_it_leaves_out(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "pool.jsonl",
        [
            {"prompt": "one", "responses": ["x", "y", "x "], "answer": 7, "policy": "old"},
            {"prompt": CHAT, "responses": ["x", ""], "finished": [True, False], "gold": [1, 0.5]},
            {"prompt": "one", "responses": ["z", "y"], "policy": "new"},
            {"prompt": "one", "responses": "x"},
            {"prompt": "one", "responses": ["x", 3]},
            {"prompt": " ", "responses": ["x", "y"]},
            {"responses": ["x", "y"]},
            {"prompt": "two", "responses": ["x", "y"], "gold": [1]},
            {"prompt": "two", "responses": ["x", "y"], "finished": [1, 0]},
            {"prompt": [{"role": "assistant", "content": "hi"}], "responses": ["x", "y"]},
        ],
    )
    pool, aside = read(path)
    one, chat = pool.entries
    # `x ` is `x` again but for white space, and the third line's `y` is the first one's.
    assert [(side.text, side.line, side.response, side.policy) for side in one.sides] == [
        ("x", 1, 0, "old"),
        ("y", 1, 1, "old"),
        ("z", 3, 0, "new"),
    ]
    assert (one.row, pool.repeated) == ({"answer": 7}, 2)
    assert [(side.text, side.finished, side.gold) for side in chat.sides] == [
        ("x", True, 1.0),
        ("", False, 0.5),
    ]
    assert aside == [
        (4, "missing column"),
        (5, "wrong type"),
        (6, "empty prompt"),
        (7, "missing column"),
        (8, "wrong type"),
        (9, "wrong type"),
        (10, "wrong type"),
    ]
    assert pool.quarantined == 7
    assert (tmp_path / "out.quarantine.jsonl").stat().st_mode & 0o777 == 0o600


def test_no_quarantine_is_left_where_nothing_is_in_it(tmp_path: Path) -> None:
    read(write_rows(tmp_path / "pool.jsonl", [{"prompt": "one", "responses": ["x", "y"]}]))
    assert [path.name for path in tmp_path.iterdir()] == ["pool.jsonl"]


def test_a_ranked_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    pairs = [
        make_pair("p", "x", "y", a={"gold": 1.0, "policy": "old"}, b={"gold": 2.0, "finished": False}),
        make_pair(CHAT, "x", "y", row={"answer": 7}),
    ]
    path = write_pairs(tmp_path / "ranked.jsonl", pairs)
    assert read_pairs(path) == pairs
    assert list(read_rows(path)[0]) == [
        "rank",
        "key",
        "prompt",
        "a",
        "b",
        "rule",
        "score",
        "provenance",
        "gold",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": "edited"}, "line 2: changed pair: prompt or responses are not those that its key names"),
        ({"prompt": None}, "line 2: missing column"),
        ({"b": 3}, "line 2: missing column: 'b' is no text"),
        ({"score": "high"}, "line 2: wrong type"),
    ],
)
def test_a_ranked_file_that_was_edited_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write_pairs(tmp_path / "ranked.jsonl", [make_pair("p", "x", "y"), make_pair("q", "x", "y")])
    rows = read_rows(path)
    write_rows(path, [rows[0], rows[1] | change])
    with pytest.raises(ValueError, match=message):
        read_pairs(path)


def test_a_pair_twice_a_broken_line_and_an_absent_file_are_refused(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "ranked.jsonl", [make_pair("p", "x", "y"), make_pair("p", "y", "x")])
    with pytest.raises(ValueError, match="line 2: the pair stands in an earlier line"):
        read_pairs(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_pairs(path)
    with pytest.raises(ValueError, match=r"cannot be read \(No such file or directory\)"):
        read_pairs(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="exists already"):
        require_new(path)


def test_a_torn_last_line_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "annotations.jsonl"
    with AnnotationLog(path) as log:
        log.append([Annotation("k1", "a", "ann", "b", seconds=1.5, time="now")])
    path.write_bytes(path.read_bytes() + b'{"key": "k2", "cho')  # a crash in the middle of a line
    with AnnotationLog(path) as log:
        log.append([Annotation("k3", "tie", "ann")])
    good, problems = read_annotations(path)
    assert good == [
        Annotation("k1", "a", "ann", "b", seconds=1.5, time="now", line=1),
        Annotation("k3", "tie", "ann", line=3),
    ]
    assert len(problems) == 1
    assert "line 2: not JSON" in problems[0]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "row",
    [
        {"key": "k"},
        {"choice": "a"},
        {"key": "k", "choice": "c"},
        {"key": "k", "choice": "a", "annotator": 3},
        {"key": "k", "choice": "a", "first": "x"},
        {"key": "k", "choice": "a", "margin": -1},
        {"key": "k", "choice": "a", "margin": True},
        [],
    ],
)
def test_what_is_no_annotation_is_told_with_its_line(tmp_path: Path, row: Any) -> None:
    path = write_rows(tmp_path / "annotations.jsonl", [{"key": "k", "choice": "a"}, row])
    good, problems = read_annotations(path)
    assert good == [Annotation("k", "a", line=1)]
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}, line 2: ")


def test_a_full_disk_loses_no_earlier_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "annotations.jsonl"
    with AnnotationLog(path) as log:
        log.append([Annotation("k1", "a", "ann")])
        before = path.read_bytes()
        real = os.write

        def half(descriptor: int, data: bytes) -> int:
            if len(data) < 20:
                raise OSError(28, "No space left on device")
            return real(descriptor, data[: len(data) - 10])

        monkeypatch.setattr(os, "write", half)
        with pytest.raises(ValueError, match=r"No space left on device.*all earlier labels are kept"):
            log.append([Annotation("k2", "b", "ann")])
        monkeypatch.undo()
        assert path.read_bytes() == before
        log.append([Annotation("k2", "b", "ann")])
    assert [one.key for one in read_annotations(path)[0]] == ["k1", "k2"]


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_lines(path, [{"good": 1}, {"bad": float("nan")}])
    assert not path.exists()
    assert write_lines(path, [{"text": "ż"}]) == 1
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "ż"}
    assert path.stat().st_mode & 0o777 == 0o600

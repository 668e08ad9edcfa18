"""The annotation mode in a pseudo-terminal: keys, undo, interruptions, hostile and very long responses."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from labelling_helpers import ENTRY, environment, make_pair, person, read_rows, write_pairs, write_rows

from cluster.labelling.records import Pair
from cluster.labelling.session import shown_first


@pytest.fixture
def pairs() -> list[Pair]:
    return [make_pair(f"question {n}", f"left answer {n}", f"right answer {n}") for n in range(1, 5)]


@pytest.fixture
def ranked(tmp_path: Path, pairs: list[Pair]) -> Path:
    return write_pairs(tmp_path / "ranked.jsonl", pairs)


def first_of(pair: Pair, annotator: str = "ann") -> str:
    return shown_first(pair, annotator, 0)


def other(name: str) -> str:
    return {"a": "b", "b": "a"}[name]


def choices(path: Path) -> list[tuple[str, str]]:
    return [(row["key"], row["choice"]) for row in read_rows(path)]


def test_keys_label_undo_and_resume_in_a_real_terminal(
    tmp_path: Path, ranked: Path, pairs: list[Pair]
) -> None:
    out = tmp_path / "annotations.jsonl"
    command = ("annotate", ranked, "--annotator", "ann", "--out", out)
    with person(*command) as ann:
        shown = ann.sees("pair 1 of 4 · ann")
        first = first_of(pairs[0])
        words = {"a": "left answer 1", "b": "right answer 1"}
        # A stands above B, and A is the response that the recorded coin says.
        assert shown.index(words[first]) < shown.index(words[other(first)])
        ann.types("a")
        ann.sees("question 2")
        ann.types("b")
        ann.sees("question 3")
        # An arrow key ends with B, an Alt key with a, a pasted text has both: none of them is a choice.
        ann.types(b"\x1b[B\x1ba\x1b[200~abts\x1b[201~zxy")
        ann.types("t")
        ann.sees("question 4")
        ann.types("u")
        ann.sees("question 3")
        ann.types("s")
        ann.sees("question 4")
        ann.types("q")
        status, _ = ann.leaves()
        assert status == 0
        assert ann.restored()
        assert b"3 of 4 pairs: 2 decided, 0 ties, 1 skipped; 1 left" in ann.output
    keys = [pair.key for pair in pairs]
    expected = [
        (keys[0], first_of(pairs[0])),
        (keys[1], other(first_of(pairs[1]))),
        (keys[2], "tie"),
        (keys[2], "undo"),
        (keys[2], "skip"),
    ]
    assert choices(out) == expected
    assert all(row["first"] == first_of(pair) for row, pair in zip(read_rows(out), pairs, strict=False))
    assert out.stat().st_mode & 0o777 == 0o600

    with person(*command) as ann:  # goes on where it stopped; undo reaches back into the last session
        ann.sees("question 4")
        ann.types("u")
        ann.sees("question 3")
        ann.types("a")
        ann.sees("question 4")
        ann.types("b")
        ann.sees("All pairs are done")
        ann.types("abts")  # nothing is left to judge
        ann.types("q")
        assert ann.leaves()[0] == 0
    assert choices(out) == [
        *expected,
        (keys[2], "undo"),
        (keys[2], first_of(pairs[2])),
        (keys[3], other(first_of(pairs[3]))),
    ]


@pytest.mark.parametrize("how", ["ctrl-c", "sigint", "sigterm", "sighup"])
def test_nothing_is_lost_when_it_is_interrupted(
    tmp_path: Path, ranked: Path, pairs: list[Pair], how: str
) -> None:
    out = tmp_path / "annotations.jsonl"
    with person("annotate", ranked, "--annotator", "ann", "--out", out) as ann:
        ann.sees("question 1")
        if how == "ctrl-c":
            ann.types(b"at\x03bbb")  # all at once: what was pressed before Ctrl-C counts, nothing after it
        else:
            ann.types("at")
            ann.sees("question 3")
            ann.send({"sigint": signal.SIGINT, "sigterm": signal.SIGTERM, "sighup": signal.SIGHUP}[how])
        status, said = ann.leaves()
        assert (status, said) == (1, "headrace: interrupted\n")
        assert ann.restored()
        assert b"2 of 4 pairs: 1 decided, 1 ties, 0 skipped; 2 left" in ann.output
    assert choices(out) == [(pairs[0].key, first_of(pairs[0])), (pairs[1].key, "tie")]


def test_a_killed_process_has_every_choice_on_the_disk(
    tmp_path: Path, ranked: Path, pairs: list[Pair]
) -> None:
    out = tmp_path / "annotations.jsonl"
    with person("annotate", ranked, "--annotator", "ann", "--out", out) as ann:
        ann.sees("question 1")
        ann.types("s")
        ann.sees("question 2")
        ann.send(signal.SIGKILL)
        assert ann.leaves()[0] == -signal.SIGKILL
    assert choices(out) == [(pairs[0].key, "skip")]


def test_control_characters_of_a_model_do_not_reach_the_terminal(tmp_path: Path) -> None:
    hostile = (
        "\x1b[2J\x1b[31mred\x1b]0;title\x07\x1b]52;c;aGk=\x07 bell\x07 back\x08\x08 carriage\rover "
        "csi\x9b1A nul\x00 del\x7f \u202etxet desrever\u202c zero\u200bwidth\u2066 line\u2028sep tab\tend"
    )
    pair = make_pair("a prompt with \x1b[5n and\x07", hostile, "plain")
    ranked = write_pairs(tmp_path / "ranked.jsonl", [pair])
    with person("annotate", ranked, "--annotator", "ann", "--out", tmp_path / "out.jsonl") as ann:
        shown = ann.sees("pair 1 of 1")
        ann.sees("q: quit")
        for name in (
            "<U+001B>[2J",
            "<U+001B>[31mred",
            "<U+0007>",
            "<U+009B>1A",
            "<U+0000>",
            "<U+007F>",
            "<U+202E>",
        ):
            assert name in shown.replace("\n", "")
        ann.types("v")
        ann.sees("lines 1 to")
        ann.types("q")
        ann.leaves()
        # All that the command ever wrote: the only sequences are its own, and no other control character.
        own = (
            b"\x1b[?1049h",
            b"\x1b[?25l",
            b"\x1b[?2004h",
            b"\x1b[?2026h",
            b"\x1b[H\x1b[2J",
            b"\x1b[1m",
            b"\x1b[0m",
        )
        rest = ann.output
        for sequence in (*own, b"\x1b[?2026l", b"\x1b[?2004l", b"\x1b[?25h", b"\x1b[?1049l"):
            rest = rest.replace(sequence, b"")
        text = rest.decode()
        assert not [char for char in text if ord(char) < 32 and char not in "\r\n"]
        assert not set(text) & set("\x7f\x9b\u202e\u202c\u200b\u2066\u2028")


def test_long_responses_are_cut_counted_and_read_in_full_with_a_key(tmp_path: Path) -> None:
    # 500 lines each. In 24 rows: 1 heading, "Prompt", its line, 2 heads, 2 for the keys leave 17 for A and B.
    pair = make_pair("short prompt", "\n".join(f"one {n}" for n in range(500)), "\n".join(["two"] * 500))
    ranked = write_pairs(tmp_path / "ranked.jsonl", [pair])
    out = tmp_path / "out.jsonl"
    letter = "A" if first_of(pair) == "a" else "B"
    with person("annotate", ranked, "--annotator", "ann", "--out", out) as ann:
        shown = ann.sees("q: quit")
        assert len(shown.split("\n")) == 24
        # 8 rows for A and 9 for B; the last of each tells how many lines are missing: 500 − 7 and 500 − 8.
        assert "… 493 more lines (v: read all)" in shown
        assert "… 492 more lines (v: read all)" in shown
        assert "one 499" not in shown
        ann.types("v")
        # Everything: 1 + 1 + 1 for the prompt, 1 + 500 + 1 for A, 1 + 500 for B; 21 rows at a time.
        ann.sees("lines 1 to 21 of 1006")
        ann.types(" ")
        ann.sees("lines 22 to 42 of 1006")
        ann.types("\x1b[A")
        ann.sees("lines 21 to 41 of 1006")
        ann.types("G")
        shown = ann.sees("lines 986 to 1006 of 1006")
        assert ("one 499" in shown) == (letter == "B")
        ann.types("\x1b")  # Escape goes back to the overview
        ann.sees("── Prompt ──\nshort prompt")
        ann.types("v")
        ann.sees("lines 1 to 21")
        ann.types(letter.lower())  # a choice counts in the reading view too
        ann.sees("All pairs are done")
        ann.types("q")
        ann.leaves()
    assert choices(out) == [(pair.key, "a")]


def test_a_window_that_is_too_small_takes_no_choice(tmp_path: Path, ranked: Path) -> None:
    out = tmp_path / "out.jsonl"
    with person("annotate", ranked, "--annotator", "ann", "--out", out, rows=5, columns=20) as ann:
        ann.sees("Make the window")
        ann.types("abts")
        ann.resize(24, 120)  # it is drawn anew without a key
        shown = ann.sees("question 1")
        # Wide: both responses beside each other.
        assert any("left answer 1" in line and "right answer 1" in line for line in shown.split("\n"))
        ann.types("q")
        assert ann.leaves()[0] == 0
    assert out.read_text() == ""


def test_without_a_terminal_it_says_what_to_do_instead(tmp_path: Path, ranked: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, "label", "annotate", ranked, "--out", out],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "headrace: label annotate: standard input is not a terminal; run it in one, or write a choice (a, b, "
        "tie, skip) into each line of the ranked file by other means and give that file to label merge\n"
    )
    assert not out.exists()


def test_two_people_cannot_write_one_file_at_the_same_time(tmp_path: Path, ranked: Path) -> None:
    out = tmp_path / "out.jsonl"
    with person("annotate", ranked, "--annotator", "ann", "--out", out) as ann:
        ann.sees("question 1")
        with person("annotate", ranked, "--annotator", "bob", "--out", out) as bob:
            status, said = bob.leaves()
        assert status == 2
        assert "another process is annotating into it" in said
        ann.types("a")
        ann.sees("question 2")
        ann.types("q")
        ann.leaves()
    assert len(json.loads(out.read_text().splitlines()[0])["key"]) == 64


@pytest.mark.parametrize("what", ["ranked", "pool"])
def test_labels_are_never_appended_to_a_file_of_another_kind(tmp_path: Path, ranked: Path, what: str) -> None:
    out = ranked
    if what == "pool":
        out = write_rows(tmp_path / "pool.jsonl", [{"prompt": "p", "responses": ["x", "y"]}] * 2)
    before = out.read_bytes()
    with person("annotate", ranked, "--annotator", "ann", "--out", out) as ann:
        status, said = ann.leaves()
    assert status == 2
    assert said == f"headrace: --out {out}: is no annotations file; name a new file, or one to go on with\n"
    assert out.read_bytes() == before

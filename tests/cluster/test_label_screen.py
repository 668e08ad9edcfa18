"""What the annotation mode draws and which keys it hears: pure functions."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelling_helpers import make_pair
from rich.cells import cell_len

from cluster.labelling.keyboard import CTRL_C, ESCAPE, Keys
from cluster.labelling.screen import Window, everything, overview, page, reading
from cluster.visible import cells, fitted, visible, wrapped


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ~ text\nnext", "plain ~ text\nnext"),
        ("tab\tend\r\nline", "tab    end\nline"),
        ("\x1b[31m\x07\x00\r", "<U+001B>[31m<U+0007><U+0000><U+000D>"),
        ("\x9b1A\x7f", "<U+009B>1A<U+007F>"),
        ("\u202eabc\u2069\ufeff\u200b\u2028", "<U+202E>abc<U+2069><U+FEFF><U+200B><U+2028>"),
        ("\U000e0041\ue000\ud800", "<U+E0041><U+E000><U+D800>"),  # a tag, private use, half a pair
        ("żółć 漢字 👍 a\u0301", "żółć 漢字 👍 a\u0301"),
        ("no\u00a0break", "no break"),
        ("e" + "\u0301" * 6, "e" + "\u0301" * 4 + "<U+0301>" * 2),  # four marks at most on one letter
    ],
)
def test_only_what_is_safe_stays_itself(text: str, shown: str) -> None:
    assert visible(text) == shown


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(), max_size=60))
def test_no_unsafe_character_survives(text: str) -> None:
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    left = {char for char in visible(text) if unicodedata.category(char) in hidden}
    assert left <= {"\n", "\u200c", "\u200d"}


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from("ab  漢👍\u0301\t\x1b\n"), max_size=80), st.integers(2, 20))
def test_wrapping_loses_nothing_and_keeps_the_width(text: str, width: int) -> None:
    lines = wrapped(text, width)
    assert "".join(lines) == visible(text).replace("\n", "")
    assert all(cells(line) <= width for line in lines)


def test_lines_break_at_blanks_and_long_words_anywhere() -> None:
    assert wrapped("one two three", 8) == ("one two ", "three")
    assert wrapped("abcdefghij", 4) == ("abcd", "efgh", "ij")
    # Wide characters take two columns: two of them fit into five, and a line is filled up by a blank.
    assert wrapped("漢字漢字", 5) == ("漢字", "漢字")
    assert (fitted("漢字漢", 5), cell_len(fitted("漢字漢", 5))) == ("漢字 ", 5)
    assert wrapped("a\n\nb", 5) == ("a", "", "b")


def test_a_short_response_leaves_its_rows_to_a_long_one() -> None:
    pair = make_pair("prompt", "short", "\n".join(str(n) for n in range(40)))
    text = [line.text for line in overview(pair, "a", "heading", Window(60, 24))]
    assert len(text) == 24
    # 24 − 4 − 1 (prompt) − 2 heads = 17 rows: 1 for A, so 16 for B, its last one for the 40 − 15 left out.
    assert text[3:5] == ["── A ──", "short"]
    assert text[5] == "── B ──"
    assert text[6:21] == [str(n) for n in range(15)]
    assert text[21] == "… 25 more lines (v: read all)"


def test_wide_windows_show_the_first_one_left() -> None:
    pair = make_pair([{"role": "user", "content": "hi"}], "left", "right", a={"finished": False})
    text = [line.text for line in overview(pair, "b", "heading", Window(100, 24))]
    assert "user: hi" in text
    head, body = text[3], text[4]
    # The ranked file's b is shown first, so it stands left, as A; a, which was cut off, is B.
    assert head.index("A") < head.index("B (cut off at the length limit)")
    assert body.index("right") < body.index("left")
    assert all(cell_len(line) <= 100 for line in text)


@pytest.mark.parametrize("size", [(30, 14), (80, 24), (90, 14), (200, 60), (120, 15)])
def test_nothing_ever_leaves_the_window(size: tuple[int, int]) -> None:
    pair = make_pair("long prompt " * 200, "漢" * 3000, "\x1b" * 900)
    window = Window(*size)
    for lines in (
        overview(pair, "a", "heading" * 30, window),
        reading(pair, "a", "heading" * 30, window, 5)[0],
    ):
        assert len(lines) <= window.rows
        assert max(cell_len(line.text) for line in lines) <= window.columns


def test_scrolling_stops_at_both_ends() -> None:
    pair = make_pair("p", "\n".join("abcdefghij"), "\n".join("klmnopqrst"))
    window = Window(40, 14)
    total = len(everything(pair, "a", 40))
    assert total == 2 + 1 + 11 + 1 + 11  # prompt, blank, A, blank, B, each with its head
    assert reading(pair, "a", "h", window, -5)[1] == 0
    assert reading(pair, "a", "h", window, 10**9)[1] == total - page(window)


def test_escape_sequences_and_pastes_are_no_choices() -> None:
    keys = Keys()
    assert keys.feed(b"a\x1b[Bb\x1b[5~\x1bOA\x03") == ["a", "down", "b", "page up", "up", CTRL_C]
    assert keys.feed(b"\x1b[1;5A\x1ba\x1b[200~aab\x1b[201~t") == ["t"]  # Ctrl-Up, Alt-a, a paste
    assert keys.feed(b"\x1b[20") == []  # sequences may come in pieces
    assert keys.feed(b"0~bbb\x1b[2") == []
    assert keys.feed(b"01~s") == ["s"]
    assert keys.feed(b"\x1b") == []
    assert (keys.waiting, keys.timeout(), keys.waiting) == (True, [ESCAPE], False)
    assert (keys.feed(b"\x1b["), keys.timeout(), keys.feed(b"b")) == ([], [], ["b"])

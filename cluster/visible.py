"""Text of a model, or of a folder from elsewhere, as it is shown to people.

Nothing in it can move the cursor, colour, hide or reorder anything.

Whatever is no letter, mark, number, punctuation, symbol or plain blank is shown by name, as in `<U+001B>`:
control characters, marks that reverse the direction of writing, invisible and unassigned characters.
"""

import unicodedata
from functools import lru_cache

from rich.cells import cell_len

_TAB = "    "
_MOST_MARKS = 4  # combining marks on one character; the rest would be drawn over other lines
_JOINERS = "\u200c\u200d"  # invisible, but part of how several scripts are written
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_MARKS = ("Mn", "Me")


def entry(text: str) -> str:
    """The visible text of a message; further lines are indented, so that none looks like another entry."""
    return visible(text.strip("\r\n")).replace("\n", "\n    ")


def visible(text: str) -> str:
    """The text with every unsafe character named; line ends stay, tabs become four blanks."""
    shown: list[str] = []
    marks = 0
    for char in text.replace("\r\n", "\n"):
        if char == "\n" or " " <= char <= "~":
            marks = 0
            shown.append(char)
            continue
        mark = is_mark(char)
        marks = marks + 1 if mark else 0
        shown.append(_named(char) if marks > _MOST_MARKS else _shown(char))
    return "".join(shown)


@lru_cache(maxsize=4096)
def is_mark(char: str) -> bool:
    """Whether it is drawn on the character before it."""
    return unicodedata.category(char) in _MARKS or char in _JOINERS


@lru_cache(maxsize=4096)
def _shown(char: str) -> str:
    if char == "\t":
        return _TAB
    if char in _JOINERS or unicodedata.category(char) not in _HIDDEN:
        return " " if unicodedata.category(char) == "Zs" else char
    return _named(char)


def _named(char: str) -> str:
    return f"<U+{ord(char):04X}>"


@lru_cache(maxsize=4096)
def _size(char: str) -> int:
    return 0 if is_mark(char) else cell_len(char)


def cells(text: str) -> int:
    """Columns that a text without line ends takes."""
    return len(text) if text.isascii() else sum(_size(char) for char in text)


@lru_cache(maxsize=64)
def wrapped(text: str, width: int) -> tuple[str, ...]:
    """The visible text in lines of at most `width` ≥ 2 columns, broken at blanks where there are any."""
    lines: list[str] = []
    for line in visible(text).split("\n"):
        lines += _folded(line, width)
    return tuple(lines)


def _folded(line: str, width: int) -> list[str]:
    if line.isascii() and len(line) <= width:
        return [line]
    lines: list[str] = []
    begin, used, blank = 0, 0, -1
    for place, char in enumerate(line):
        size = _size(char)
        while used + size > width:
            cut = blank + 1 if blank >= begin else place
            lines.append(line[begin:cut])
            used = cells(line[cut:place])
            begin, blank = cut, -1
        if char == " ":
            blank = place
        used += size
    return [*lines, line[begin:]]


def fitted(text: str, width: int) -> str:
    """A line cut or filled with blanks to exactly `width` columns."""
    used, place = 0, 0
    for place, char in enumerate(text):  # noqa: B007 - where it stops is what is wanted
        if used + _size(char) > width:
            break
        used += _size(char)
    else:
        place = len(text)
    return text[:place] + " " * (width - used)

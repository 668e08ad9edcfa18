"""What the annotation mode draws: lines of text for a window of so many columns and rows. Pure functions.

Overview: the prompt above, the responses beside each other where the window is wide, else one below the
other; what does not fit is counted. Reading view: everything in full, scrolled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.labelling.records import Name, Pair, Side
from cluster.visible import fitted, visible, wrapped
from rewards.preferences.records import Prompt

LEAST_COLUMNS, LEAST_ROWS = 30, 14
WIDE = 90  # columns from which responses stand beside each other
_BETWEEN = " │ "
KEYS = "a: A better   b: B better   t: tie   s: skip   u: undo   v: read all   q: quit"
READING_KEYS = "arrows, space: scroll   g, G: ends   v: back   a, b, t, s, u, q: as before"
SHORT_KEYS = "a b better  t tie  s skip  u undo  v all  q quit"


class Line(NamedTuple):
    """A line of the screen; what is bold is ours, never a model's."""

    text: str
    bold: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """Size of the terminal."""

    columns: int
    rows: int

    @property
    def too_small(self) -> bool:
        """Whether a pair cannot be judged in it."""
        return self.columns < LEAST_COLUMNS or self.rows < LEAST_ROWS


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a person reads it: chat messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def overview(pair: Pair, first: Name, heading: str, window: Window) -> list[Line]:
    """At most `window.rows` lines: heading, prompt, both responses, keys."""
    if window.too_small:
        return too_small(window)
    columns = window.columns
    room = window.rows - 4  # heading, the prompt's, two of keys
    prompt = wrapped(prompt_text(pair.prompt), columns)
    area = block(prompt, max(2, min(len(prompt), room // 3)))
    lines = [Line(fitted(heading, columns), bold=True), head("Prompt"), *map(Line, area)]
    room -= len(area)
    shown, other = responses(pair, first)
    if columns >= WIDE:
        lines += beside(shown, other, columns, room)
    else:
        lines += below(shown, other, columns, room)
    return at_the_end(lines, keys(columns), window)


def at_the_end(lines: list[Line], text: str, window: Window) -> list[Line]:
    """The lines, blank ones up to the last row, and there the keys."""
    blank = [Line("")] * (window.rows - 1 - len(lines))
    return [*lines, *blank, Line(fitted(text, window.columns), bold=True)]


def head(text: str) -> Line:
    """What stands above a text."""
    return Line(f"── {text} ──", bold=True)


def keys(columns: int) -> str:
    """The keys, in a form that fits."""
    return next((text for text in (KEYS, SHORT_KEYS) if len(text) <= columns), "a b t s u v q")


def responses(pair: Pair, first: Name) -> tuple[Side, Side]:
    """As A and as B."""
    return (pair.a, pair.b) if first == "a" else (pair.b, pair.a)


def heading_of(letter: str, side: Side) -> str:
    """`A`, and whether the response was cut off."""
    return letter if side.finished else f"{letter} (cut off at the length limit)"


def block(lines: Sequence[str], rows: int) -> list[str]:
    """The first lines, and in the last row how many more there are."""
    if len(lines) <= rows:
        return list(lines)
    return [*lines[: rows - 1], f"… {len(lines) - rows + 1} more lines (v: read all)"]


def beside(shown: Side, other: Side, columns: int, room: int) -> list[Line]:
    """Both responses side by side, in `room` rows."""
    left, right = (columns - len(_BETWEEN)) // 2, (columns - len(_BETWEEN) + 1) // 2
    one = block(wrapped(shown.text, left), room - 1)
    two = block(wrapped(other.text, right), room - 1)
    height = max(len(one), len(two))
    one += [""] * (height - len(one))
    two += [""] * (height - len(two))
    heads = _joined(head(heading_of("A", shown)).text, head(heading_of("B", other)).text, left, right)
    return [
        Line(heads, bold=True),
        *(Line(_joined(a, b, left, right)) for a, b in zip(one, two, strict=True)),
    ]


def _joined(one: str, other: str, left: int, right: int) -> str:
    return fitted(one, left) + _BETWEEN + fitted(other, right)


def below(shown: Side, other: Side, columns: int, room: int) -> list[Line]:
    """One response below the other, in `room` rows; a short one leaves its rows to the other."""
    one, two = wrapped(shown.text, columns), wrapped(other.text, columns)
    rows = room - 2
    half = rows // 2
    top = min(len(one), max(half, rows - len(two)))
    bottom = min(len(two), rows - top)
    return [
        head(heading_of("A", shown)),
        *map(Line, block(one, top)),
        head(heading_of("B", other)),
        *map(Line, block(two, bottom)),
    ]


def everything(pair: Pair, first: Name, columns: int) -> list[Line]:
    """Prompt and responses in full, one below the other."""
    shown, other = responses(pair, first)
    lines: list[Line] = []
    for name, text in (
        ("Prompt", prompt_text(pair.prompt)),
        (heading_of("A", shown), shown.text),
        (heading_of("B", other), other.text),
    ):
        lines += [head(name), *map(Line, wrapped(text, columns)), Line("")]
    return lines[:-1]


def reading(pair: Pair, first: Name, heading: str, window: Window, scroll: int) -> tuple[list[Line], int]:
    """The reading view from line `scroll`, and the scroll that it ended up with."""
    if window.too_small:
        return too_small(window), scroll
    lines = everything(pair, first, window.columns)
    rows = page(window)
    scroll = max(0, min(scroll, len(lines) - rows))
    last = min(len(lines), scroll + rows)
    place = f"{heading} · lines {scroll + 1} to {last} of {len(lines)}"
    keys_line = READING_KEYS if len(READING_KEYS) <= window.columns else "arrows scroll  v back  a b t s u q"
    shown = [Line(fitted(place, window.columns), bold=True), *lines[scroll:last]]
    return at_the_end(shown, keys_line, window), scroll


def page(window: Window) -> int:
    """Rows of text in the reading view."""
    return window.rows - 3


def finished(summary: str, window: Window) -> list[Line]:
    """What is shown when every pair is done."""
    return [
        *(Line(text) for text in wrapped(f"All pairs are done. {summary}.", max(2, window.columns))),
        Line(""),
        Line("u: undo the last   q: quit"[: window.columns], bold=True),
    ][: window.rows]


def too_small(window: Window) -> list[Line]:
    """Instead of a pair that could be judged by its first lines only."""
    text = f"Make the window at least {LEAST_COLUMNS} × {LEAST_ROWS}; q: quit"
    return [Line(part) for part in wrapped(text, max(2, window.columns))][: max(1, window.rows)]


def heading(number: int, total: int, annotator: str) -> str:
    """The first line."""
    return f"pair {number} of {total} · {visible(annotator)}"

"""The annotation mode: shows a pair, reads a key, writes the choice to the disk, shows the next.

The terminal sends every key at once, Ctrl-C too: a choice is never interrupted half-way. However the mode
ends, the terminal is as it was before.
"""

import datetime
import os
import select
import signal
import sys
import termios
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self

from cluster.labelling import screen
from cluster.labelling.files import AnnotationLog
from cluster.labelling.keyboard import CTRL_C, ESCAPE, Keys
from cluster.labelling.screen import Line, Window
from cluster.labelling.session import Pressed, Session

_ENTER = b"\x1b[?1049h\x1b[?25l\x1b[?2004h"  # another screen, no cursor, pasted text marked as such
_BEGIN, _END = b"\x1b[?2026h\x1b[H\x1b[2J", b"\x1b[?2026l"  # what stands between appears at once
_LEAVE = _END + b"\x1b[?2004l\x1b[?25h\x1b[?1049l"
_LOOK_AT_SIZE_S = 0.3
_ESCAPE_S = 0.05
_CHOICES: dict[str, Pressed] = {"a": "a", "b": "b", "t": "tie", "s": "skip"}


def require_terminal() -> None:
    """Refuse to annotate where nobody can see a pair or press a key."""
    for name, stream in (("standard input", sys.stdin), ("standard output", sys.stdout)):
        if not stream.isatty():
            raise ValueError(
                f"label annotate: {name} is not a terminal; run it in one, or write a choice (a, b, tie, "
                "skip) into each line of the ranked file by other means and give that file to label merge"
            )
    if os.environ.get("TERM", "") in ("", "dumb"):
        raise ValueError(
            f"label annotate: TERM = {os.environ.get('TERM', '')!r} is a terminal that cannot be redrawn; "
            "set TERM to what it is, for example xterm-256color"
        )


class Terminal:
    """Standard input and output as a screen and keys, for the time of a `with` block."""

    def __init__(self) -> None:
        self._in, self._out = sys.stdin.fileno(), sys.stdout.fileno()
        self._keys = Keys()
        self._before: list[Any] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        sys.stdout.flush()
        self._before = termios.tcgetattr(self._in)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, _interrupt)
        mode = termios.tcgetattr(self._in)
        mode[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN)
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._in, termios.TCSAFLUSH, mode)  # keys typed too early label nothing
        self._write(_ENTER)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._write(_LEAVE)
            termios.tcsetattr(self._in, termios.TCSADRAIN, self._before)
        except (OSError, termios.error):
            pass  # the terminal itself is gone
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def window(self) -> Window:
        """Its size now."""
        size = os.get_terminal_size(self._out)
        return Window(size.columns or 80, size.lines or 24)

    def draw(self, lines: Sequence[Line]) -> None:
        """Replace what the screen shows."""
        text = "\r\n".join(f"\x1b[1m{line.text}\x1b[0m" if line.bold else line.text for line in lines)
        self._write(_BEGIN + text.encode("utf-8", "replace") + _END)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._out, data) :]

    def keys(self, window: Window) -> list[str]:
        """The next keys; none if the window's size has changed. KeyboardInterrupt where nobody is there."""
        while True:
            seconds = _ESCAPE_S if self._keys.waiting else _LOOK_AT_SIZE_S
            ready, _, _ = select.select([self._in], [], [], seconds)
            if ready:
                data = os.read(self._in, 1024)
                if not data:
                    raise KeyboardInterrupt
                found = self._keys.feed(data)
            elif self._keys.waiting:
                found = self._keys.timeout()
            elif self.window() != window:
                return []
            else:
                continue
            if found:
                return found


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class Annotating:
    """What the keys do."""

    def __init__(self, session: Session, log: AnnotationLog) -> None:
        self._session, self._log = session, log
        self._reading = False
        self._scroll = 0
        self._shown_at = time.monotonic()
        self._window = Window(80, 24)
        self.quit = False

    def lines(self, window: Window) -> list[Line]:
        """What the screen shows now."""
        self._window = window
        session = self._session
        pair = session.current
        if pair is None:
            return screen.finished(session.summary(), window)
        heading = screen.heading(session.done + 1, len(session.pairs), session.annotator)
        first = session.first(pair)
        if not self._reading:
            return screen.overview(pair, first, heading, window)
        lines, self._scroll = screen.reading(pair, first, heading, window, self._scroll)
        return lines

    def press(self, key: str) -> None:
        """Do what a key says; a choice is on the disk when this returns. Ctrl-C raises KeyboardInterrupt."""
        if key == CTRL_C:
            raise KeyboardInterrupt
        low = key.lower() if len(key) == 1 else key
        if low == "q":
            self.quit = True
        elif low == "u":
            undone = self._session.undo(time=_now())
            if undone is not None:
                self._log.append([undone])
                self._next_pair()
        elif low in _CHOICES:
            self._choose(_CHOICES[low])
        elif low == "v" or (key == ESCAPE and self._reading):
            self._reading, self._scroll = not self._reading, 0
        elif self._reading:
            self._move(key)

    def _choose(self, pressed: Pressed) -> None:
        if self._session.current is None or self._window.too_small:
            return
        seconds = round(time.monotonic() - self._shown_at, 2)
        self._log.append([self._session.choose(pressed, seconds=seconds, time=_now())])
        self._next_pair()

    def _next_pair(self) -> None:
        self._reading, self._scroll, self._shown_at = False, 0, time.monotonic()

    def _move(self, key: str) -> None:
        rows = screen.page(self._window)
        steps = {"up": -1, "down": 1, "page up": -rows, "page down": rows, " ": rows, "k": -1, "j": 1}
        ends = {"g": 0, "home": 0, "G": sys.maxsize, "end": sys.maxsize}
        self._scroll = ends[key] if key in ends else self._scroll + steps.get(key, 0)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def annotate(session: Session, log: AnnotationLog) -> None:
    """Go through the session's pairs with the person at the terminal, until they quit.

    Raises KeyboardInterrupt at Ctrl-C and where the terminal goes away; every choice made is on the disk.
    """
    mode = Annotating(session, log)
    with Terminal() as terminal:
        while not mode.quit:
            window = terminal.window()
            terminal.draw(mode.lines(window))
            for key in terminal.keys(window):
                mode.press(key)
                if mode.quit:
                    break
                mode.lines(window)

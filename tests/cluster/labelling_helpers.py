"""Label files for tests, and the annotation mode in a pseudo-terminal."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.labelling.arguments import add_label
from cluster.labelling.records import Pair, Side, pair_key

# What `headrace label` runs, without the rest of the command line.
ENTRY = """
import argparse, sys
from cluster.labelling.arguments import add_label
parser = argparse.ArgumentParser(prog="headrace")
add_label(parser.add_subparsers())
options = parser.parse_args(sys.argv[1:])
try:
    sys.exit(options.run(options))
except ValueError as error:
    print(f"headrace: {error}", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    print("headrace: interrupted", file=sys.stderr)
    sys.exit(1)
"""


def make_pair(prompt: Any, one: str, other: str, /, **more: Any) -> Pair:
    """A pair as a ranking makes it, line 1 of a pool."""
    sides = {
        name: Side(text, 1, number, **more.pop(name, {}))
        for number, (name, text) in enumerate([("a", one), ("b", other)])
    }
    return Pair(
        pair_key(prompt, one, other), prompt, sides["a"], sides["b"], "random", None, {}, more.pop("row", {})
    )


def write_pairs(path: Path, pairs: Sequence[Pair]) -> Path:
    return write_rows(path, [pair.to_json(number) for number, pair in enumerate(pairs, start=1)])


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def label(*arguments: Any) -> int:
    """Run `label …` in this process."""
    import argparse

    parser = argparse.ArgumentParser()
    add_label(parser.add_subparsers())
    options = parser.parse_args(["label", *map(str, arguments)])
    status: int = options.run(options)
    return status


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "TERM": "xterm", "PYTHONDONTWRITEBYTECODE": "1"}


class Person:
    """Somebody at a terminal of 24 × 80 in which a command runs; `screen` is what the last drawing shows."""

    def __init__(self, arguments: Sequence[Any], *, rows: int = 24, columns: int = 80) -> None:
        self._terminal, other = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(other)
        self._other = other
        self._process = subprocess.Popen(
            [sys.executable, "-c", ENTRY, "label", *map(str, arguments)],
            stdin=other,
            stdout=other,
            stderr=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
        self.output = b""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def screen(self) -> str:
        """The last whole drawing, without the marks of bold."""
        drawings = re.findall(rb"\x1b\[\?2026h\x1b\[H\x1b\[2J(.*?)\x1b\[\?2026l", self.output, re.DOTALL)
        drawn = drawings[-1].decode() if drawings else ""
        return re.sub(r"\r+\n", "\n", re.sub(r"\x1b\[[01]m", "", drawn))

    def sees(self, text: str, seconds: float = 60) -> str:
        """Wait until the screen shows a text."""
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < deadline, f"{text!r} is not on the screen:\n{self.screen}"
            self._read(0.2)
        return self.screen

    def _read(self, seconds: float) -> None:
        if select.select([self._terminal], [], [], seconds)[0]:
            with contextlib.suppress(OSError):
                self.output += os.read(self._terminal, 1 << 16)

    def types(self, keys: str | bytes) -> None:
        os.write(self._terminal, keys if isinstance(keys, bytes) else keys.encode())

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def leaves(self) -> tuple[int, str]:
        """Wait for the end; exit status, and what was said on standard error."""
        deadline = time.monotonic() + 60
        while self._process.poll() is None:
            assert time.monotonic() < deadline, self.screen
            self._read(0.1)
        self._read(0.1)
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode()
        self._process.stderr.close()
        return self._process.returncode, said

    def restored(self) -> bool:
        """Whether the terminal's settings are as they were."""
        return termios.tcgetattr(self._other) == self.before

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for descriptor in (self._terminal, self._other):
            os.close(descriptor)


@contextlib.contextmanager
def person(*arguments: Any, rows: int = 24, columns: int = 80) -> Iterator[Person]:
    made = Person(arguments, rows=rows, columns=columns)
    try:
        yield made
    finally:
        made.close()

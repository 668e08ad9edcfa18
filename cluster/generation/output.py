"""What is written while prompts are answered: a file that a stopped command goes on with, then the result.

each prompt ─► NAME.partial.jsonl, at once, in the order they end ─► NAME, whole, in the order of the prompts
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

from cluster.labelling.files import require_new, write_lines

Line = dict[str, Any]


class Output:
    """The responses so far, by the number of their prompt. Use it as a context."""

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        """`made_by`: all that the responses depend on; ValueError where a partial file is of something else.

        A crash while a line was written costs that line.
        """
        self.path = require_new(path)
        self.partial = path.with_name(f"{path.stem}.partial.jsonl")
        self._head = {"made_by": _digest(made_by)}
        self._found: dict[int, list[Line]] = {}
        self._file = self._open()

    def _open(self) -> BinaryIO:
        descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o600)
        file = open(descriptor, "r+b")  # noqa: PTH123, SIM115 - it is a descriptor, and closed by __exit__
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"--out {self.path}: another headrace is writing it; wait for it") from None
            raw = file.read()
            whole = raw[: raw.rfind(b"\n") + 1]
            lines = [json.loads(line) for line in whole.splitlines()]
            if lines and lines[0] != self._head:
                raise ValueError(
                    f"--out {self.path}: {self.partial} was begun with other settings, prompts or weights: "
                    "give the same ones to go on, or remove it to begin anew"
                )
            for record in lines[1:]:
                self._found[int(record["number"])] = record["lines"]
            file.truncate(len(whole))
            file.seek(len(whole))
            if not lines:
                _append(file, self._head)
        except BaseException:
            file.close()
            raise
        return file

    @property
    def done(self) -> frozenset[int]:
        """Prompts that are answered."""
        return frozenset(self._found)

    @property
    def lines(self) -> list[Line]:
        """All responses, in the order of the prompts."""
        return [line for number in sorted(self._found) for line in self._found[number]]

    def add(self, number: int, lines: Sequence[Line]) -> None:
        """Keep a prompt's responses; they are on the disk when this returns."""
        _append(self._file, {"number": number, "lines": list(lines)})
        self._found[number] = list(lines)

    def finish(self) -> int:
        """Write the result, and remove the partial file; the number of responses."""
        count = write_lines(self.path, self.lines)
        self.partial.unlink()
        return count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if not self._found:
            self.partial.unlink(missing_ok=True)


def _append(file: BinaryIO, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    file.flush()


def _digest(made_by: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_by, sort_keys=True, default=str).encode()).hexdigest()

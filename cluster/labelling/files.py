"""Reading and writing the label files.

A pool may come from anywhere: its bad rows are put aside with their reason. A ranked file is ours: a bad
line in it is an error. An annotations file only ever grows; a crash costs its last line at most.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from cluster.data_files import BadRow, Quarantine, Reading, parse_line, read_rows
from cluster.labelling.records import (
    Annotation,
    Candidates,
    Pair,
    as_line,
    parse_annotation,
    parse_candidates,
    parse_pair,
)
from rewards.preferences.records import prompt_key, response_key


@dataclass(frozen=True, slots=True)
class Pool:
    """All candidates, one entry a prompt; `quarantined` and `repeated` count what was left out."""

    entries: tuple[Candidates, ...]
    quarantined: int
    repeated: int
    sha256: str


@contextlib.contextmanager
def quarantine_beside(path: Path) -> Iterator[Quarantine]:
    """`NAME.quarantine.jsonl` beside a file that is to be written; it is left only if a row is in it."""
    quarantine = Quarantine(path.with_name(f"{path.stem}.quarantine.jsonl"))
    quarantine.path.chmod(0o600)
    try:
        yield quarantine
    finally:
        if not quarantine.counts:
            quarantine.path.unlink()


def read_pool(name: str, quarantine: Quarantine) -> Pool:
    """All lines of a pool; those of one prompt are joined, so that responses of two policies can be compared.

    Raises ValueError where the source cannot be read or has no good row.
    """
    reading = Reading(name, quarantine)
    found: dict[str, Candidates] = {}
    good = 0
    for line, row in read_rows(name, reading, field="POOL"):
        try:
            candidates = parse_candidates(line, row)
        except BadRow as bad:
            reading.reject(line, bad, json.dumps(row, ensure_ascii=False))
            continue
        good += 1
        identity = prompt_key(candidates.prompt)
        found[identity] = _joined(found[identity], candidates) if identity in found else candidates
    reading.require_good(good, "POOL")
    entries = tuple(found.values())
    return Pool(
        entries,
        sum(reading.quarantined.values()),
        sum(entry.repeated for entry in entries),
        sha256_of(Path(name).expanduser()),
    )


def _joined(one: Candidates, other: Candidates) -> Candidates:
    known = {response_key(side.text) for side in one.sides}
    new = tuple(side for side in other.sides if response_key(side.text) not in known)
    repeated = one.repeated + other.repeated + len(other.sides) - len(new)
    return replace(one, sides=(*one.sides, *new), repeated=repeated)


def sha256_of(path: Path) -> str:
    """Of a file's bytes; empty for a folder or a dataset of the hub."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_pairs(path: Path) -> list[Pair]:
    """A ranked file, best first. ValueError names the first bad line."""
    pairs: dict[str, Pair] = {}
    for line, row in _lines(path, "RANKED"):
        try:
            pair = parse_pair(row if isinstance(row, dict) else _raise(row))
        except BadRow as bad:
            raise ValueError(
                f"RANKED = {str(path)!r}, line {line}: {bad}; write it anew with label rank"
            ) from None
        if pair.key in pairs:
            raise ValueError(
                f"RANKED = {str(path)!r}, line {line}: the pair stands in an earlier line; remove it"
            )
        pairs[pair.key] = pair
    if not pairs:
        raise ValueError(f"RANKED = {str(path)!r} has no pairs: give a file that label rank wrote")
    return list(pairs.values())


def _raise(bad: BadRow) -> dict[str, Any]:
    raise bad


def read_annotations(path: Path) -> tuple[list[Annotation], list[str]]:
    """The annotations of a file in their order, and what is wrong with each line that is none."""
    good: list[Annotation] = []
    problems: list[str] = []
    for line, row in _lines(path, "ANNOTATIONS"):
        try:
            good.append(parse_annotation(line, row if isinstance(row, dict) else _raise(row)))
        except BadRow as bad:
            problems.append(f"{path}, line {line}: {bad}")
    return good, problems


def _lines(path: Path, field: str) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Each line that is not blank, parsed, or why it cannot be."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{field} = {str(path)!r}: cannot be read ({error.strerror}); check the path"
        ) from None
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, parse_line(line, first=number == 1)
        except BadRow as bad:
            yield number, bad


# ---- writing --------------------------------------------------------------------------------------------


def require_new(path: Path) -> Path:
    """Refuse to write over anything, and a folder that is not there."""
    if path.exists():
        raise ValueError(f"--out {path}: exists already; name a new file, or remove it")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}; make it first")
    return path


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write JSON Lines whole or not at all, for this user alone; returns the number of rows."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)
    count = 0
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - it is a descriptor
        for row in rows:
            file.write(as_line(row))
            count += 1
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)
    return count


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AnnotationLog:
    """An annotations file that this process alone appends to; a line is on the disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        """Open or make the file (mode 0600). ValueError where another process annotates into it."""
        self.path = path
        new = not path.exists()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ValueError(
                f"--out {path}: cannot be written ({error.strerror}); name another file"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise ValueError(
                f"--out {path}: another process is annotating into it; wait for it, or name another file"
            ) from None
        if new:
            _sync_folder(path.absolute().parent)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            self._write(b"\n")  # what a crash left of a line becomes a line of its own, which is reported

    def append(self, annotations: Sequence[Annotation]) -> None:
        """Write lines and wait until the disk has them; all of them, or none and a ValueError."""
        self._write("".join(as_line(one.to_json()) for one in annotations).encode())

    def _write(self, data: bytes) -> None:
        before = os.fstat(self._file).st_size
        try:
            rest = data
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, before)
            raise ValueError(
                f"--out {self.path}: cannot be written ({error.strerror}); all earlier labels are kept. Make "
                "room on the disk and run the same command again"
            ) from error

    def close(self) -> None:
        """Give the file free."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

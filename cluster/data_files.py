"""Rows from JSON Lines, Parquet, Arrow and Hugging Face datasets; what is malformed goes into quarantine.

    file, folder or hub name → `read_rows` → (line, row) for each well-formed row
                                    └──────→ `Quarantine`: file, line, reason, detail for every other one

Every line that is read ends up in exactly one of: good, quarantined, blank.
"""

import datetime
import decimal
import json
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cluster.data_open import PACKED, READ_ERRORS, kind_of, open_rows
from cluster.json_array import array_elements, begins_array

MAX_LINE_BYTES = 16 * 2**20
MAX_ARRAY_BYTES = 2 * 2**30
HUB_TIMEOUT_S = 30.0
_EXCERPT_CHARACTERS = 200
_HEAD_BYTES = 4096  # enough to tell an array from lines
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class BadRow(Exception):  # noqa: N818 - a verdict on a row, not a failure of the program
    """A row that cannot be used; `reason` is a short fixed name that is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Quarantine:
    """`quarantine.jsonl` in the run folder: one line for each row that was put aside.

    Making one starts an empty file, so that reading the same data again (a resumed run) writes the same file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.restart()

    def restart(self) -> None:
        """Forget everything: the same sources are about to be read once more."""
        self.counts.clear()
        self.path.write_text("", encoding="utf-8")

    def add(self, source: str, line: int, bad: BadRow, excerpt: object) -> None:
        """Record one row. `line` counts from 1; for Parquet and hub datasets it is the row's number."""
        text = excerpt if isinstance(excerpt, str) else repr(excerpt)
        self.counts[bad.reason] += 1
        record = {"file": source, "line": line, "reason": bad.reason, "detail": bad.detail}
        record["excerpt"] = text[:_EXCERPT_CHARACTERS]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def describe(self, counts: Counter[str] | None = None) -> str:
        """For example `3 × empty prompt, 1 × not JSON`, the commonest first."""
        counts = self.counts if counts is None else counts
        return ", ".join(f"{count} × {reason}" for reason, count in counts.most_common())

    def announce(self, say: Callable[[str], None]) -> None:
        """Say how many rows were put aside and where they are told, if any were."""
        if self.counts:
            say(f"warning: {self.counts.total()} rows were put aside ({self.describe()}): see {self.path}")


class Reading:
    """One pass over one source: its rows, and what became of every line."""

    def __init__(self, source: str, quarantine: Quarantine) -> None:
        self.source = source
        self.blank = 0
        self.quarantined: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # by reason: the first such row's line and detail
        self._quarantine = quarantine

    def reject(self, line: int, bad: BadRow, excerpt: object) -> None:
        """Put a row aside."""
        self.quarantined[bad.reason] += 1
        self._first.setdefault(bad.reason, f"line {line}: {bad.detail}"[:_EXCERPT_CHARACTERS])
        self._quarantine.add(self.source, line, bad, excerpt)

    def require_good(self, good: int, field: str) -> None:
        """Refuse a source that gave nothing, naming the reasons and the first row of the commonest."""
        if good:
            return
        if not self.quarantined:
            raise ValueError(f"{field} = {self.source!r} has no rows: give it at least one")
        reasons = self._quarantine.describe(self.quarantined)
        ((commonest, _),) = self.quarantined.most_common(1)
        raise ValueError(
            f"{field} = {self.source!r} has no good row ({reasons}), such as {self._first[commonest]}. Every "
            f"row that was put aside stands with its line and reason in {self._quarantine.path}"
        )


def read_rows(
    name: str,
    reading: Reading,
    *,
    field: str,
    split: str = "train",
    subset: str = "",
    revision: str | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) for every row that is an object of plain finite values.

    `field` is the setting that held `name`, for messages. Raises ValueError where the source itself
    cannot be read: no such file, damaged Parquet, hub not reachable.
    """
    path = Path(name).expanduser()
    if path.is_file():
        yield from _read_file(path, reading, field)
    elif path.is_dir():
        yield from _read_folder(path, reading, field, split, subset)
    elif _looks_like_path(name):
        raise ValueError(f"{field} = {name!r}: no such file or folder (looked in {Path.cwd()})")
    else:
        yield from _plain_rows(_hub_rows(name, field, split, subset, revision), reading, field)


def _looks_like_path(name: str) -> bool:
    known = (*_JSON_SUFFIXES, ".parquet", ".arrow", ".csv", ".txt", PACKED)
    return not _HUB_NAME.fullmatch(name) or name.lower().endswith(known)


def _read_file(path: Path, reading: Reading, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    suffix = path.suffix.lower()
    if kind_of(path) in _JSON_SUFFIXES:
        yield from _read_json(path, reading, field)
    elif suffix in (".parquet", ".arrow"):
        yield from _plain_rows(_table_rows([path]), reading, field)
    else:
        raise ValueError(
            f"{field} = {str(path)!r}: cannot read {suffix or 'a file without suffix'}; "
            "write JSON Lines (.jsonl, .jsonl.gz), Parquet (.parquet) or Arrow (.arrow)"
        )


def _read_folder(
    folder: Path, reading: Reading, field: str, split: str, subset: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """A folder as `save_to_disk` leaves it, or with files named after the split as on the hub."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        yield from _plain_rows(_saved_rows(folder, split, field), reading, field)
        return
    root = folder / subset if subset else folder
    for place in (root, root / "data"):
        for suffix in (*_JSON_SUFFIXES, *(name + PACKED for name in _JSON_SUFFIXES), ".parquet"):
            found = [place / f"{split}{suffix}", *sorted(place.glob(f"{split}-*{suffix}"))]
            files = [path for path in found if path.is_file()]
            if not files:
                continue
            if suffix == ".parquet":
                yield from _plain_rows(_table_rows(files), reading, field)
            elif len(files) == 1:
                yield from _read_json(files[0], reading, field)
            else:
                raise ValueError(
                    f"{field}: {len(files)} files {split}-*{suffix} in {place}: join them into one"
                )
            return
    raise ValueError(
        f"{field} = {str(folder)!r} has no split {split!r}: expected {split}.jsonl, {split}.parquet or "
        f"{split}-*.parquet in {root} or {root / 'data'}, or a folder written by save_to_disk"
    )


# --- JSON Lines, JSON arrays ---------------------------------------------------------------------------


def _read_json(path: Path, reading: Reading, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open_rows(path) as file:
            is_array = begins_array(file.read(_HEAD_BYTES))
        yield from (_read_array(path, reading, field) if is_array else _read_json_lines(path, reading))
    except READ_ERRORS as error:
        raise ValueError(
            f"{field} = {str(path)!r} cannot be read to its end ({error}): check that the download is whole, "
            "or unpack it"
        ) from error


def _read_array(path: Path, reading: Reading, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The elements of an array, numbered as lines are."""
    remedy = f"write one JSON object a line, for example with `jq -c '.[]' {path.name}`"
    with open_rows(path) as file:
        size = path.stat().st_size
        raw = b"" if size > MAX_ARRAY_BYTES else file.read(MAX_ARRAY_BYTES + 1)
    if (size := max(size, len(raw))) > MAX_ARRAY_BYTES:
        raise ValueError(
            f"{field} = {str(path)!r} is one JSON array of {size / 2**30:.1f} GiB, and arrays are held in "
            f"memory whole: {remedy}"
        )
    number = 0
    try:
        for number, element in enumerate(array_elements(raw.decode("utf-8-sig")), start=1):
            try:
                row = parse_line(element.encode())
            except BadRow as bad:
                reading.reject(number, bad, element)
            else:
                yield number, row
    except ValueError as error:  # a UnicodeDecodeError is one too
        raise ValueError(
            f"{field} = {str(path)!r} is a JSON array that cannot be read after row {number}: {error}; "
            + remedy
        ) from error


def _read_json_lines(path: Path, reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_rows(path) as file:
        for line, raw in enumerate(_lines(file), start=1):
            if not raw.strip():
                reading.blank += 1
                continue
            try:
                yield line, parse_line(raw, first=line == 1)
            except BadRow as bad:
                reading.reject(line, bad, raw[: 4 * _EXCERPT_CHARACTERS].decode("utf-8", "replace"))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines without their end; one that is too long comes cut to `MAX_LINE_BYTES + 1` bytes."""
    while raw := file.readline(MAX_LINE_BYTES + 2):
        whole = raw.endswith(b"\n")
        line = raw.rstrip(b"\r\n")
        while not whole and (rest := file.readline(MAX_LINE_BYTES)):
            whole = rest.endswith(b"\n")
        yield line[: MAX_LINE_BYTES + 1]


def parse_line(raw: bytes, *, first: bool = False) -> dict[str, Any]:
    """One line of JSON Lines as a row; raises BadRow. A byte-order mark may start the `first` line."""
    if len(raw) > MAX_LINE_BYTES:
        raise BadRow("line too long", f"more than {MAX_LINE_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("bad UTF-8", f"byte {error.start} is {raw[error.start]:#04x}") from error
    try:
        row = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique_keys
        )
    except (ValueError, RecursionError) as error:
        raise BadRow("not JSON", str(error)) from error
    if not isinstance(row, dict):
        raise BadRow("not an object", f"a JSON {_kind(row)}")
    if "\\u" in text:  # only an escape can bring half a surrogate pair, which no text encoder takes
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("bad UTF-8", "an escape gives half a surrogate pair") from error
    return row


def _refuse_constant(text: str) -> float:
    raise BadRow("non-finite number", f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadRow("non-finite number", f"{text[:40]} is too large")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise BadRow("not JSON", f"key {twice!r} appears twice")
    return row


def _kind(value: object) -> str:
    names = {str: "string", list: "array", bool: "boolean", int: "number", float: "number", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


# --- Parquet, saved folders, the hub -------------------------------------------------------------------


def _plain_rows(
    rows: Iterator[dict[str, Any]], reading: Reading, field: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number the rows and make their values what JSON can hold; turn a reader's failure into a ValueError."""
    line = 0
    while True:
        try:
            row = next(rows, None)
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise ValueError(
                f"{field} = {reading.source!r} cannot be read after row {line}: {error}; "
                "write the file again or check that the download is whole"
            ) from error
        if row is None:
            return
        line += 1
        try:
            yield line, {column: plain(value, column) for column, value in row.items()}
        except BadRow as bad:
            reading.reject(line, bad, row)


def plain(value: Any, column: str) -> Any:
    """A value as JSON can hold it (dates become text); raises BadRow for any other."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadRow("non-finite number", f"column {column!r} is {value}")
        return value
    if isinstance(value, list | tuple):
        return [plain(item, column) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item, column) for key, item in value.items()}
    if isinstance(value, datetime.datetime | datetime.date | datetime.time | decimal.Decimal):
        return str(value)
    raise BadRow("wrong type", f"column {column!r} holds {type(value).__name__}, which no JSON can hold")


def _table_rows(files: list[Path]) -> Iterator[dict[str, Any]]:
    """Rows of Parquet or Arrow files."""
    import datasets

    # Streamed, so that no second copy of the file is written to the cache.
    names, kind = [str(path) for path in files], files[0].suffix.lower().removeprefix(".")
    yield from datasets.load_dataset(kind, data_files={"train": names}, split="train", streaming=True)


def _saved_rows(folder: Path, split: str, field: str) -> Iterator[dict[str, Any]]:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"{field}: {folder} has no split {split!r}, it has {', '.join(saved)}")
        saved = saved[split]
    yield from saved


def _hub_rows(
    name: str, field: str, split: str, subset: str, revision: str | None
) -> Iterator[dict[str, Any]]:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if not offline:
        _require_hub(name, field, revision)
    import datasets

    try:
        found = datasets.load_dataset(name, subset or None, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        remedy = (
            "HF_HUB_OFFLINE is set, so only the local cache was searched: unset it or use a local folder"
            if offline
            else "check data.subset and the split's name, or use a local folder or file"
        )
        raise ValueError(f"{field} = {name!r}: cannot load split {split!r}: {error}; {remedy}") from error
    yield from found


def _require_hub(name: str, field: str, revision: str | None) -> None:
    """One short look whether the hub answers and has the dataset: the loader itself retries for minutes."""
    from huggingface_hub import HfApi

    outcome: list[BaseException | None] = []

    def look() -> None:
        try:
            HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT_S / 3)
            outcome.append(None)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told to the user below
            outcome.append(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    problem = outcome[0] if outcome else TimeoutError(f"no answer from the hub in {HUB_TIMEOUT_S:.0f} s")
    if problem is not None:
        raise ValueError(
            f"{field} = {name!r} is no local file or folder, and the Hugging Face hub did not give it "
            f"({type(problem).__name__}: {problem}): correct the name, use a local folder or file, or set "
            "HF_HUB_OFFLINE=1 to use a copy in the local cache"
        ) from problem

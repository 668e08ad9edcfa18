"""Reads what wandb writes into a run folder when it is offline."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = 32768


def records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, a LevelDB log: 7 bytes of header, then blocks of 32 KiB with chunks.

    A chunk is checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last) and its data; a
    block's last bytes are padding where no chunk's header fits.
    """
    place, parts = 7, b""
    while place + 7 <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


@dataclass
class Logged:
    """What one start of a run left: rows, tables of samples, alerts, artifacts, and how W&B is to show it."""

    run: Any = None
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    alerts: list[tuple[str, str, str]] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    content: bytes = b""

    def values(self, name: str) -> list[Any]:
        """The values of one metric, in order."""
        return [row[name] for row in self.history if name in row]


def logged(run_dir: Path) -> list[Logged]:
    """What each offline start of a run left, oldest first."""
    import wandb

    wandb.teardown()  # its process writes the file out a moment after `finish`; this waits for that
    files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    return [_read(file) for file in files]


def _read(file: Path) -> Logged:
    from wandb.proto import wandb_internal_pb2 as pb

    found = Logged(content=file.read_bytes())
    for data in records(found.content):
        record = pb.Record()
        record.ParseFromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                found.run = record.run
            case "history":
                found.history.append(_items(record.history.item))
            case "summary":
                found.summary |= _items(record.summary.update)
            case "metric":
                found.metrics.append(record.metric)
            case "alert":
                found.alerts.append((record.alert.title, record.alert.text, record.alert.level))
            case "artifact":
                found.artifacts.append(record.artifact)
            case "exit":
                found.exit_code = record.exit.exit_code
    return found


def _items(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}

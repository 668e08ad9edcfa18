"""Checkpoints on disk: written whole or not at all, and verified before they are read.

`checkpoints/step_NNNNNN/` holds what the learner wrote (policy and critic as safetensors folders, optimizer
state), `state.json` (counters, data cursor, prompts under way) and `manifest.json` (size and SHA-256 of every
file). It is written under a temporary name and renamed; `checkpoints/latest.json` then points to it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STATE = "state.json"
_POINTER = "latest.json"
_CHUNK = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint is missing or not what its manifest says."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step_{step:06d}"


def begin(checkpoints: Path, step: int) -> Path:
    """An empty temporary folder to write the checkpoint of `step` into."""
    temporary = checkpoints / f".writing_step_{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True, mode=0o700)
    return temporary


def commit(checkpoints: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Finish the checkpoint begun for `step`: state, manifest, rename, pointer; then drop the oldest."""
    temporary = checkpoints / f".writing_step_{step:06d}"
    _write_json(temporary / STATE, state)
    _write_json(temporary / MANIFEST, {"step": step, "files": _file_table(temporary)})
    final = step_folder(checkpoints, step)
    if final.exists():  # the same step again, after a resume from an older one
        shutil.rmtree(final)
    temporary.rename(final)
    pointer = checkpoints / f".{_POINTER}"
    _write_json(pointer, {"step": step, "folder": final.name})
    pointer.replace(checkpoints / _POINTER)
    _sync_folder(checkpoints)
    for old in sorted(checkpoints.glob("step_*"))[:-keep]:
        if old != final:
            shutil.rmtree(old)
    return final


def latest(checkpoints: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with each newer one.

    Raises CheckpointError, naming what is wrong with each, if none verifies.
    """
    problems: list[str] = []
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
        try:
            verify(folder)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return folder, problems
    reasons = "; ".join(problems) or "there is none"
    raise CheckpointError(f"no checkpoint in {checkpoints} can be resumed from: {reasons}")


def verify(folder: Path) -> None:
    """Compare every file with the manifest; raises CheckpointError naming the first that differs."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected: dict[str, dict[str, Any]] = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder.name}: its {MANIFEST} cannot be read ({error})") from None
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    for name in sorted(found ^ expected.keys()):
        raise CheckpointError(f"{folder.name}: {name} is {'unexpected' if name in found else 'missing'}")
    for name, facts in expected.items():
        path = folder / name
        if path.stat().st_size != facts["bytes"]:
            raise CheckpointError(
                f"{folder.name}: {name} has {path.stat().st_size} bytes, not {facts['bytes']}"
            )
        if _sha256(path) != facts["sha256"]:
            raise CheckpointError(f"{folder.name}: the content of {name} is not what was written")


def read_state(folder: Path) -> dict[str, Any]:
    """The state that was passed to `commit`."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def _file_table(folder: Path) -> dict[str, dict[str, Any]]:
    table = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        table[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return table


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A model's folder on every host that needs it: hosts of a cluster need share no file system.

The driver puts the folder's files into the object store in chunks. An actor on another host writes them once
for its host, under the user's cache, in a folder named by the contents' SHA-256; an actor on a host that has
the very folder uses it where it lies.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.weight_files import get_object, host_id, sha256_of

_CHUNK = 64 << 20
_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")  # never pickled weights, and never code
_KEPT_FOLDERS = 8


class ShippingError(RuntimeError):
    """A folder did not arrive as it was sent."""


@dataclass(frozen=True, slots=True)
class ShippedFile:
    """One file, named by its path inside the folder: its chunks' object references, in order."""

    name: str
    size: int
    sha256: str
    chunks: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class ShippedFolder:
    """A folder at `path` on the host with this id, and its files for the others."""

    path: str
    host: str
    files: tuple[ShippedFile, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of names and contents."""
        lines = sorted(f"{file.name}\0{file.sha256}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _put_object(data: Any) -> Any:
    import ray

    return ray.put(data)


def ship(folder: Path, put: Callable[[Any], Any] = _put_object, *, nested: bool = False) -> ShippedFolder:
    """Put a model's files into the object store: configuration, tokenizer, safetensors.

    `nested`: those of its folders too, as the members of an ensemble have. Keep the answer for as long as
    actors may ask for it: it holds the references.
    """
    import numpy as np

    files = []
    for path in sorted(folder.rglob("*") if nested else folder.iterdir()):
        if not path.is_file() or path.suffix not in _SUFFIXES:
            continue
        size = path.stat().st_size
        data = np.memmap(path, dtype=np.uint8, mode="r") if size else np.zeros(0, np.uint8)
        chunks = tuple(put(data[start : start + _CHUNK]) for start in range(0, size, _CHUNK))
        name = path.relative_to(folder).as_posix()
        files.append(ShippedFile(name, size, sha256_of(path), chunks))
    return ShippedFolder(str(folder), host_id(), tuple(files))


def cache_folder() -> Path:
    """Where folders from other hosts are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "headrace" / "models"


def local_folder(
    shipped: ShippedFolder,
    seconds: float,
    *,
    cache: Path | None = None,
    fetch: Callable[[Any, float], memoryview] = get_object,
) -> Path:
    """The folder on this host: the very one, or a copy that is fetched once for the host.

    Raises:
        ShippingError: a file did not arrive whole.
    """
    here = Path(shipped.path)
    if shipped.host == host_id() or _is_same(here, shipped):
        return here
    root = cache or cache_folder()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = root / shipped.digest[:32]
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of the host fetches, the others wait
        if not _is_same(target, shipped):
            _write(shipped, target, seconds, fetch)
            _forget_oldest(root, keep=target)
        os.utime(target)
    return target


def _is_same(folder: Path, shipped: ShippedFolder) -> bool:
    """Whether the folder has the files, each of the right size and contents."""
    paths = [(folder / file.name, file) for file in shipped.files]
    return all(path.is_file() and path.stat().st_size == file.size for path, file in paths) and all(
        sha256_of(path) == file.sha256 for path, file in paths
    )


def _write(
    shipped: ShippedFolder, target: Path, seconds: float, fetch: Callable[[Any, float], memoryview]
) -> None:
    partial = target.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    partial.mkdir(mode=0o700)
    for file in shipped.files:
        path = partial / file.name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("wb") as out:
            for chunk in file.chunks:
                out.write(fetch(chunk, seconds))
        if (found := sha256_of(path)) != file.sha256:
            raise ShippingError(
                f"{shipped.path}: {file.name} arrived with SHA-256 {found[:12]}… instead of "
                f"{file.sha256[:12]}…; was it changed while the run started?"
            )
    partial.replace(target)


def _forget_oldest(root: Path, *, keep: Path) -> None:
    """Keep the folders that were used last."""
    folders = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
    for folder in folders[:-_KEPT_FOLDERS]:
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)

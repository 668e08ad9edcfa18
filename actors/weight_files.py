"""Weight files in a host's shared memory: who owns them, how they are checked, how another host gets them.

A run keeps its files in `/dev/shm/headrace-<user>-<run id>/`, mode 0700. Every process that uses the folder
holds a shared lock on its `.lock` file for as long as it lives, and the kernel drops the lock however the
process ends. So a folder whose lock can be had exclusively belongs to nobody: the last one out removes it,
and the next start removes what a killed run left behind. Locks, unlike process ids, also tell the truth
between containers that share `/dev/shm`.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - this is the point; the folder in it is private (0700)
_PREFIX = "headrace-"
_CHUNK = 1 << 22


class WeightFileError(RuntimeError):
    """A weight file is missing, truncated or corrupt."""


def host_id() -> str:
    """Names this host's shared memory: two processes with equal ids can open each other's files there."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text().strip()[:8] if boot.exists() else "unknown"
    device = SHARED_MEMORY.stat().st_dev if SHARED_MEMORY.exists() else 0
    return f"{socket.gethostname()}:{boot_id}:{device:x}"


class SharedFolder:
    """A run's folder in shared memory, held by a shared lock until `close`."""

    def __init__(self, run_id: str, root: Path = SHARED_MEMORY) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", run_id) or run_id.startswith("."):
            raise ValueError(f"run id {run_id!r}: use 1 to 64 letters, digits, '.', '_' or '-'")
        self.path = root / f"{_PREFIX}{os.getuid()}-{run_id}"
        self._lock = self._hold()

    def _hold(self) -> int:
        while True:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.path.is_symlink() or self.path.stat().st_uid != os.getuid():
                raise PermissionError(f"{self.path} is not a folder of this user; remove it first")
            with contextlib.suppress(FileNotFoundError):  # removed by another's `close` just now: again
                lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(lock, fcntl.LOCK_SH)
                if os.fstat(lock).st_nlink:
                    return lock
                os.close(lock)

    def file(self, version: int) -> Path:
        """Where the weights of a version lie."""
        return self.path / f"v{version:08d}.safetensors"

    def keep_last(self, count: int) -> None:
        """Remove all but the `count` newest versions; an engine that reads one keeps its mapping."""
        for path in sorted(self.path.glob("v*.safetensors"))[:-count]:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def exclusively(self, name: str) -> Iterator[None]:
        """A lock among the processes of this host, for work that one of them does for all."""
        with (self.path / f".{name}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def close(self) -> None:
        """Let go of the folder; the last holder removes it. Safe to call twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
            _remove_if_unheld(self.path)


def _remove_if_unheld(folder: Path) -> bool:
    """Remove a folder that no living process holds."""
    try:
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        # Files first, the lock file last: whoever is waiting for it sees that its link is gone.
        for path in folder.iterdir():
            if path.name != ".lock":
                path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        return True
    finally:
        os.close(lock)


def remove_stale(root: Path = SHARED_MEMORY) -> list[Path]:
    """Remove this user's folders that no process holds any more, such as a killed run's; say which."""
    folders = [path for path in root.glob(f"{_PREFIX}{os.getuid()}-*") if path.is_dir()]
    return [path for path in folders if _remove_if_unheld(path)]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: Path, size: int, sha256: str) -> None:
    """Raise `WeightFileError` unless the file is there, whole and unchanged."""
    if not path.is_file():
        raise WeightFileError(f"{path} is missing")
    if (found := path.stat().st_size) != size:
        raise WeightFileError(f"{path} has {found} bytes instead of {size}: it is truncated or another file")
    if (digest := sha256_of(path)) != sha256:
        raise WeightFileError(f"{path} is corrupt: SHA-256 {digest[:12]}… instead of {sha256[:12]}…")


def get_object(ref: Any, seconds: float) -> memoryview:
    """The bytes behind a Ray object reference."""
    import ray

    return memoryview(ray.get(ref, timeout=seconds)).cast("B")


def local_file(
    payload: Mapping[str, Any],
    version: int,
    open_copies: Callable[[str], SharedFolder],
    seconds: float,
    fetch: Callable[[Any, float], memoryview] = get_object,
) -> Path:
    """The verified weight file on this host: the learner's own, or a copy fetched once for the host.

    Args:
        payload: `run_id, path, bytes, sha256, host, object_ref` of a `WeightUpdate` of backend `shared`.
        version: the update's version.
        open_copies: gives a run's folder for copies on this host; called only where one is needed.
        seconds: deadline of the fetch.
        fetch: reads the object store.
    """
    path, size, sha256 = Path(payload["path"]), int(payload["bytes"]), str(payload["sha256"])
    if payload["host"] == host_id():
        verify(path, size, sha256)
        return path
    refs = payload.get("object_ref")
    if not refs:
        raise WeightFileError(
            f"{path} lies on host {payload['host']}, this is {host_id()}, and no copy was put into the "
            "object store: tell the publisher that some actors are on other hosts"
        )
    own = open_copies(str(payload["run_id"]))
    copy = own.file(version)
    with own.exclusively("fetch"):
        if not copy.exists():
            partial = copy.with_suffix(".part")
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(fetch(refs[0], seconds))
            partial.replace(copy)
            own.keep_last(2)
        try:
            verify(copy, size, sha256)
        except WeightFileError:
            copy.unlink(missing_ok=True)  # so that the next try fetches it again
            raise
    return copy

"""What the sandbox asks of Linux that the standard library has no function for, by ctypes."""

import ctypes
import os

# unshare and mount
NEW_MOUNTS = 0x00020000
NEW_USERS = 0x10000000
NEW_OTHERS = 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # cgroup uts ipc pid network
READ_ONLY, NO_SUID, NO_DEV, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2
# statvfs's flag and mount's: those of a mounted folder must be kept when it is mounted read-only
KEPT_FLAGS = ((2, 2), (4, 4), (8, 8), (1024, 1024), (2048, 2048), (4096, 1 << 21))
# prctl
PARENT_DEATH_SIGNAL, DUMPABLE, SECCOMP, DROP_BOUNDING, NO_NEW_PRIVILEGES, AMBIENT = 1, 4, 22, 24, 38, 47
CAPABILITY_VERSION = 0x20080522


libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError, with what was tried, if a C function failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int, what: str) -> None:
    """Leave namespaces for new ones."""
    check(libc.unshare(flags), f"new {what}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """The system call of that name."""
    arguments = [text.encode() for text in (source, target, kind)]
    check(
        libc.mount(*arguments, ctypes.c_ulong(flags), options.encode()), f"mount {kind or source} on {target}"
    )


def prctl(option: int, *arguments: int) -> int:
    """The system call of that name."""
    padded = (*arguments, 0, 0, 0, 0)[:4]
    return int(libc.prctl(option, *map(ctypes.c_ulong, padded)))

"""Ties the life of an engine's processes to that of the actor that started them.

vLLM hands its configuration, pickled, to each process that it spawns, and unpickles it there before anything
else runs. An `Owner` in it therefore takes hold from the first moment on: also while an engine core still
imports, or waits for an actor that is gone to answer.
"""

import ctypes
import os
import select
import signal
import threading
from typing import Any

KEY = "headrace_owner"
_PR_SET_PDEATHSIG = 1
_tied: set[int] = set()


class Owner(str):
    """The process `pid`: whatever other process unpickles this ends when that one does.

    As text it is always the same, since vLLM looks up what it has compiled by its configuration as JSON.
    """

    pid: int

    def __new__(cls, pid: int) -> "Owner":
        """A mark of the process `pid`."""
        owner = super().__new__(cls, "the actor")
        owner.pid = pid
        return owner

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return _arrive, (self.pid,)


def _arrive(pid: int) -> Owner:
    if pid != os.getpid():
        die_with(pid)
    return Owner(pid)


def die_with(owner: int) -> None:
    """End this process when process `owner` ends, even by SIGKILL, so that no engine is left behind.

    A thread waits on a handle of the owner. A direct child asks the kernel for the signal as well, which
    also ends an engine core that is stopped and can run no thread.
    """
    if owner in _tied:
        return
    _tied.add(owner)
    if os.getppid() == owner:
        die_with_parent()

    def wait() -> None:
        try:
            handle = os.pidfd_open(owner)
        except ProcessLookupError:
            pass
        else:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            while not poll.poll():
                pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="owner-watch", daemon=True).start()


def die_with_parent() -> None:
    """Have the kernel end this process when the thread that made it does, whatever state this is in then."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

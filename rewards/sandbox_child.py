"""The processes of the sandbox. Run by `rewards.sandbox` in an interpreter with the standard library only.

    keeper      makes a root of its own: an empty tmpfs with the standard library bound into it, read-only.
      │         It runs no program, reads no request and keeps nothing of one; it forks for each program a
    supervisor  that reads the request, makes new namespaces, watches the program from outside them, kills
      │         it at the deadline and reports what came out of it. It interprets nothing that came out.
    program     the first process of a new process namespace. It gives up users, capabilities and system
                calls, takes its limits, and only then compiles and runs what the model wrote.

    parent: one JSON line of settings            keeper:     {"ready": true} | {"error": text}
    parent: 4 bytes of length and a JSON request supervisor: one JSON line, `report`'s | {"error": text}

Everything in the program's process is in the program's hands, so nothing there is a verdict: whatever it
sends is data, and what it is compared with never comes here.
"""

from __future__ import annotations

import binascii
import contextlib
import json
import os
import resource
import select
import signal
import sys
import time

from rewards.sandbox_kernel import (
    BIND,
    DETACH,
    KEPT_FLAGS,
    NEW_MOUNTS,
    NEW_OTHERS,
    NEW_USERS,
    NO_DEV,
    NO_EXEC,
    NO_SUID,
    PARENT_DEATH_SIGNAL,
    PRIVATE,
    READ_ONLY,
    RECURSIVE,
    REMOUNT,
    check,
    libc,
    mount,
    prctl,
    unshare,
)
from rewards.sandbox_program import NOBODY, SCRATCH, STATUS_MEMORY, begin

TYPE_CHECKING = False  # as type checkers know it; to import it would cost a tenth of the start
if TYPE_CHECKING:
    from typing import Any, NoReturn

STDIN, STDOUT = 0, 1
CHUNK = 1 << 16


# --- The keeper ------------------------------------------------------------------------------------------


def main() -> None:
    """Make the root, then fork a supervisor for each request until the parent closes the pipe."""
    os.environ.clear()  # the interpreter itself puts a locale there
    setup = json.loads(read_line())
    sys.path.remove(setup["project"])  # what we need of it is imported
    sys.argv.clear()
    try:
        setup["is_root"] = make_root(setup["pivot_root"])
    except OSError as error:
        send({"error": f"{error.strerror} (error {error.errno})"})
        return
    send({"ready": True})
    poll = select.poll()
    poll.register(STDIN, select.POLLIN)
    while True:
        poll.poll()
        supervisor = os.fork()
        if supervisor == 0:
            supervise(setup)
        _, status = os.waitpid(supervisor, 0)
        if status != 0:
            return  # the pipe was closed, or stands in the middle of a request


def make_root(pivot_root: int) -> bool:
    """New mounts, of which only the standard library is left. Whether it was done with root's rights.

    An ordinary user, and a root without them (as in many containers), does it in a user namespace.
    """
    user, group = os.geteuid(), os.getegid()
    is_root = user == 0 and knows_nobody() and libc.unshare(NEW_MOUNTS) == 0
    if not is_root:
        unshare(NEW_USERS | NEW_MOUNTS, "user and mount namespaces")
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            file = os.open(f"/proc/self/{name}", os.O_WRONLY)
            os.write(file, text.encode())
            os.close(file)
    mount("none", "/", "", RECURSIVE | PRIVATE)
    # Opened before the new root hides anything: the library may lie where the root is mounted.
    folders = []
    for place in sys.path:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # the path names a zip file too
            folders.append(os.open(place, os.O_PATH | os.O_DIRECTORY))
    mount("root", SCRATCH, "tmpfs", NO_SUID | NO_DEV, "size=256k,nr_inodes=64,mode=0755")
    sys.path[:] = []
    for number, folder in enumerate(folders):
        inside = f"/python{number}"
        target = SCRATCH + inside
        os.mkdir(target)  # noqa: PTH102 - pathlib takes longer to import than all the rest
        bind_read_only(f"/proc/self/fd/{folder}", target)
        os.close(folder)
        sys.path.append(inside)
        hide_packages(f"{target}/site-packages")
    os.mkdir(SCRATCH * 2)  # noqa: PTH102
    os.chdir(SCRATCH)
    check(libc.syscall(pivot_root, b".", b"."), "pivot_root")
    check(libc.umount2(b".", DETACH), "umount the old root")
    os.chdir("/")
    mount("none", "/", "", REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV)
    sys.path_importer_cache.clear()
    return is_root


def knows_nobody() -> bool:
    """Whether root here can become the user that programs run as: not where only few users are mapped."""
    file = os.open("/proc/self/uid_map", os.O_RDONLY)
    lines = os.read(file, CHUNK).splitlines()
    os.close(file)
    spans = [tuple(map(int, line.split())) for line in lines]
    return any(first <= NOBODY < first + count for first, _, count in spans)


def bind_read_only(source: str, target: str) -> None:
    """Show the folder `source` at `target`, where nothing can be written."""
    mount(source, target, "", BIND)
    there = os.statvfs(target).f_flag
    kept = sum(flag for known, flag in KEPT_FLAGS if there & known)
    mount("none", target, "", REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV | kept)


def hide_packages(folder: str) -> None:
    """Lay an empty folder over what is installed beside the standard library."""
    if os.access(folder, os.F_OK):
        mount("none", folder, "tmpfs", READ_ONLY | NO_SUID | NO_DEV | NO_EXEC, "size=4k,nr_inodes=2")


def read_line() -> bytes:
    """One line of standard input, unbuffered: what follows it is for a supervisor."""
    line = b""
    while not line.endswith(b"\n"):
        line += read_exactly(1)
    return line


def send(message: dict[str, Any]) -> None:
    """One JSON line to the parent, whole."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(STDOUT, data) :]


# --- The supervisor --------------------------------------------------------------------------------------


def supervise(setup: dict[str, Any]) -> NoReturn:
    """Serve one request and exit; 0 only if it was answered whole."""
    status = 1
    try:
        prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        length = int.from_bytes(read_exactly(4), "big")
        request = json.loads(read_exactly(length))
        try:
            answer = run(setup, request)
        except OSError as error:
            answer = {"error": f"{error.strerror} (error {error.errno})"}
        send(answer)
        status = 0
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except BaseException:  # noqa: BLE001 - the end of this process, which nobody above could report
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def read_exactly(length: int) -> bytes:
    """So many bytes of standard input."""
    parts = []
    while length:
        part = os.read(STDIN, min(length, CHUNK))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def run(setup: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Start the program in namespaces of its own and report how it ended."""
    limits = request["limits"]
    unshare(NEW_MOUNTS | NEW_OTHERS, "mount, process, network, ipc, uts and cgroup namespaces")
    options = f"size={limits['disk_bytes']},nr_inodes=256,mode=1777"
    mount("none", SCRATCH, "tmpfs", NO_SUID | NO_DEV | NO_EXEC, options)
    pipes = [os.pipe() for _ in range(4)]  # standard input, output, answers, state of the set-up
    started = time.monotonic()
    program = os.fork()
    if program == 0:
        begin(setup, request, pipes)
    stdin, output, answers, state = pipes
    for one in (*stdin, output[1], answers[1], state[1]):
        os.close(one)
    return Watch(program, started, limits).report(output[0], answers[0], state[0])


class Watch:
    """Looks at a program from outside until it has ended, and ends it when it exceeds what it may."""

    def __init__(self, program: int, started: float, limits: dict[str, Any]) -> None:
        self._program = program
        self._started = started
        self._limits = limits
        self._killed_for: str | None = None

    def _kill(self, reason: str) -> None:
        """End it, and with it every process of its namespace."""
        self._killed_for = self._killed_for or reason
        os.kill(self._program, signal.SIGKILL)  # not reaped yet, so the number is still its own

    def report(self, output: int, answers: int, state: int) -> dict[str, Any]:
        """Read what it writes until it is gone; the rest is thrown away."""
        limits = self._limits
        most = {output: limits["output_bytes"], answers: limits["answer_bytes"], state: CHUNK}
        read = dict.fromkeys(most, b"")
        pid = os.pidfd_open(self._program)
        poll = select.poll()
        for descriptor in (*most, pid):
            poll.register(descriptor, select.POLLIN)
        poll.register(STDIN, 0)  # only to learn that the parent is gone
        ended = False
        while not ended:
            left = self._started + limits["wall_s"] - time.monotonic()
            if left <= 0 and self._killed_for is None:
                self._kill("timeout")
            events = poll.poll(None if self._killed_for else max(1.0, 1000 * left))
            ended = any(descriptor == pid for descriptor, _ in events)  # what it wrote is then all there
            for descriptor, _ in events:
                if descriptor == STDIN:
                    self._kill("parent")
                    poll.unregister(STDIN)
                elif descriptor in most and not self._take(descriptor, read, most[descriptor]):
                    poll.unregister(descriptor)
        for descriptor, limit in most.items():
            while self._take(descriptor, read, limit, alive=False):
                pass
        _, status, usage = os.wait4(self._program, 0)
        return self._summary(read[state], status, usage, read[output], read[answers])

    def _take(self, descriptor: int, read: dict[int, bytes], most: int, *, alive: bool = True) -> bool:
        """Read once; False at the end, or where more came than may."""
        room = most - len(read[descriptor])
        data = os.read(descriptor, min(CHUNK, room + 1))
        read[descriptor] += data[:room]
        if len(data) > room:
            if alive:
                self._kill("output")
            self._killed_for = self._killed_for or "output"
            return False
        return bool(data)

    def _summary(
        self, state: bytes, status: int, usage: resource.struct_rusage, output: bytes, answers: bytes
    ) -> dict[str, Any]:
        if state != b"running":
            said = state.decode("utf-8", "replace") or f"its process ended with status {status}"
            return {"error": f"the program was not started: {said}"}
        code = os.waitstatus_to_exitcode(status)
        cpu_s = usage.ru_utime + usage.ru_stime
        return {
            "reason": self._killed_for or reason_of(code, cpu_s, self._limits["cpu_s"]),
            "status": code,
            "output": binascii.b2a_base64(output, newline=False).decode(),
            "answers": binascii.b2a_base64(answers, newline=False).decode(),
            "cpu_s": cpu_s,
            "wall_s": time.monotonic() - self._started,
        }


def reason_of(code: int, cpu_s: float, limit: int) -> str:
    """A word for how the program ended. A program can choose its end, so this is no verdict."""
    if code == -signal.SIGKILL and cpu_s >= limit - 0.2:
        return "timeout"
    if code < 0:
        return "killed"
    return {0: "ok", STATUS_MEMORY: "memory"}.get(code, "exception")

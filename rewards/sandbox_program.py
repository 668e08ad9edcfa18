"""The last process of the sandbox: gives up its rights, then runs what a model wrote.

Everything in it is in the program's hands from then on, so nothing here is a verdict: what it sends is data.
"""

from __future__ import annotations

import binascii
import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys

from rewards.sandbox_kernel import (
    AMBIENT,
    CAPABILITY_VERSION,
    DROP_BOUNDING,
    DUMPABLE,
    NEW_USERS,
    NO_NEW_PRIVILEGES,
    PARENT_DEATH_SIGNAL,
    SECCOMP,
    check,
    libc,
    prctl,
    unshare,
)

TYPE_CHECKING = False  # as type checkers know it; to import it would cost a tenth of the start
if TYPE_CHECKING:
    from typing import Any, NoReturn

with contextlib.suppress(ImportError):
    import _decimal  # noqa: F401 - on some systems it needs a library that the sandbox cannot see
with contextlib.suppress(ImportError):
    import zlib  # noqa: F401

NOBODY = 65534
SCRATCH = "/tmp"  # noqa: S108 - the program's own folder
STDOUT, ANSWERS, STATE = 1, 3, 4  # its descriptors; the state is told until the program starts
STATUS_EXCEPTION, STATUS_MEMORY = 1, 3


def begin(setup: dict[str, Any], request: dict[str, Any], pipes: list[tuple[int, int]]) -> NoReturn:
    """Give up all rights, then run the program. Nothing of the model's runs if any step fails."""
    status = 1
    try:
        place_descriptors(pipes)
        try:
            give_up_rights(setup, request["limits"])
        except (OSError, ValueError) as error:
            os.write(STATE, str(error).encode())
            os._exit(status)
        os.write(STATE, b"running")
        os.close(STATE)
        status = run_program(request)
    except MemoryError:
        status = STATUS_MEMORY
    finally:
        os._exit(status)


def place_descriptors(pipes: list[tuple[int, int]]) -> None:
    """0 is at its end, 1 and 2 the output, 3 the answers, 4 the state; nothing else stays open."""
    stdin, output, answers, state = pipes
    # Out of the way first: some of these may have the numbers that are to be given.
    wanted = [
        os.dup2(end, 64 + n) for n, end in enumerate((stdin[0], output[1], output[1], answers[1], state[1]))
    ]
    for number, end in enumerate(wanted):
        os.dup2(end, number)
    os.closerange(STATE + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def give_up_rights(setup: dict[str, Any], limits: dict[str, Any]) -> None:
    """Users, capabilities, limits and system calls, in an order in which each step is still allowed."""
    os.setsid()
    os.chdir(SCRATCH)
    name = b"sandbox"
    check(libc.sethostname(name, len(name)), "the host's name")
    if setup["is_root"]:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    # No user is mapped into this one: no setuid, and no further user namespace, can succeed in it.
    unshare(NEW_USERS, "user namespace of the program")
    for limit, wanted in rlimits(limits):
        hard = resource.getrlimit(limit)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(limit, (value, value))
    prctl(AMBIENT, 4)  # clear all
    capability = 0
    while prctl(DROP_BOUNDING, capability) == 0:
        capability += 1
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)()), "drop capabilities")
    check(prctl(NO_NEW_PRIVILEGES, 1), "no new privileges")
    check(prctl(DUMPABLE, 0), "no core dumps")
    check(prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL), "death signal")
    poll = select.poll()
    poll.register(STDOUT, 0)
    if poll.poll(0):
        raise OSError(0, "the supervisor is gone")
    if setup["filter"]:
        install_filter(binascii.a2b_base64(setup["filter"]))


def rlimits(limits: dict[str, Any]) -> list[tuple[int, int]]:
    """The kernel's limits of one process, and of its user namespace."""
    return [
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["disk_bytes"]),
        (resource.RLIMIT_NPROC, limits["threads"]),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_STACK, 8 << 20),
        (resource.RLIMIT_CORE, 1),  # 0 would still start a crash handler of the host's, where there is one
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ]


def install_filter(program: bytes) -> None:
    """Let the kernel refuse every system call that the filter does not name."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    described = Program(len(program) // 8, program)
    mode_filter = 2
    check(prctl(SECCOMP, mode_filter, ctypes.addressof(described)), "the system call filter")


def run_program(request: dict[str, Any]) -> int:
    """Run it, call its function for each input, and write one JSON line for each call."""
    calls = request["calls"]
    # A module that can be found by its name, as dataclasses, pickle and typing look for it.
    module = type(sys)("__main__" if calls is None else "program")
    sys.modules[module.__name__] = module
    names = vars(module)
    names["__builtins__"] = __builtins__
    try:
        exec(compile(request["program"], "<program>", "exec"), names)  # noqa: S102 - what this process is for
        for number, arguments in enumerate(calls or ()):
            write_answer(answer_of(names, request["entry_point"], number, arguments))
    except MemoryError:
        return STATUS_MEMORY
    except SystemExit as exit_:
        return int.__and__(exit_.code, 0xFF) if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException as error:  # noqa: BLE001 - whatever the program raised ends it, and is told
        with contextlib.suppress(BaseException):
            sys.stdout.write(f"{type(error).__name__}: {error}\n")
        return STATUS_EXCEPTION
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
    return 0


def answer_of(names: dict[str, Any], entry_point: str, number: int, arguments: list[Any]) -> str:
    """What the function makes of one input; what it raises, even SystemExit, costs only this call."""
    try:
        value = names[entry_point](*arguments)
        return json.dumps({"call": number, "value": value}, allow_nan=False)
    except BaseException as error:  # noqa: BLE001 - told, not hidden
        return json.dumps({"call": number, "error": type(error).__name__})


def write_answer(line: str) -> None:
    """One line on the descriptor for answers."""
    data = line.encode() + b"\n"
    while data:
        data = data[os.write(ANSWERS, data) :]

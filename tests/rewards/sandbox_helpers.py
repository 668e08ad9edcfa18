"""Hostile programs for the sandbox: how they are written and what is left of them."""

import textwrap
import time

import psutil

from rewards.sandbox import SandboxLimits

LIMITS = SandboxLimits(wall_s=10, cpu_s=2, memory_bytes=128 << 20, disk_bytes=1 << 20, threads=6)

# Says what became of each attempt. An attempt that is mistyped raises something else, and the test fails.
PRELUDE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(action):
    try:
        result = action()
    except (OSError, ValueError) as error:
        print("denied", type(error).__name__)
    else:
        print("ESCAPED", result)
def call(function, *arguments):
    if function(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "refused")
    return "success"
"""


def run(sandbox, text, **names):
    """Run a program, with the values of `names` written into it."""
    known = "\n".join(f"{name} = {value!r}" for name, value in names.items())
    return sandbox.run("\n".join((PRELUDE, known, textwrap.dedent(text))))


def denied(sandbox, text, **names):
    """How many attempts were made, all of them in vain."""
    outcome = run(sandbox, text, **names)
    said = outcome.output.decode()
    assert (outcome.reason, outcome.status) == ("ok", 0), said
    assert "ESCAPED" not in said
    return said.count("denied")


def left_running(sandbox, seconds=5):
    """Processes that this sandbox has beside its keeper, once the kernel had time to end what was killed."""
    deadline = time.monotonic() + seconds
    while (found := _running(sandbox)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _running(sandbox):
    """Processes beside the keeper, wherever they have fled to: they keep its command line."""
    keeper = psutil.Process(sandbox.pid)
    line, since = keeper.cmdline(), keeper.create_time()
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline() == line and process.create_time() > since:
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found

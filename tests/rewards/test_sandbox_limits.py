"""What a program may use up in the sandbox: each limit holds, and nothing is left of what exceeded it."""

import pytest
from sandbox_helpers import LIMITS, left_running, run

pytestmark = pytest.mark.alone


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "sum(range(10**12))",
        "import signal\nsignal.pthread_sigmask(0, range(1, 64))\nfor n in range(1, 65):\n"
        "    if n not in (9, 19, 32, 33): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "import threading\nfor _ in range(3): threading.Thread(target=lambda: sum(range(10**12))).start()",
        "import time\nwhile True: time.sleep(1000)",
        "import os, time\nfor fd in range(4): os.close(fd)\ntime.sleep(1000)",
        "import threading\nlock = threading.Lock(); lock.acquire(); lock.acquire()",
        "import re\nre.match('(a+)+b', 'a' * 60)",
    ],
)
def test_neither_clock_can_be_outrun(quick, program):
    outcome = quick.run(program)
    assert outcome.reason == "timeout"
    assert left_running(quick) == []


@pytest.mark.parametrize(
    ("program", "reasons"),
    [
        ("x = bytearray(1 << 30)", ["memory"]),
        ("x = []\nwhile True: x.append(bytes(1 << 20))", ["memory"]),
        ("x = [0]\nwhile True: x = x + x", ["memory"]),
        ("import mmap\nx = [mmap.mmap(-1, 1 << 20) for _ in range(1000)]", ["exception", "memory"]),
        ("x = 1 << (1 << 34)", ["memory", "exception"]),
        ("import ctypes; ctypes.string_at(0)", ["killed"]),
        ("import os; os.abort()", ["killed"]),
    ],
)
def test_memory_is_limited_and_a_crash_is_only_its_own(sandbox, program, reasons):
    assert sandbox.run(program).reason in reasons
    assert sandbox.run("print(1)").output == b"1\n"


@pytest.mark.parametrize("descriptor", [1, 3])
def test_endless_output_is_cut_and_ended(sandbox, descriptor):
    outcome = sandbox.run(f"import os\nwhile True: os.write({descriptor}, bytes(1 << 16))")
    assert outcome.reason == "output"
    assert len(outcome.output if descriptor == 1 else outcome.answers) == (
        LIMITS.output_bytes if descriptor == 1 else LIMITS.answer_bytes
    )


def test_processes_are_refused_or_few_and_none_outlives_the_program(sandbox):
    text = """
    import time
    made = 0
    try:
        while made < 1000:
            if os.fork() == 0:
                os.setsid()
                try:
                    os.fork()
                except OSError:
                    pass
                for fd in range(4):
                    os.close(fd)
                while True:
                    time.sleep(1000)
            made += 1
    except OSError:
        print("refused after", made)
    """
    outcome = run(sandbox, text)
    assert outcome.reason == "ok"
    assert outcome.output.startswith(b"refused after ")
    assert int(outcome.output.split()[-1]) < LIMITS.threads
    assert left_running(sandbox) == []


def test_threads_work_and_are_few(sandbox):
    text = """
    import threading
    gate, made = threading.Event(), []
    try:
        while len(made) < 100:
            made.append(threading.Thread(target=gate.wait))
            made[-1].start()
    except RuntimeError:
        made.pop()
    gate.set()
    for thread in made: thread.join()
    print(len(made))
    """
    outcome = run(sandbox, text)
    assert outcome.reason == "ok", outcome.output
    assert 1 <= int(outcome.output) < LIMITS.threads

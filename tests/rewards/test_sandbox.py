"""The sandbox itself: what it tells of a program, who may use it, and that nothing of it stays behind."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from rewards.sandbox import PROJECT, SandboxError, SandboxLimits

pytestmark = pytest.mark.alone


def test_ordinary_programs_run(sandbox):
    outcome = sandbox.run(
        "import collections, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq\n"
        "import itertools, json, math, random, re, statistics, string, typing, zlib\n"
        "print(hashlib.sha256(b'a').hexdigest()[:4], decimal.Decimal('0.1') + 1, 'grün')\n"
        "try: input()\n"
        "except EOFError: print('no input')"
    )
    assert outcome.output.decode() == "ca97 1.1 grün\nno input\n"  # the digest begins ca978112…
    assert (outcome.reason, outcome.status, outcome.answers) == ("ok", 0, b"")


@pytest.mark.parametrize(
    ("program", "reason", "status", "output"),
    [
        ("raise SystemExit", "ok", 0, b""),
        ("raise SystemExit(4)", "exception", 4, b""),
        ("raise SystemExit(10**30 + 3)", "memory", 3, b""),  # modulo 256; the word is the program's choice
        ("raise SystemExit('bye')", "exception", 1, b""),
        ("1 / 0", "exception", 1, b"ZeroDivisionError: division by zero\n"),
        ("def f(:", "exception", 1, b"SyntaxError: invalid syntax (<program>, line 1)\n"),
        ("\0", "exception", 1, b"SyntaxError: source code string cannot contain null bytes\n"),
        ("'\ud800'", "exception", 1, b""),
        ("(" * 10_000, "exception", 1, b"SyntaxError: too many nested parentheses (<program>, line 1)\n"),
        ("", "ok", 0, b""),
    ],
)
def test_how_a_program_ended_is_told(sandbox, program, reason, status, output):
    outcome = sandbox.run(program)
    assert (outcome.reason, outcome.status) == (reason, status)
    assert outcome.output.startswith(output)


def test_a_killed_keeper_is_an_error_and_the_next_run_starts_another(quick):
    first = quick.pid
    os.kill(first, signal.SIGKILL)
    with pytest.raises(SandboxError, match="keeper ended when it was to report on a program"):
        quick.run("print(1)")
    assert quick.run("print(1)").output == b"1\n"
    assert quick.pid != first


def test_everything_ends_with_the_process_that_started_it():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from rewards.sandbox import Sandbox, SandboxLimits\n"
        "sandbox = Sandbox(SandboxLimits(wall_s=600)); sandbox.start(); print(sandbox.pid, flush=True)\n"
        "sandbox.run('import time; time.sleep(600)')"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, PROJECT], stdout=subprocess.PIPE, text=True)
    first = parent.stdout.readline()
    if not first:
        pytest.skip("no sandbox on this machine")
    keeper = psutil.Process(int(first))
    family = wait_until(lambda: [keeper, *keeper.children(recursive=True)], lambda found: len(found) == 3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: [one for one in family if one.is_running()], lambda found: not found) == []


def wait_until(look, good):
    """What `look` finds, once it is good; after 20 seconds whatever it is."""
    give_up = time.monotonic() + 20
    while not good(found := look()) and time.monotonic() < give_up:
        time.sleep(0.01)
    return found


def test_an_ordinary_user_can_do_it_too():
    if os.geteuid() != 0:
        pytest.skip("the other tests ran as an ordinary user")
    nobody = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
    if subprocess.run(["test", "-r", f"{PROJECT}/rewards/sandbox.py"], **nobody, check=False).returncode:
        pytest.skip(f"an ordinary user may not read {PROJECT}")
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from rewards.sandbox import Sandbox, SandboxError\n"
        "try:\n"
        "    with Sandbox() as sandbox:\n"
        "        print(os.getuid(), sandbox.run(sys.argv[2]).output.decode())\n"
        "except SandboxError as error: print('no sandbox', error)"
    )
    program = (
        "import os; open('mine', 'w').close()\n"
        "print(os.getpid(), sorted(os.listdir('/')), os.listdir(), dict(os.environ))\n"
        "try: os.fork()\nexcept OSError as e: print(e.errno)"
    )
    for python in (sys.executable, shutil.which("python3.11", path="/usr/bin:/usr/local/bin")):
        try:
            done = subprocess.run(
                [python, "-B", "-c", script, PROJECT, program],
                **nobody,
                text=True,
                capture_output=True,
                check=False,
            )
        except (PermissionError, TypeError):
            continue  # it lies in a folder of root's
        if done.stdout.startswith("no sandbox"):
            pytest.skip(done.stdout)
        assert done.stdout == "65534 1 ['python0', 'python1', 'tmp'] ['mine'] {}\n38\n\n", done.stderr
        return
    pytest.skip("no interpreter that an ordinary user can start")


def test_a_machine_without_namespaces_is_refused_with_the_remedy():
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs the command unshare")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from rewards.sandbox import Sandbox, SandboxError\n"
        "try: Sandbox().run('print(1)')\n"
        "except SandboxError as error: print(error)"
    )
    limit = "/proc/sys/user/max_user_namespaces"
    done = subprocess.run(
        [
            *(
                unshare,
                "--user",
                "--map-root-user",
                "sh",
                "-c",
                f'echo 0 > {limit} || exit 9; exec "$@"',
                "sh",
            ),
            *(sys.executable, "-c", script, PROJECT),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 9 or not done.stdout:
        pytest.skip(f"namespaces cannot be forbidden here: {done.stderr}")
    assert "this machine does not let the sandbox be made: new user and mount namespaces" in done.stdout
    assert "user.max_user_namespaces" in done.stdout


@pytest.mark.parametrize("field", ["wall_s", "cpu_s", "memory_bytes"])
def test_limits_of_nothing_are_refused(field):
    with pytest.raises(ValueError, match=rf"a sandbox's {field} = 0: it must be above 0"):
        SandboxLimits(**{field: 0})

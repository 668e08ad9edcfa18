"""Runs Python that a model wrote where it can do no harm. `docs/sandbox.md` says what is denied, and how.

    with Sandbox() as sandbox:
        outcome = sandbox.run("def f(x): return x + 1", entry_point="f", calls=[[1], [41]])
    outcome.values()  # [2, 42]

A long-lived keeper process (`rewards.sandbox_child`) forks a fresh sandbox for each program, so that starting
one costs milliseconds and one program can neither see nor touch another. A machine that forbids what the
sandbox is made of is an error: nothing is ever run outside it.
"""

import base64
import contextlib
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rewards.sandbox_filter import MACHINES, filter_program

PROJECT = str(Path(__file__).resolve().parents[1])
KEEPER = "import sys; sys.path.append(sys.argv[1]); from rewards.sandbox_child import main; main()"
START_S = 60.0  # a busy machine may take long to start an interpreter
MARGIN_S = 20.0  # after a program's own deadline, for the supervisor to report
MIB = 1 << 20
REMEDY = (
    "allow user namespaces (sysctl user.max_user_namespaces above 0; on older Debian "
    "kernel.unprivileged_userns_clone = 1; on Ubuntu "
    "kernel.apparmor_restrict_unprivileged_userns = 0; in a Docker container --security-opt "
    "seccomp=unconfined --security-opt apparmor=unconfined), or do without rewards that run programs"
)

Reason = Literal["ok", "exception", "timeout", "memory", "output", "killed"]


class SandboxError(Exception):
    """The sandbox could not be made or broke down. Not the program's doing; the message has the remedy."""


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """What one program may use."""

    wall_s: float = 10.0
    cpu_s: int = 2
    memory_bytes: int = 256 * MIB  # address space, of which the interpreter itself takes about 40 MiB
    disk_bytes: int = 4 * MIB
    output_bytes: int = 64 << 10
    answer_bytes: int = 256 << 10
    threads: int = 8
    files: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"a sandbox's {name} = {value}: it must be above 0")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out of a program: data, all of it under the program's control and none of it a verdict.

    `reason` tells how it ended: ok, exception (also another exit status than 0), timeout (of either clock),
    memory, output (more than it may write) or killed (by a signal, such as its own segmentation fault).
    `output` is what it printed, and `answers` one JSON line for each call, both cut at their limits.
    """

    reason: Reason
    status: int
    output: bytes
    answers: bytes
    cpu_s: float
    wall_s: float


class Sandbox:
    """Runs programs one after another. For several threads make several."""

    def __init__(self, limits: SandboxLimits | None = None, *, filter_calls: bool = True) -> None:
        """`filter_calls` is there to test what holds without the filter of system calls; leave it on."""
        self._limits = limits or SandboxLimits()
        self._filter_calls = filter_calls
        self._keeper: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The keeper, if it runs."""
        return self._keeper.pid if self._keeper else None

    def start(self) -> None:
        """Start the keeper and try an empty program, so that a machine that cannot do it says so now."""
        self._start_keeper()
        outcome = self._ask("", "", None)
        if outcome.reason != "ok":
            self.close()
            raise SandboxError(f"an empty program ended with {outcome.reason!r}: {outcome.output!r:.200}")

    def run(
        self, program: str, *, entry_point: str = "", calls: Sequence[Sequence[Any]] | None = None
    ) -> Outcome:
        """Run `program`; then, if there are `calls`, its function `entry_point` with each one's arguments.

        The arguments are what JSON can carry, and so is what the function may answer.
        """
        if self._keeper is None:
            self._start_keeper()
        return self._ask(program, entry_point, calls)

    def close(self) -> None:
        """Kill the keeper and whatever still runs; safe to call twice."""
        keeper, self._keeper, self._unread = self._keeper, None, b""
        if keeper is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(keeper.pid, signal.SIGKILL)  # before it is reaped, so its id cannot be another's
        keeper.wait()
        for pipe in (keeper.stdin, keeper.stdout):
            if pipe is not None:
                pipe.close()

    # --- The keeper --------------------------------------------------------------------------------------

    def _start_keeper(self) -> None:
        machine = MACHINES.get(platform.machine())
        if sys.platform != "linux" or machine is None:
            raise SandboxError(
                f"the sandbox runs on Linux with {' or '.join(MACHINES)}, and this is {sys.platform} with "
                f"{platform.machine()}; run scoring actors on such a host"
            )
        filter_text = base64.b64encode(filter_program(machine)).decode() if self._filter_calls else ""
        setup = {"pivot_root": machine.pivot_root, "filter": filter_text, "project": PROJECT}
        try:
            self._keeper = subprocess.Popen(  # noqa: S603 - our own interpreter and code
                [sys.executable, "-I", "-S", "-X", "utf8", "-c", KEEPER, PROJECT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                cwd="/",
                env={},
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"its process could not be started: {error}") from error
        assert self._keeper.stdin is not None
        os.set_blocking(self._keeper.stdin.fileno(), False)
        self._exchange(json.dumps(setup).encode() + b"\n", START_S, "start")

    def _ask(self, program: str, entry_point: str, calls: Sequence[Sequence[Any]] | None) -> Outcome:
        request = {
            "program": program,
            "entry_point": entry_point,
            "calls": calls,
            "limits": asdict(self._limits),
        }
        data = json.dumps(request).encode()
        answer = self._exchange(
            len(data).to_bytes(4, "big") + data, self._limits.wall_s + MARGIN_S, "report on a program"
        )
        return Outcome(
            reason=answer["reason"],
            status=answer["status"],
            output=base64.b64decode(answer["output"]),
            answers=base64.b64decode(answer["answers"]),
            cpu_s=answer["cpu_s"],
            wall_s=answer["wall_s"],
        )

    def _exchange(self, data: bytes, timeout_s: float, task: str) -> dict[str, Any]:
        """Send and read one line; whatever goes wrong ends the keeper, and is said."""
        deadline = time.monotonic() + timeout_s
        try:
            self._write(data, deadline)
            answer: dict[str, Any] = json.loads(self._read_line(deadline))
        except TimeoutError:
            self.close()
            raise SandboxError(f"the sandbox's keeper did not {task} within {timeout_s:g} s") from None
        except (BrokenPipeError, EOFError):
            self.close()
            raise SandboxError(f"the sandbox's keeper ended when it was to {task}") from None
        if "error" in answer:
            self.close()
            raise SandboxError(f"this machine does not let the sandbox be made: {answer['error']}; {REMEDY}")
        return answer

    def _write(self, data: bytes, deadline: float) -> None:
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        rest = memoryview(data)
        while rest:
            self._wait(self._keeper.stdin.fileno(), select.POLLOUT, deadline)
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(self._keeper.stdin.fileno(), rest) :]

    def _read_line(self, deadline: float) -> bytes:
        assert self._keeper is not None
        assert self._keeper.stdout is not None
        while b"\n" not in self._unread:
            self._wait(self._keeper.stdout.fileno(), select.POLLIN, deadline)
            chunk = os.read(self._keeper.stdout.fileno(), 1 << 16)
            if not chunk:
                raise EOFError
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    @staticmethod
    def _wait(pipe: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            raise TimeoutError

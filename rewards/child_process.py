"""Starts, asks, watches and kills the child process of `rewards.reward_child`.

A call ends in one of three ways: an answer, `ChildError` with the reason (an exception in the child, or
its death and the signal), or `ChildTimeoutError` at the deadline. After a death or a timeout the whole
process group is killed, and the next call starts a fresh child.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.reward_child import without_secrets

SCRIPT = Path(__file__).with_name("reward_child.py")
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
HARMLESS = ("TOKENIZERS_PARALLELISM",)  # named like a secret, and none
# Numerical libraries reserve address space for every thread, which the memory limit counts.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
MAX_REPLY_BYTES = 1 << 20
WATCH_INTERVAL_S = 0.1  # a grandchild may hold the pipe open after the child's death, so look at both


class ChildError(Exception):
    """The child could not answer; the message says why."""


class ChildTimeoutError(ChildError):
    """The child did not answer within its deadline and was killed."""


class ChildProcess:
    """One killable child. `call` is not for several threads at once."""

    def __init__(
        self,
        load: Mapping[str, str],
        *,
        directory: Path,
        memory_bytes: int,
        start_timeout_s: float,
        environment: Sequence[str] = (),
    ) -> None:
        """`environment` names variables that are passed on although they are named like a secret."""
        self._setup = {
            "load": dict(load),
            "memory_bytes": memory_bytes,
            "secrets": list(environment),
            "path": [str(directory), *(entry for entry in sys.path if entry)],
        }
        self._directory = directory
        self._environment = tuple(environment)
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: int | None = None
        self._unread = b""
        self._calls = 0

    @property
    def pid(self) -> int | None:
        """The running child, if there is one."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the child and let it load its function; `ChildError` says why it could not."""
        lifeline, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and script
                [sys.executable, "-P", str(SCRIPT), str(lifeline)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                cwd=self._directory,
                env=child_environment(os.environ, self._environment),
                pass_fds=(lifeline,),
                start_new_session=True,
            )
        except OSError as error:
            self.close()
            raise ChildError(f"its process could not be started: {error}") from error
        finally:
            os.close(lifeline)
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        reply = self._exchange(self._setup, self._start_timeout_s, "load")
        if "error" in reply:
            self.close()
            raise ChildError(self._without_secrets(reply["error"]))

    def call(self, arguments: list[Any], timeout_s: float) -> Any:
        """The child's result for JSON-able `arguments`, within `timeout_s`."""
        if self._process is not None and self._exited() is not None:
            self.close()  # it died while idle: nobody's completion is to blame
        if self._process is None:
            self.start()
        self._calls += 1
        reply = self._exchange({"id": self._calls, "args": arguments}, timeout_s, "answer")
        if reply.get("id") != self._calls:
            self.close()
            raise ChildError(
                "its process answered out of turn (does the function write to file descriptors?)"
            )
        if "error" in reply:
            raise ChildError(self._without_secrets(reply["error"]))
        return reply["result"]

    def _without_secrets(self, text: str) -> str:
        """The text without the values of the variables that were passed on."""
        return without_secrets(text, (os.environ.get(name, "") for name in self._environment))

    def close(self) -> None:
        """Kill the child and everything it started; safe to call twice."""
        process, self._process, self._unread = self._process, None, b""
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # before it is reaped, so its id cannot be another's
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    # --- The pipe ----------------------------------------------------------------------------------------

    def _exchange(self, message: dict[str, Any], timeout_s: float, task: str) -> dict[str, Any]:
        """Send one line and read one; a dead or late child is killed with its group."""
        deadline = time.monotonic() + timeout_s
        try:
            self._write(json.dumps(message).encode() + b"\n", deadline)
            line = self._read_line(deadline)
            reply = json.loads(line)
        except TimeoutError:
            self.close()
            raise ChildTimeoutError(f"it did not {task} within {timeout_s:g} s and was killed") from None
        except (BrokenPipeError, EOFError):
            reason = self._death()
            self.close()
            raise ChildError(reason) from None
        except ValueError as error:
            self.close()
            raise ChildError(f"its process did not answer in the protocol: {error}") from error
        if not isinstance(reply, dict):
            self.close()
            raise ChildError("its process did not answer in the protocol")
        return reply

    def _write(self, data: bytes, deadline: float) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        rest = memoryview(data)
        while rest:
            self._wait(pipe, select.POLLOUT, deadline)
            try:
                rest = rest[os.write(pipe, rest) :]
            except (
                BlockingIOError
            ):  # pragma: no cover - the pipe has room by POLLOUT's account, but not enough
                continue

    def _read_line(self, deadline: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            self._wait(pipe, select.POLLIN, deadline)
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                raise EOFError
            self._unread += chunk
            if len(self._unread) > MAX_REPLY_BYTES:
                raise ValueError(f"an answer of more than {MAX_REPLY_BYTES} bytes")
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def _wait(self, pipe: int, event: int, deadline: float) -> None:
        """Until the pipe is ready; EOFError if the child died meanwhile, TimeoutError at the deadline."""
        poll = select.poll()
        poll.register(pipe, event)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            exited = self._exited() is not None  # asked first, so that a last answer is still read
            if poll.poll(max(1.0, 1000 * min(left, WATCH_INTERVAL_S))):
                return
            if exited:
                raise EOFError

    # --- Death -------------------------------------------------------------------------------------------

    def _exited(self) -> os.waitid_result | None:
        """How the child ended, without reaping it; None while it runs."""
        assert self._process is not None
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def _death(self) -> str:
        """Say how the child ended, once its pipe broke."""
        give_up = time.monotonic() + 1.0
        while (end := self._exited()) is None:
            if time.monotonic() > give_up:
                return "its process closed the pipe to us (does the function close file descriptors?)"
            time.sleep(0.005)
        if end.si_code == os.CLD_EXITED:
            return f"its process ended with exit status {end.si_status} instead of answering"
        name = signal.Signals(end.si_status).name
        hint = " (perhaps by the system for want of memory)" if name == "SIGKILL" else ""
        return f"its process was killed by {name}{hint}"


def child_environment(environment: Mapping[str, str], allowed: Sequence[str] = ()) -> dict[str, str]:
    """What the child may see of our environment: nothing named like a secret, except what is `allowed`."""
    named = (*HARMLESS, *allowed)
    kept = {
        key: value
        for key, value in environment.items()
        if key in named or not any(word in key.upper() for word in SECRET_WORDS)
    }
    return {**ONE_THREAD, **kept}

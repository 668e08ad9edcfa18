"""A thread that does calls one after another, so that whoever asks for them never waits."""

import threading
from collections import deque
from collections.abc import Callable


class Background:
    """Does calls in order in a thread of its own; what fails or finds no room is counted, never raised.

    The thread is a daemon: a call that hangs for ever does not keep the process alive.
    """

    def __init__(self, name: str, room: int) -> None:
        self._room = room
        self._calls: deque[tuple[str, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._errors = 0
        self._first: str | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    @property
    def errors(self) -> int:
        """Calls that raised or found no room, so far."""
        with self._changed:
            return self._errors

    @property
    def waiting(self) -> int:
        """Calls that are not begun."""
        with self._changed:
            return len(self._calls)

    def do(self, what: str, call: Callable[[], None]) -> None:
        """Have `call` done after those before it; returns at once. `what` names it in a message."""
        with self._changed:
            if self._closed or len(self._calls) >= self._room:
                self._count(f"{what}: {self._room} calls are waiting already")
                return
            self._calls.append((what, call))
            self._changed.notify()

    def failed(self, what: str, error: BaseException) -> None:
        """Count a failure that a call has dealt with itself."""
        with self._changed:
            self._count(f"{what}: {type(error).__name__}: {error}")

    def take_first_error(self) -> str | None:
        """What went wrong first: given once, None after that and before."""
        with self._changed:
            first, self._first = self._first, None
            return first or None

    def close(self, what: str, last: Callable[[], None], seconds: float) -> bool:
        """Do what is waiting and then `last`, for at most `seconds`; false if that was not enough."""
        with self._changed:
            self._calls.append((what, last))
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Begin nothing more; what waits is counted as failed."""
        with self._changed:
            self._errors += len(self._calls)
            self._calls.clear()
            self._closed = True
            self._changed.notify()

    def _count(self, text: str) -> None:
        self._errors += 1
        if self._errors == 1:
            self._first = text

    def _serve(self) -> None:
        """Consumes: calls. Waits for: the next. Unblocked by: `do`, `close`, `abandon`."""
        while True:
            with self._changed:
                while not self._calls and not self._closed:
                    self._changed.wait()
                if not self._calls:
                    return
                what, call = self._calls.popleft()
            try:
                call()
            except Exception as error:  # noqa: BLE001 - counted and said by whoever asks
                self.failed(what, error)

"""How a run is told to stop: Ctrl-C, SIGTERM, or the terminal's end."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at each of the signals, for a block of code inside the running event loop.

    A lost terminal stays ignored where the process was started so (`nohup`). SIGINT does not: shells start
    what is to run in the background with SIGINT ignored, and whoever sends it there all the same means it.
    """
    loop = asyncio.get_running_loop()
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = [number for number in _SIGNALS if not (number == signal.SIGHUP and ignored)]
    for number in heard:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in heard:
            loop.remove_signal_handler(number)

"""Waiting with a deadline that says for whom. Standard library only."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")


class DeadlineExceeded(RuntimeError):  # noqa: N818 - reads better where it is raised and caught
    """A wait ran past its deadline; the message names whom it waited for, what for, and how long."""


def _forget(task: "asyncio.Future[Any]") -> None:
    """Take an abandoned task's exception, which would otherwise be logged as never retrieved."""
    if not task.cancelled():
        task.exception()


def abandon(task: "asyncio.Future[Any]") -> None:
    """Cancel a task without waiting for it: its clean-up may hang on the very thing that was too late."""
    task.cancel()
    task.add_done_callback(_forget)


async def within(awaitable: Awaitable[T], seconds: float, whom: str, what: str) -> T:
    """The awaitable's result, or `DeadlineExceeded` once `seconds` have passed.

    Unlike `asyncio.timeout` it never waits for the cancelled task to finish its clean-up, so it returns in
    time even when that clean-up hangs.

    Args:
        awaitable: a coroutine, a future or a Ray object reference.
        seconds: the deadline, from now.
        whom: the peer, e.g. `rollout actor rollout-1`.
        what: what it owes, e.g. `group 17 of 8 samples`.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        abandon(task)
        raise
    if not done:
        abandon(task)
        raise DeadlineExceeded(f"waited {seconds:g} s for {whom}: {what}")
    return task.result()

"""Deadlines name whom was waited for, and hold even when the late party can't be cancelled."""

import asyncio
import time

import pytest

from actors.waits import DeadlineExceeded, within


def test_gives_the_result_in_time() -> None:
    async def answer() -> int:
        await asyncio.sleep(0)
        return 7

    assert asyncio.run(within(answer(), 5, "rollout actor a", "a number")) == 7


def test_names_whom_what_and_how_long() -> None:
    async def work() -> None:
        await within(asyncio.Event().wait(), 0.05, "rollout actor a", "group 3")

    with pytest.raises(DeadlineExceeded, match=r"waited 0\.05 s for rollout actor a: group 3"):
        asyncio.run(work())


def test_does_not_wait_for_a_clean_up_that_hangs() -> None:
    released = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await released.wait()

    async def work() -> bool:
        with pytest.raises(DeadlineExceeded):
            await within(stubborn(), 0.05, "a", "b")
        still_waiting = not released.is_set()
        released.set()
        return still_waiting

    assert asyncio.run(asyncio.wait_for(work(), 10))


def test_passes_on_the_awaited_errors_even_a_timeout_of_its_own() -> None:
    async def fail() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        asyncio.run(within(fail(), 5, "a", "b"))


def test_cancelling_the_waiter_cancels_the_work() -> None:
    cancelled = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(time.monotonic())
            raise

    async def main() -> None:
        waiter = asyncio.create_task(within(work(), 30, "a", "b"))
        await asyncio.sleep(0.01)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert len(cancelled) == 1

"""Loops that serve a block of code: pools that watch their actors, queues that are worked off."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any


@contextlib.asynccontextmanager
async def serving(*services: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run services beside a block of code; the failure of one ends the block."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(service) for service in services]
        yield
        for service in running:
            service.cancel()

"""The learner's ranks as one: each call goes to all of them, since their collectives must match."""

import asyncio
from collections.abc import Sequence
from typing import Any

from cluster.remote import Remote
from learner.settings import LearnerSettings


class LearnerGroup:
    """All data-parallel ranks of the learner; rank 0 answers for them."""

    def __init__(self, ranks: Sequence[Remote], settings: LearnerSettings) -> None:
        self._ranks = ranks
        self._settings = settings

    async def _all(self, method: str, *args: Any, seconds: float | None = None) -> Any:
        """Call every rank at once and give rank 0's answer."""
        deadline = self._settings.step_timeout_s if seconds is None else seconds
        answers = await asyncio.gather(*(r.call(method, *args, seconds=deadline) for r in self._ranks))
        return answers[0]

"""Calls to Ray actors that cannot hang: each has a deadline, and a failure names the actor and the call."""

from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.engine import EngineDied
from actors.waits import within


class WorkerLostError(RuntimeError):
    """An actor's process, its engine or its host is gone."""


class LossError(RuntimeError):
    """An actor is lost and the run can't go on without it."""


class WorkerFailedError(RuntimeError):
    """An actor raised; the message holds the actor, the call and the actor's own error."""


class Remote:
    """A named Ray actor; `place` is its number among those of its role, which a successor takes over."""

    def __init__(self, name: str, handle: Any, place: int = 0) -> None:
        self.name = name
        self.handle = handle
        self.place = place

    async def call(self, method: str, *args: Any, seconds: float) -> Any:
        """Await `method(*args)` on the actor.

        Raises DeadlineExceeded after `seconds`, WorkerLostError if the process or its engine died, and
        WorkerFailedError with the actor's own message if the call raised.
        """
        reference = getattr(self.handle, method).remote(*args)
        try:
            return await within(_result(reference), seconds, self.name, method)
        except RayActorError as error:
            raise WorkerLostError(f"{self.name} died while it was asked to {method}: {error}") from error
        except RayTaskError as error:
            cause = error.cause if error.cause is not None else error
            kind = WorkerLostError if isinstance(cause, EngineDied) else WorkerFailedError
            raise kind(f"{self.name} failed to {method}: {type(cause).__name__}: {cause}") from error

    def kill(self) -> None:
        """End the process at once, whatever it is doing."""
        ray.kill(self.handle, no_restart=True)


async def _result(reference: Any) -> Any:
    return await reference

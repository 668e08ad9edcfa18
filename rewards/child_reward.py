"""What rewards that run in a killable child have in common: deadlines, and what a hang costs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.base import RewardError, RewardRequest, Score
from rewards.child_process import ChildError, ChildProcess, ChildTimeoutError

NOT_RUN = "not run, because it hung or died on another completion of the same group"


@dataclass(frozen=True, slots=True)
class ChildLimits:
    """Deadlines for one completion and for starting, the process's address space, and what it may know.

    `environment` names variables that the child sees although they are named like a secret.
    """

    timeout_s: float
    memory_bytes: int
    start_timeout_s: float
    environment: tuple[str, ...] = ()


class ChildReward(ABC):
    """One child serves one reward, one completion after another.

    What raises costs only its own completion. What hangs or dies is killed with all it started; the rest of
    the call is then not run (see `rewards.base.Reward`), and the next call gets a fresh child.
    """

    def __init__(self, label: str, load: Mapping[str, str], *, directory: Path, limits: ChildLimits) -> None:
        self.label = label
        self._limits = limits
        self._child = ChildProcess(
            load,
            directory=directory,
            memory_bytes=limits.memory_bytes,
            start_timeout_s=limits.start_timeout_s,
            environment=limits.environment,
        )

    @abstractmethod
    def score_one(self, request: RewardRequest) -> Score:
        """Score one completion by `ask`ing the child; ValueError means that the row cannot be graded."""

    def start(self) -> None:
        """Start the child now rather than at the first completion; `ChildError` if it cannot."""
        self._child.start()

    def ask(self, arguments: list[Any]) -> Any:
        """What the child answers within the deadline."""
        return self._child.call(arguments, self._limits.timeout_s)

    def score(self, requests: Sequence[RewardRequest]) -> list[Score | RewardError]:
        """One answer for each request."""
        results: list[Score | RewardError] = []
        for request in requests:
            try:
                results.append(self.score_one(request))
            except ChildError as error:
                late = " (scoring.reward_timeout_s)" if isinstance(error, ChildTimeoutError) else ""
                results.append(RewardError(self.label, f"{error}{late}"))
                if self._child.pid is None:  # hung, dead or not to be started
                    rest = len(requests) - len(results)
                    return results + [RewardError(self.label, NOT_RUN) for _ in range(rest)]
            except ValueError as error:
                results.append(RewardError(self.label, str(error)))
        return results

    def close(self) -> None:
        """Kill the child."""
        self._child.close()

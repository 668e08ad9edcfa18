"""Dynamic sampling: a group whose samples all have the same reward is not trained on, another one is.

Where the rewards of a group are equal, r_i − mean(r) = 0 for each of its samples: a learner that compares the
samples of a group learns nothing from it (Yu et al., "DAPO", arXiv 2503.14476, section 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from actors.records import Group
from actors.settings import RolloutSettings


class NothingToLearnError(RuntimeError):
    """Group after group has one reward for all its samples."""


def all_equal(rewards: Sequence[float]) -> bool:
    """Whether there is only one value, exactly."""
    return len(set(rewards)) == 1


@dataclass(slots=True)
class DynamicSampling:
    """Judges every scored group; what it counts is of this process, the run's totals are elsewhere."""

    settings: RolloutSettings
    left_out_in_a_row: int = 0
    _kept: int = 0
    _left_out: int = 0

    def keeps(self, group: Group) -> bool:
        """Whether to train on a group. NothingToLearnError after `rollout.dynamic_limit` others in a row."""
        if not self.settings.dynamic_sampling:
            return True
        rewards = [trajectory.reward for trajectory in group.trajectories]
        if not all_equal(rewards):
            self.left_out_in_a_row = 0
            self._kept += 1
            return True
        self.left_out_in_a_row += 1
        self._left_out += 1
        if self.left_out_in_a_row >= self.settings.dynamic_limit:
            raise NothingToLearnError(
                f"the last {self.left_out_in_a_row} groups each had one reward for all their samples, which "
                f"reaches rollout.dynamic_limit = {self.settings.dynamic_limit}; the last one, prompt "
                f"{group.prompt.id}: {rewards[0]:g} for each of {len(rewards)} samples. Nothing is left to "
                "learn from: choose easier or harder prompts, a reward with more levels, or a larger "
                "rollout.group_size"
            )
        return False

    def metrics(self, left_out_so_far: int) -> dict[str, float]:
        """For a step's row: the run's count, and the share that was kept since the last row."""
        if not self.settings.dynamic_sampling:
            return {}
        row: dict[str, float] = {"dynamic/groups_left_out": left_out_so_far}
        if judged := self._kept + self._left_out:
            row["dynamic/kept_fraction"] = self._kept / judged
        self._kept = self._left_out = 0
        return row

"""Which reward of a run plays which part: what is optimised, what stands by, and what is the truth."""

from collections.abc import Sequence
from dataclasses import dataclass

from rewards.settings import RewardSettings

GOLD = "gold"


@dataclass(frozen=True, slots=True)
class Roles:
    """Labels of rewards.

    `evaluated`: all of role `evaluate`. `gold`: the one of them that is of kind `task` or named `gold`; "" if
    there is none. `heldout`: the reward models among the others, or, without any, the first of the others;
    their mean is what stop rules look at, which never see the gold reward. `models`: reward models that are
    trained on.
    """

    evaluated: tuple[str, ...]
    gold: str
    heldout: tuple[str, ...]
    models: tuple[str, ...]


def roles_of(rewards: Sequence[RewardSettings]) -> Roles:
    """The parts that these rewards play."""
    evaluated = [one for one in rewards if one.role == "evaluate"]
    gold = next((one.label for one in evaluated if one.kind == "task" or one.label == GOLD), "")
    others = [one for one in evaluated if one.label != gold]
    models = [one.label for one in others if one.kind == "model"]
    return Roles(
        evaluated=tuple(one.label for one in evaluated),
        gold=gold,
        heldout=tuple(models or [one.label for one in others[:1]]),
        models=tuple(one.label for one in rewards if one.kind == "model" and one.role == "train"),
    )

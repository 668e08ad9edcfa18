"""Rules over several settings that jobs of every objective share, and how a broken one is told."""

from collections.abc import Iterable
from typing import NamedTuple

from cluster.scratch import check_shape
from learner.reward_settings import BackboneSettings
from learner.settings import LearnerSettings, ModelSettings


class Rule(NamedTuple):
    """One rule over several settings: where it is broken, what to say of which field."""

    broken: bool
    field: str
    value: object
    remedy: str


class ContradictionError(ValueError):
    """Two settings that cannot both hold; carries the field's full name and its value."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field} = {value!r} {remedy}")
        self.field = field


def enforce(rules: Iterable[Rule], model: ModelSettings | BackboneSettings) -> None:
    """ContradictionError for the first rule that is broken; ValueError for a shape that no model can have."""
    for rule in rules:
        if rule.broken:
            raise ContradictionError(rule.field, rule.value, rule.remedy)
    if model.scratch is not None:
        check_shape(model.scratch)


def model_rules(model: ModelSettings | BackboneSettings) -> list[Rule]:
    """A model comes from a folder or hub name, or from scratch, and each has settings of its own."""
    scratch = model.scratch
    return [
        Rule(
            bool(model.path) == (scratch is not None),
            "model.path",
            model.path,
            "give exactly one of model.path (a folder or hub name) and the table [model.scratch]",
        ),
        Rule(
            model.revision is not None and scratch is not None,
            "model.revision",
            model.revision,
            "is given, but [model.scratch] downloads nothing; leave it out",
        ),
        Rule(
            scratch is not None and (model.max_length or 0) > scratch.max_length,
            "model.max_length",
            model.max_length,
            "is beyond model.scratch.max_length; lower it or leave it out",
        ),
    ]


def learner_rules(learner: LearnerSettings) -> list[Rule]:
    """What the parts of `[learner]` need of each other."""
    return [
        Rule(
            learner.cpu_offload and learner.zero_stage < 2,
            "learner.cpu_offload",
            True,
            f"needs learner.zero_stage 2 or 3, not {learner.zero_stage}",
        )
    ]

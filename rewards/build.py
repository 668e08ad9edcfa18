"""Builds the reward of a run from its settings, and refuses what cannot work before anything is sampled.

request ─▶ each [[reward]] in turn ─▶ Σ weight · value, with every raw value as a component
                └─ an error in any of them ─▶ RewardError; the later ones are not asked
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.base import Reward, RewardError, RewardRequest, Score
from rewards.child_reward import ChildLimits
from rewards.code_reward import CodeReward, CodeSettings
from rewards.code_tests import ENTRY_COLUMN, cases_of, entry_point_of
from rewards.graders import ExactReward, NumericReward, RegexReward, TaskReward, answer_number, answer_text
from rewards.sandbox import MIB, SandboxLimits
from rewards.settings import RewardSettings, TaskSettings
from rewards.tasks.programs import CODE, ProgramsTask
from rewards.tasks.registry import get_task
from rewards.user_function import FunctionReward, parse_target

GIB = 1 << 30
START_TIMEOUT_S = 120.0  # a user's module may import a large library
RESERVED_LABELS = ("missing_eos_penalty",)
# The field that a kind cannot do without, and that no other kind reads.
OWN_FIELD = {"regex": "pattern", "function": "function"}
CODE_FIELDS = ("tests_column", "entry_point", "all_or_nothing", "cpu_seconds", "memory_mib")


class CombinedReward:
    """The weighted sum of several rewards. Its components are `{label: raw value}` and `label/key` extras."""

    label = "reward"

    def __init__(self, parts: Sequence[tuple[float, Reward]]) -> None:
        self._parts = list(parts)

    def score(self, requests: Sequence[RewardRequest]) -> list[Score | RewardError]:
        """One answer for each request: a finite total, or the first reward's error."""
        totals = [0.0] * len(requests)
        components: list[dict[str, float]] = [{} for _ in requests]
        errors: dict[int, RewardError] = {}
        for weight, reward in self._parts:
            places = [i for i in range(len(requests)) if i not in errors]
            answers = reward.score([requests[i] for i in places])
            for i, answer in zip(places, answers, strict=True):
                if isinstance(answer, RewardError):
                    errors[i] = answer
                    continue
                totals[i] += weight * answer.value
                components[i][reward.label] = answer.value
                components[i].update({f"{reward.label}/{k}": v for k, v in answer.components.items()})
        return [errors.get(i) or self._total(totals[i], components[i]) for i in range(len(requests))]

    def _total(self, total: float, components: dict[str, float]) -> Score | RewardError:
        if not math.isfinite(total):
            return RewardError(self.label, f"the weighted sum of {components} is {total}")
        return Score(total, components)

    def close(self) -> None:
        """Close every reward."""
        for _, reward in self._parts:
            reward.close()


def build_reward(
    settings: Sequence[RewardSettings],
    task: TaskSettings | None,
    *,
    timeout_s: float,
    memory_gib: float,
    directory: Path | None = None,
    environment: Sequence[str] = (),
) -> CombinedReward:
    """Build all `[[reward]]` tables; ValueError if one cannot work.

    `timeout_s` is the deadline for one completion and `memory_gib` the address space of a child process;
    `environment` names the variables that a child sees although they are named like a secret.
    Files and modules of the user's are looked for in `directory`, the current one if not given.
    """
    directory = (directory or Path.cwd()).resolve()
    check_rewards(settings, task, directory=directory)
    for name in environment:
        if name not in os.environ:
            raise ValueError(
                f"scoring.reward_env names {name!r}, which is not set in the environment; set it before the "
                "start, or take the name out"
            )
    limits = ChildLimits(timeout_s, int(memory_gib * GIB), START_TIMEOUT_S, tuple(environment))
    parts: list[tuple[float, Reward]] = []
    try:
        for one in settings:
            parts.append((one.weight, _build_one(one, task, directory, limits)))
    except BaseException:
        CombinedReward(parts).close()
        raise
    return CombinedReward(parts)


def check_rewards(
    settings: Sequence[RewardSettings], task: TaskSettings | None, *, directory: Path | None = None
) -> None:
    """Refuse settings that contradict themselves, without running anything of the user's."""
    if not settings:
        raise ValueError('reward: there is none; add a [[reward]] table, such as kind = "exact"')
    labels: set[str] = set()
    for one in settings:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", one.label) or one.label in RESERVED_LABELS:
            raise ValueError(
                f"reward.name = {one.label!r}: it names a metric; use letters, digits, '_', '-' and '.', "
                f"and none of {', '.join(RESERVED_LABELS)}"
            )
        if one.label in labels:
            raise ValueError(f"reward.name = {one.label!r} is used twice; give each [[reward]] its own name")
        labels.add(one.label)
        _check_one(one, task, (directory or Path.cwd()).resolve())


def required_columns(settings: Sequence[RewardSettings]) -> set[str]:
    """The columns that every data row must have for these rewards to be able to grade it."""
    columns = {one.answer_column for one in settings if _needs_answer(one)}
    for one in settings:
        if one.kind == "code":
            columns |= {one.tests_column} if one.entry_point else {one.tests_column, ENTRY_COLUMN}
    return columns


def check_row(settings: Sequence[RewardSettings], row: Mapping[str, Any]) -> None:
    """Raise ValueError for a row that no completion could score on, by the graders' own rules."""
    for one in settings:
        if one.kind == "numeric":
            answer_number(row, one.answer_column)
        elif _needs_answer(one):
            answer_text(row, one.answer_column)
        elif one.kind == "code":
            cases_of(row, one.tests_column)
            entry_point_of(row, one.entry_point)


def uses_child(one: RewardSettings) -> bool:
    """Whether a child process scores completions, one after another, each within the deadline."""
    return one.kind in ("function", "regex", "code")


def _needs_answer(one: RewardSettings) -> bool:
    return one.kind in ("exact", "numeric") or (one.kind == "regex" and _has_group(one.pattern))


def _check_one(one: RewardSettings, task: TaskSettings | None, directory: Path) -> None:
    for kind, field in OWN_FIELD.items():
        value = getattr(one, field)
        if one.kind == kind and not value:
            raise ValueError(f'reward.{field} of {one.label!r} is missing; kind = "{kind}" needs it')
        if one.kind != kind and value:
            raise ValueError(
                f"reward.{field} = {value!r} of {one.label!r} has no effect with kind = {one.kind!r}; "
                f'leave it out, or set kind = "{kind}"'
            )
    if one.kind != "code":
        _refuse_code_fields(one)
    if one.kind == "regex":
        _has_group(one.pattern)
    elif one.kind == "code" and one.entry_point and not one.entry_point.isidentifier():
        raise ValueError(
            f"reward.entry_point = {one.entry_point!r} of {one.label!r} is no name of a function; "
            "correct it, or leave it out to take it from each row"
        )
    elif one.kind == "function":
        parse_target(one.function, directory)
    elif one.kind == "task" and task is None:
        raise ValueError(
            f'reward.kind = "task" of {one.label!r} is the gold reward of a generated task, and there is no '
            "[task] table; add one, or choose another kind"
        )


def _refuse_code_fields(one: RewardSettings) -> None:
    """ValueError for a field that only kind = "code" reads."""
    for field in CODE_FIELDS:
        value = getattr(one, field)
        if value != RewardSettings.model_fields[field].default:
            raise ValueError(
                f"reward.{field} = {value!r} of {one.label!r} has no effect with kind = {one.kind!r}; "
                'leave it out, or set kind = "code"'
            )


def _has_group(pattern: str) -> bool:
    """Whether the pattern captures something; ValueError if it is no regular expression."""
    try:
        return re.compile(pattern).groups > 0
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"reward.pattern = {pattern!r} is not a regular expression: {error}; correct it "
            "(in TOML, single quotes keep backslashes)"
        ) from error


def _build_one(
    one: RewardSettings, task: TaskSettings | None, directory: Path, limits: ChildLimits
) -> Reward:
    if one.kind == "exact":
        return ExactReward(one.label, column=one.answer_column, ignore_case=one.ignore_case)
    if one.kind == "numeric":
        return NumericReward(one.label, column=one.answer_column, tolerance=one.tolerance)
    if one.kind == "regex":
        has_group = _has_group(one.pattern)
        return RegexReward(
            one.label, pattern=one.pattern, has_group=has_group, column=one.answer_column, limits=limits
        )
    if one.kind == "function":
        return FunctionReward(one.label, one.function, directory=directory, limits=limits)
    if one.kind == "code":
        settings = CodeSettings(one.tests_column, one.entry_point, one.all_or_nothing)
        memory = one.memory_mib * MIB
        return CodeReward(one.label, settings, SandboxLimits(limits.timeout_s, one.cpu_seconds, memory))
    assert task is not None
    return _task_reward(one, task, limits)


def _task_reward(one: RewardSettings, task: TaskSettings, limits: ChildLimits) -> Reward:
    if isinstance(get_task(task.kind), ProgramsTask):  # its gold reward, with one sandbox for all rows
        return CodeReward(one.label, CODE, SandboxLimits(wall_s=limits.timeout_s))
    return TaskReward(one.label, get_task(task.kind))

"""Builds the reward of a run from its settings, and refuses what cannot work before anything is sampled."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.base import Reward
from rewards.child_reward import ChildLimits
from rewards.code_reward import CodeReward, CodeSettings
from rewards.code_tests import ENTRY_COLUMN, cases_of, entry_point_of
from rewards.combined import CombinedReward, Part
from rewards.discriminator_settings import check_discriminators
from rewards.graders import ExactReward, NumericReward, RegexReward, TaskReward, answer_number, answer_text
from rewards.log_ratio import LogRatioReward
from rewards.model_reward import ModelPlace, ModelReward, model_folder, refuse_shared_labels
from rewards.sandbox import MIB, SandboxLimits
from rewards.settings import RewardSettings, TaskSettings
from rewards.tasks.programs import CODE, ProgramsTask
from rewards.tasks.registry import get_task
from rewards.user_function import FunctionReward, parse_target

if TYPE_CHECKING:
    from rewards.models.discriminator import DiscriminatorReward

GIB = 1 << 30
START_TIMEOUT_S = 120.0  # a user's module may import a large library
# Names that a step logs as `reward/NAME` itself.
RESERVED_LABELS = ("missing_eos_penalty", "mean", "std", "min", "max")
# Names that an evaluation logs as `heldout/NAME` itself.
HELDOUT_NAMES = (
    *("reward", "reward_errors", "kl_sequence", "kl_sequence_k3", "response_tokens", "entropy"),
    *("finished_fraction", "pass_at"),
)
# Fields that some kinds cannot do without, and that no other kind reads.
OWN_FIELDS = {
    "pattern": ("regex",),
    "function": ("function",),
    "path": ("model", "log_ratio"),
    "initial": ("log_ratio",),
}
CODE_FIELDS = ("tests_column", "entry_point", "all_or_nothing", "cpu_seconds", "memory_mib")


def build_reward(
    settings: Sequence[RewardSettings],
    task: TaskSettings | None,
    *,
    timeout_s: float,
    memory_gib: float,
    directory: Path | None = None,
    environment: Sequence[str] = (),
    models: ModelPlace | None = None,
) -> CombinedReward:
    """Build all `[[reward]]` tables; ValueError if one cannot work.

    `timeout_s` is the deadline for one completion and `memory_gib` the address space of a child process;
    `environment` names the variables that a child sees although they are named like a secret.
    Files, modules and models of the user's are looked for in `directory`, the current one if not given.
    `models` says where reward models compute; without it their folders are checked and not loaded, and
    they cannot score.
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
    found: dict[str, ModelReward | LogRatioReward | DiscriminatorReward] = {
        **_build_models(settings, directory, models),
        **_build_log_ratios(settings, directory, models),
        **_build_discriminators(settings, models),
    }
    parts: list[Part] = []
    try:
        for one in settings:
            model = found.get(one.label)
            reward = model or _build_one(one, task, directory, limits)
            parts.append(Part(one.weight, reward, one.role == "evaluate", together=model is not None))
    except BaseException:
        CombinedReward(parts).close()
        raise
    return CombinedReward(parts)


def _build_models(
    settings: Sequence[RewardSettings], directory: Path, place: ModelPlace | None
) -> dict[str, ModelReward]:
    """The reward models by label, loaded if a place is given; ValueError if one cannot serve in its role."""
    tables = [one for one in settings if one.kind == "model"]
    found = {
        one.label: ModelReward(one.label, model_folder(one.path, directory), check_version=place is None)
        for one in tables
    }
    refuse_shared_labels(
        [found[one.label] for one in tables if one.role == "train"],
        [found[one.label] for one in tables if one.role == "evaluate"],
    )
    if place is not None:
        for model in found.values():
            model.load(place)
    return found


def _build_log_ratios(
    settings: Sequence[RewardSettings], directory: Path, place: ModelPlace | None
) -> dict[str, LogRatioReward]:
    """The log-ratios by label, loaded if a place is given; ValueError if one cannot serve."""
    found = {}
    for one in (one for one in settings if one.kind == "log_ratio"):
        folders = (model_folder(path, directory) for path in (one.path, one.initial))
        found[one.label] = LogRatioReward(one.label, *folders, per_token=one.per_token)
        if place is not None:
            found[one.label].load(place)
    return found


def _build_discriminators(
    settings: Sequence[RewardSettings], place: ModelPlace | None
) -> "dict[str, DiscriminatorReward]":
    """The discriminators by label; their weights come while the run goes on."""
    tables = [one for one in settings if one.kind == "discriminator"]
    if not tables:
        return {}
    from rewards.models.discriminator import DiscriminatorReward

    return {one.label: DiscriminatorReward(one.label, one.form, one.logit_limit, place) for one in tables}


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
        _check_role(one)
        _check_one(one, task, (directory or Path.cwd()).resolve())
    check_discriminators(settings)
    if all(one.role == "evaluate" for one in settings):
        raise ValueError(
            'reward.role = "evaluate" in every [[reward]]: nothing would be trained on; set one to "train"'
        )


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


def uses_child(one: RewardSettings, task: TaskSettings | None = None) -> bool:
    """Whether a child process scores completions, one after another, each within the deadline."""
    runs_code = one.kind == "task" and task is not None and task.kind == "programs"
    return runs_code or one.kind in ("function", "regex", "code")


def _needs_answer(one: RewardSettings) -> bool:
    return one.kind in ("exact", "numeric") or (one.kind == "regex" and _has_group(one.pattern))


def _check_role(one: RewardSettings) -> None:
    if one.role == "train":
        return
    if one.weight != RewardSettings.model_fields["weight"].default:
        raise ValueError(
            f'reward.weight = {one.weight:g} of {one.label!r} has no effect with role = "evaluate", which is '
            'no part of the sum; leave it out, or set role = "train"'
        )
    if one.label in HELDOUT_NAMES or one.label.endswith("_ci95"):
        raise ValueError(
            f'reward.name = {one.label!r}: with role = "evaluate" it is logged as heldout/{one.label}, which '
            "is another metric; give it another name"
        )


def _check_one(one: RewardSettings, task: TaskSettings | None, directory: Path) -> None:
    for field, kinds in OWN_FIELDS.items():
        value = getattr(one, field)
        if one.kind in kinds and not value:
            raise ValueError(f'reward.{field} of {one.label!r} is missing; kind = "{one.kind}" needs it')
        if one.kind not in kinds and value:
            raise ValueError(
                f"reward.{field} = {value!r} of {one.label!r} has no effect with kind = {one.kind!r}; "
                f'leave it out, or set kind = "{kinds[0]}"'
            )
    if one.per_token and one.kind != "log_ratio":
        raise ValueError(
            f"reward.per_token = true of {one.label!r} has no effect with kind = {one.kind!r}; leave it out, "
            'or set kind = "log_ratio"'
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

"""From the command line, and a job's file where one is given, to what samples and what judges.

options + FILE.toml + --set ─► tables ─┬─► JobConfig: its sampling side alone is used
                                       ├─► Judges: rewards, task, scoring
                                       └─► Strategy: what is made of samples and rewards
"""

import argparse
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field

from actors.decoding.settings import Guidance
from actors.settings import ScoringSettings
from cluster.config import JobConfig
from cluster.config_file import apply_override, parse_config, validated
from cluster.generation.policy import policy_folder
from rewards.build import check_rewards
from rewards.settings import RewardSettings, Settings, TaskSettings
from rewards.tasks.registry import TASKS

GOLD = "gold"
_TASK = "task:"
# What a job's file may say about reading data, and about computing, for a command that does not train.
_DATA = ("prompt_column", "apply_chat_template", "system_prompt", "max_prompt_tokens", "max_rows")
_LEARNER = ("precision", "device")
_NOT_ROLLOUT = ("dynamic_sampling", "dynamic_limit", "group_size")
# The options that a strategy reads, and their values where they are not given.
_OPTIONS: dict[str, dict[str, float]] = {
    "sample": {},
    "best-of-n": {"n": 16},
    "soft-best-of-n": {"n": 16, "soft_temperature": 1.0},
    "reward-guided": {"top_k": 8, "guidance_weight": 1.0},
    "value-guided": {"top_k": 8, "guidance_weight": 1.0},
}


class Judges(Settings):
    """The rewards that score responses; none is possible where nothing is chosen by them."""

    reward: list[RewardSettings] = Field(default_factory=list)
    task: TaskSettings | None = None
    scoring: ScoringSettings = ScoringSettings()

    @property
    def trained(self) -> list[RewardSettings]:
        """Those that make up the reward; the others only judge."""
        return [one for one in self.reward if one.role == "train"]


@dataclass(frozen=True, slots=True)
class Strategy:
    """What is made of a prompt: `samples` responses, each chosen from `n` candidates."""

    name: str
    samples: int
    n: int = 1
    soft_temperature: float = 1.0
    guidance: Guidance | None = None

    @property
    def group_size(self) -> int:
        """Candidates for a prompt."""
        return self.samples * self.n


def strategy_of(options: argparse.Namespace) -> Strategy:
    """ValueError for a number that makes no sense, and for an option that the strategy does not read."""
    name: str = options.strategy
    known = _OPTIONS[name]
    chosen: dict[str, float] = {}
    for option in ("n", "soft_temperature", "top_k", "guidance_weight"):
        value = getattr(options, option)
        if value is not None and option not in known:
            users = " or ".join(one for one, reads in _OPTIONS.items() if option in reads)
            raise ValueError(
                f"--{option.replace('_', '-')} {value:g} has no effect with --strategy {name}: leave it out, "
                f"or use {users}"
            )
        if option in known:
            chosen[option] = known[option] if value is None else value
    if options.value is not None and name != "value-guided":
        raise ValueError(f"--value {options.value} has no effect with --strategy {name}: leave it out")
    _at_least_1(options.samples, "--samples")
    _at_least_1(int(chosen.get("n", 1)), "--n")
    if "soft_temperature" in chosen and not 0 < chosen["soft_temperature"] < float("inf"):
        raise ValueError(f"--soft-temperature {chosen['soft_temperature']:g}: give a number above 0")
    guidance = None
    if "top_k" in chosen:
        _at_least_1(int(chosen["top_k"]), "--top-k")
        if not abs(chosen["guidance_weight"]) < float("inf"):
            raise ValueError(f"--guidance-weight {chosen['guidance_weight']:g}: give a finite number")
        guidance = Guidance(top_k=int(chosen["top_k"]), weight=float(chosen["guidance_weight"]))
    return Strategy(
        name, options.samples, int(chosen.get("n", 1)), chosen.get("soft_temperature", 1.0), guidance
    )


def _at_least_1(value: int, option: str) -> None:
    if value < 1:
        raise ValueError(f"{option} {value}: give 1 or more")


def temperature_of(options: argparse.Namespace, config: JobConfig, group_size: int) -> float:
    """The sampling temperature; 0, which has one answer only, for single samples."""
    value = config.rollout.temperature if options.temperature is None else float(options.temperature)
    if not 0 <= value < float("inf"):
        raise ValueError(f"--temperature {value:g}: give 0 or more")
    if value == 0 and group_size > 1:
        raise ValueError(
            f"--temperature 0 gives the same response each time, and {group_size} samples of a prompt are "
            "asked for: raise it, or ask for one"
        )
    return value


def read_settings(options: argparse.Namespace, group_size: int) -> tuple[JobConfig, Judges]:
    """What the options, `--config` and `--set` ask for; ValueError with field, value and remedy."""
    source = "headrace" if options.config is None else str(options.config)
    tables = _from_file(options.config)
    tables["data"]["train"] = options.prompts
    tables["model"] = {"path": str(policy_folder(options.policy))}
    tables["run"] = {"seed": options.seed}
    if options.max_new_tokens is not None:
        tables["rollout"]["max_new_tokens"] = options.max_new_tokens
    tables["reward"] += [{"kind": "model", "path": str(path)} for path in options.reward_model]
    for text in options.reward:
        tables["reward"].append(_reward(text, tables, "--reward"))
    if getattr(options, "gold", None):
        tables["reward"].append(_reward(options.gold, tables, "--gold") | {"role": "evaluate", "name": GOLD})
    _name_apart(tables["reward"])
    for override in options.overrides:
        apply_override(tables, override)
    names = ("reward", "task", "scoring")
    judging: dict[str, Any] = {name: tables.pop(name) for name in names if name in tables}
    judges = validated(Judges, judging, source)
    if judges.reward and not judges.trained:
        raise ValueError(
            'every reward named is of role "evaluate", which only judges what others choose: name one of '
            "those with --reward or --reward-model"
        )
    if judges.reward:
        check_rewards(judges.reward, judges.task)
    refused = [one.label for one in judges.reward if one.kind == "discriminator"]
    if refused:
        raise ValueError(
            f'reward.kind = "discriminator" of {refused[0]!r} has weights only while a run trains it: name '
            "other rewards"
        )
    tables["rollout"]["group_size"] = group_size
    tables["run"]["batch_size"] = group_size
    tables["reward"] = [{"kind": "exact"}]  # a job must name one; the judges are apart
    return parse_config(tomli_w.dumps(tables), [], source=source), judges


def _from_file(path: Path | None) -> dict[str, Any]:
    """The tables of a job's file that matter here."""
    tables: dict[str, Any] = {}
    if path is not None:
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {path}: cannot be read ({error}); give a job's TOML file") from None
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"--config {path}: is not valid TOML: {error}") from None
    found: dict[str, Any] = {
        name: tables[name] for name in ("cluster", "scoring", "task", "sync") if name in tables
    }
    for name, kept in (("data", _DATA), ("learner", _LEARNER)):
        found[name] = {key: value for key, value in tables.get(name, {}).items() if key in kept}
    found["rollout"] = {
        key: value for key, value in tables.get("rollout", {}).items() if key not in _NOT_ROLLOUT
    }
    found["reward"] = list(tables.get("reward", []))
    return found


def _reward(text: str, tables: dict[str, Any], option: str) -> dict[str, Any]:
    """A [[reward]] table from a word of the command line; `task:KIND` sets the task too."""
    if text in ("exact", "numeric"):
        return {"kind": text}
    if text.startswith(_TASK) and text.removeprefix(_TASK) in TASKS:
        kind = text.removeprefix(_TASK)
        if tables.get("task", {}).get("kind", kind) != kind:
            raise ValueError(f"{option} {text}: another task is named already, {tables['task']['kind']!r}")
        tables.setdefault("task", {})["kind"] = kind
        return {"kind": "task"}
    if ":" not in text:
        raise ValueError(
            f"{option} {text!r}: use exact, numeric, task:KIND (of {', '.join(TASKS)}), module:function or "
            "file.py:function; a reward model is named with --reward-model"
        )
    return {"kind": "function", "function": text}


def _name_apart(tables: list[dict[str, Any]]) -> None:
    """Give later rewards of a kind that is there already names of their own: model, model-2, …"""
    seen: set[str] = set()
    for one in tables:
        label = wanted = str(one.get("name") or one.get("kind", ""))
        number = 2
        while label in seen and not one.get("name"):
            label, number = f"{wanted}-{number}", number + 1
        if label != wanted:
            one["name"] = label
        seen.add(label)

"""Candidate responses for a pool, sampled from a policy by the rollout actors: no learner, no reward.

prompts ─► Encoder ─► rollout actors (vLLM, Ray) ─► a line a prompt: prompt, responses, finished, policy
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from actors.records import Prompt, SampledGroup
from cluster.config import JobConfig
from cluster.config_file import parse_config
from cluster.data_files import Quarantine
from cluster.generation import policy as policies
from cluster.generation.policy import Policy, open_policy, policy_folder
from cluster.labelling.records import POOL_COLUMNS

__all__ = [
    "Policy",
    "generate",
    "generation_config",
    "open_policy",
    "policy_folder",
    "pool_row",
    "read_prompts",
]

Row = dict[str, Any]


def generation_config(policy: Path, prompts: str, samples: int, overrides: Sequence[str]) -> JobConfig:
    """A job's configuration of which only the sampling side is used; `overrides` as for `train`."""
    tables = {
        "model": {"path": str(policy_folder(policy))},
        "data": {"train": prompts},
        "reward": [{"kind": "exact"}],  # a job must name one; none is asked here
        "rollout": {"group_size": samples},
        "run": {"batch_size": samples},
    }
    return parse_config(tomli_w.dumps(tables), overrides, source="label generate")


def read_prompts(config: JobConfig, policy: Policy, quarantine: Quarantine) -> list[Prompt]:
    """The prompts that leave room for a response; every other row is put aside with its reason."""
    return policies.read_prompts(config, policy, quarantine, reserved=POOL_COLUMNS[1:])


def generate(
    config: JobConfig, policy: Policy, prompts: Sequence[Prompt], on_done: Callable[[int], None]
) -> list[Row]:
    """A pool's lines, in the order of the prompts; `on_done` hears how many prompts are done.

    Raises PlacementError where Ray has no room, LossError and what `Remote.call` raises where sampling fails.
    """
    from cluster.generation.sampling import Plan, sample_all

    assert config.data is not None
    column = config.data.prompt_column
    done = 0

    async def use(number: int, group: SampledGroup) -> Row:  # noqa: ARG001
        nonlocal done
        done += 1
        on_done(done)
        return pool_row(group, column, policy.version)

    plan = Plan(config.rollout.group_size, config.rollout.temperature)
    return sample_all(config, policy, list(enumerate(prompts)), plan, use)


def pool_row(group: SampledGroup, prompt_column: str, version: str) -> Row:
    """A pool's line from a group of samples, with the prompt row's other columns."""
    rest = {name: value for name, value in group.prompt.row.items() if name not in (prompt_column, "prompt")}
    return rest | {
        "prompt": group.prompt.source,
        "responses": [one.text for one in group.completions],
        "finished": [one.finished for one in group.completions],
        "policy": version,
    }

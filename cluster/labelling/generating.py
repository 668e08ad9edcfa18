"""Candidate responses for a pool, sampled from a policy by the rollout actors: no learner, no reward.

prompts ─► Encoder ─► rollout actors (vLLM, Ray) ─► a line a prompt: prompt, responses, finished, policy
"""

import asyncio
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import tomli_w

from actors.records import Prompt, SampledGroup, SampleRequest
from actors.rollout import RolloutWorker
from cluster.config import JobConfig
from cluster.config_file import parse_config
from cluster.crew import shipped
from cluster.data import Encoder
from cluster.data_files import BadRow, Quarantine, Reading, read_rows
from cluster.labelling.records import POOL_COLUMNS
from cluster.placement import ray_session, role_resource, sampler_seed, sync_backend, usable_gpus
from cluster.prepare import load_model_config, load_tokenizer, longest_sequence
from cluster.remote import Remote
from cluster.rollout_pool import RolloutPool
from cluster.workers import stop_all

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy's folder; `version` is its name with the beginning of the SHA-256 of its weights."""

    path: Path
    version: str
    tokenizer: Any
    max_length: int


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


def policy_folder(path: Path) -> Path:
    """A model's folder, a checkpoint's, or a run's, of which the newest checkpoint is taken."""
    path = path.expanduser().resolve()
    pointer = path / "checkpoints" / "latest.json"
    if pointer.is_file():
        path = pointer.parent / json.loads(pointer.read_text(encoding="utf-8"))["folder"]
    if (path / "policy").is_dir():
        path = path / "policy"
    if not any(path.glob("*.safetensors")):
        raise ValueError(
            f"--policy {path}: has no *.safetensors; give a model's folder saved with save_pretrained, or "
            "the folder of a run with a checkpoint"
        )
    return path


def open_policy(config: JobConfig) -> Policy:
    """Tokenizer and limits of the policy. ValueError where the folder has none that can be used."""
    folder = Path(config.model.path)
    tokenizer = load_tokenizer(folder)
    longest = longest_sequence(config.model, load_model_config("model.path", folder))
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return Policy(folder, f"{folder.name}@{digest.hexdigest()[:16]}", tokenizer, longest)


def read_prompts(config: JobConfig, policy: Policy, quarantine: Quarantine) -> list[Prompt]:
    """The prompts that leave room for a response; every other row is put aside with its reason."""
    settings = config.data
    assert settings is not None
    room = policy.max_length - config.rollout.max_new_tokens
    if room < 1:
        raise ValueError(
            f"rollout.max_new_tokens = {config.rollout.max_new_tokens} leaves no room for a prompt in the "
            f"policy's {policy.max_length} tokens; lower it with --max-new-tokens"
        )
    encoder = Encoder(policy.tokenizer, settings, min(room, settings.max_prompt_tokens or room))
    reading = Reading(settings.train, quarantine)
    prompts: dict[tuple[int, ...], Prompt] = {}
    rows = read_rows(
        settings.train, reading, field="PROMPTS", split=settings.train_split, subset=settings.subset
    )
    for line, row in rows:
        try:
            ids, text = encoder.prompt(row)
            encoder.check_length(len(ids))
            if ids in prompts:
                raise BadRow("repeated prompt", f"it stands in {prompts[ids].id} already")
            taken = [name for name in POOL_COLUMNS[1:] if name in row]
            if taken:
                raise BadRow("reserved column", f"{taken[0]!r} means something in a pool: rename it")
        except BadRow as bad:
            reading.reject(line, bad, json.dumps(row, ensure_ascii=False))
            continue
        prompts[ids] = Prompt(f"line {line}", ids, text, row, row[settings.prompt_column])
        if len(prompts) == settings.max_rows:
            break
    reading.require_good(len(prompts), "PROMPTS")
    return list(prompts.values())


def generate(
    config: JobConfig, policy: Policy, prompts: Sequence[Prompt], on_done: Callable[[int], None]
) -> list[Row]:
    """A pool's lines, in the order of the prompts; `on_done` hears how many prompts are done.

    Raises PlacementError where Ray has no room, LossError and what `Remote.call` raises where sampling fails.
    """
    with (
        tempfile.TemporaryDirectory(prefix="headrace-label-") as folder,
        ray_session(config, Path(folder)) as cuda,
    ):
        groups = asyncio.run(_sample_all(config, policy, prompts, on_done, cuda=cuda))
    assert config.data is not None
    return [pool_row(group, config.data.prompt_column, policy.version) for group in groups]


def pool_row(group: SampledGroup, prompt_column: str, version: str) -> Row:
    """A pool's line from a group of samples, with the prompt row's other columns."""
    rest = {name: value for name, value in group.prompt.row.items() if name not in (prompt_column, "prompt")}
    return rest | {
        "prompt": group.prompt.source,
        "responses": [one.text for one in group.completions],
        "finished": [one.finished for one in group.completions],
        "policy": version,
    }


async def _sample_all(
    config: JobConfig,
    policy: Policy,
    prompts: Sequence[Prompt],
    on_done: Callable[[int], None],
    *,
    cuda: bool,
) -> list[SampledGroup]:
    """Start the actors, give each as many prompts as it takes, stop them."""
    rollout = config.rollout
    remotes = [_actor(config, policy, number, cuda=cuda) for number in range(rollout.actors)]
    try:
        model = await asyncio.to_thread(shipped, config, policy.path)
        pool = RolloutPool(remotes, rollout, config.sync, model=model)
        await pool.start()
        slots = asyncio.Semaphore(rollout.max_groups_in_flight * rollout.actors)
        done = 0

        async def one(number: int, prompt: Prompt) -> SampledGroup:
            nonlocal done
            request = SampleRequest(
                number, prompt, rollout.group_size, rollout.max_new_tokens, rollout.temperature
            )
            async with slots:
                group = await pool.sample_anywhere(request)
            done += 1
            on_done(done)
            return group

        async with asyncio.TaskGroup() as tasks:
            under_way = [tasks.create_task(one(number, prompt)) for number, prompt in enumerate(prompts)]
        return [task.result() for task in under_way]
    finally:
        await stop_all(remotes)


def _actor(config: JobConfig, policy: Policy, number: int, *, cuda: bool) -> Remote:
    """A rollout actor, on any host with room."""
    rollout = config.rollout
    backend = sync_backend(config, usable_gpus(cuda))
    handle = (
        ray.remote(RolloutWorker)
        .options(
            num_cpus=rollout.cores,
            num_gpus=rollout.tensor_parallel if cuda else 0,
            resources=role_resource("rollout"),
            scheduling_strategy="SPREAD",
            max_restarts=0,
            max_concurrency=4 * rollout.max_groups_in_flight,
        )
        .remote(
            f"rollout-{number}",
            str(policy.path),
            rollout,
            config.sync.model_copy(update={"backend": backend}),
            dtype=config.learner.precision,
            max_length=policy.max_length,
            seed=sampler_seed(config.run.seed, number, 0),
            device="cuda" if cuda else "cpu",
        )
    )
    return Remote(f"rollout-{number}", handle, number)

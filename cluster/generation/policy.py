"""A policy's folder and the prompts that it is to answer: what sampling without a learner starts from."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.records import Prompt
from cluster.config import JobConfig
from cluster.data import Encoder
from cluster.data_files import BadRow, Quarantine, Reading, read_rows
from cluster.prepare import load_model_config, load_tokenizer, longest_sequence
from rewards.models.foreign import opening
from rewards.models.weights import unsafe_weights


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy's folder; `version` is its name with the beginning of the SHA-256 of its weights."""

    path: Path
    version: str
    tokenizer: Any
    max_length: int


def checkpoint_folder(path: Path) -> Path:
    """A run's newest checkpoint; any other folder as it is."""
    path = path.expanduser().resolve()
    pointer = path / "checkpoints" / "latest.json"
    if not pointer.is_file():
        return path
    with opening(f"--policy {path}: its {pointer.name} cannot be read", "name a checkpoint's folder"):
        name = json.loads(pointer.read_text(encoding="utf-8"))["folder"]
        if name != Path(name).name or name.startswith(".") or not (pointer.parent / name).is_dir():
            raise ValueError(f"{name!r} is no checkpoint of this run")
    return pointer.parent / str(name)


def policy_folder(path: Path) -> Path:
    """A model's folder, a checkpoint's, or a run's, of which the newest checkpoint is taken."""
    path = checkpoint_folder(path)
    if (path / "policy").is_dir():
        path = path / "policy"
    if not any(path.glob("*.safetensors")):
        raise ValueError(
            f"--policy {path}: has no *.safetensors; give a model's folder saved with save_pretrained, or "
            "the folder of a run with a checkpoint"
        )
    if unsafe := unsafe_weights(path):
        raise ValueError(f"--policy {path}: {unsafe}")
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


def read_prompts(
    config: JobConfig,
    policy: Policy,
    quarantine: Quarantine,
    *,
    reserved: Collection[str] = (),
    required: Collection[str] = (),
    check_row: Callable[[Mapping[str, Any]], None] | None = None,
) -> list[Prompt]:
    """The prompts that leave room for a response; every other row is put aside with its reason.

    A row may have no `reserved` column and must have the `required` ones; `check_row` raises ValueError for
    one that the rewards could not grade.
    """
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
            _check_columns(row, reserved, required, check_row)
        except BadRow as bad:
            reading.reject(line, bad, json.dumps(row, ensure_ascii=False))
            continue
        prompts[ids] = Prompt(f"line {line}", ids, text, row, encoder.source(row))
        if len(prompts) == settings.max_rows:
            break
    reading.require_good(len(prompts), "PROMPTS")
    return list(prompts.values())


def _check_columns(
    row: Mapping[str, Any],
    reserved: Collection[str],
    required: Collection[str],
    check_row: Callable[[Mapping[str, Any]], None] | None,
) -> None:
    taken = [name for name in reserved if name in row]
    if taken:
        raise BadRow("reserved column", f"{taken[0]!r} means something in a pool: rename it")
    missing = [name for name in required if row.get(name) is None]
    if missing:
        raise BadRow("missing column", f"the rewards need {missing[0]!r}")
    if check_row is not None:
        try:
            check_row(row)
        except ValueError as error:
            raise BadRow("bad answer", str(error)) from error

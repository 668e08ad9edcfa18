"""What a job needs before any actor starts: a model folder, its tokenizer, prompts and demonstrations.

Everything that can be wrong with the user's files is found here, in seconds, and said in one message.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import JobConfig
from cluster.data import DataSettings, PromptData, Quarantine, load_demonstrations, load_prompts
from cluster.data_files import Reading, read_rows
from cluster.scratch import alphabet_of, build_scratch_model
from rewards.build import build_reward, required_columns
from rewards.tasks.registry import get_task

# Never pickled weights, and never code.
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The inputs of a job; `max_length` bounds prompt plus response, in tokens."""

    model_path: Path
    tokenizer: Any
    max_length: int
    prompts: PromptData
    demonstrations: list[tuple[tuple[int, ...], tuple[int, ...]]]
    quarantine: Quarantine


def prepare(config: JobConfig, run_dir: Path) -> Prepared:
    """Generate or read everything; raises ValueError with field, value and remedy."""
    _try_rewards(config)
    inputs = run_dir / "inputs"
    inputs.mkdir(mode=0o700, exist_ok=True)
    data, demonstration_file = _data_settings(config, inputs)
    model_path = _model_folder(config, data, demonstration_file, inputs)
    quarantine = Quarantine(run_dir / "quarantine.jsonl")
    tokenizer = _load_tokenizer(model_path)
    max_length = _max_length(config, model_path)
    prompts = load_prompts(
        data,
        tokenizer,
        max_length=max_length,
        max_new_tokens=config.rollout.max_new_tokens,
        max_heldout=config.run.evaluate_prompts,
        seed=config.run.seed,
        quarantine=quarantine,
        required_columns=sorted(required_columns(config.reward)),
    )
    demonstrations = (
        load_demonstrations(demonstration_file, tokenizer, max_length, quarantine=quarantine, settings=data)
        if config.warmup.steps
        else []
    )
    return Prepared(model_path, tokenizer, max_length, prompts, demonstrations, quarantine)


def _try_rewards(config: JobConfig) -> None:
    """Build the rewards once, so that a function that cannot be used is refused before anything starts."""
    scoring = config.scoring
    build_reward(
        config.reward,
        config.task,
        timeout_s=scoring.reward_timeout_s,
        memory_gib=scoring.reward_memory_gib,
    ).close()


def _data_settings(config: JobConfig, inputs: Path) -> tuple[DataSettings, str]:
    """The user's data, or a task's rows written to files that are then read like the user's."""
    if config.data is not None:
        return config.data, config.warmup.data
    assert config.task is not None, "the configuration has data or a task"
    rows = get_task(config.task.kind).generate(config.task)
    train, heldout, demonstrations = (
        inputs / f"{name}.jsonl" for name in ("train", "heldout", "demonstrations")
    )
    _write_rows(train, rows.train)
    _write_rows(heldout, rows.heldout)
    _write_rows(demonstrations, rows.demonstrations)
    settings = DataSettings(train=str(train), heldout=str(heldout))
    return settings, config.warmup.data or str(demonstrations)


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _model_folder(config: JobConfig, data: DataSettings, demonstration_file: str, inputs: Path) -> Path:
    model = config.model
    if model.scratch is not None:
        alphabet = (
            get_task(config.task.kind).alphabet()
            if config.task is not None
            else _alphabet(data, demonstration_file, inputs)
        )
        return build_scratch_model(model.scratch, alphabet, inputs / "model", config.run.seed)
    folder = Path(model.path).expanduser()
    return folder.resolve() if folder.is_dir() else _download(model.path, model.revision)


def _alphabet(data: DataSettings, demonstration_file: str, inputs: Path) -> str:
    """Every character of the user's prompts, answers and completions."""
    quarantine = Quarantine(
        inputs / "quarantine.jsonl"
    )  # bad rows are judged later, when they are read again
    texts: list[str] = []
    columns = (data.prompt_column, data.answer_column, data.completion_column)
    for name, split in ((data.train, data.train_split), (demonstration_file, data.train_split)):
        if not name:
            continue
        reading = Reading(name, quarantine)
        rows = read_rows(
            name, reading, field="data.train", split=split, subset=data.subset, revision=data.revision
        )
        texts += [str(row[column]) for _, row in rows for column in columns if column in row]
    quarantine.path.unlink()
    return alphabet_of(texts)


def _download(name: str, revision: str | None) -> Path:
    """A hub model's safetensors, configuration and tokenizer; the cached copy where there is one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES, etag_timeout=10))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model.path = {name!r} is not a folder here, and the hub did not give a model of that name "
            f"({type(error).__name__}): give the path of a folder saved with save_pretrained, or check the "
            "name and the network"
        ) from None


def _load_tokenizer(model_path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model.path = {str(model_path)!r} has no tokenizer that can be loaded ({error}); save one "
            "beside the model with tokenizer.save_pretrained"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model.path = {str(model_path)!r}: its tokenizer has no end token (eos_token), so no response "
            "could end; set one and save it"
        )
    return tokenizer


def _max_length(config: JobConfig, model_path: Path) -> int:
    from transformers import AutoConfig

    try:
        model_config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model.path = {str(model_path)!r} has no configuration that transformers knows ({error}); give "
            "a folder saved with save_pretrained"
        ) from None
    text_config = model_config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    wanted = config.model.max_length
    if wanted is None and limit is None:
        raise ValueError("model.max_length is missing, and the model's configuration states no limit: set it")
    if wanted is not None and limit is not None and wanted > limit:
        raise ValueError(f"model.max_length = {wanted} is beyond the model's {limit} tokens: lower it")
    return int(wanted or limit or 0)

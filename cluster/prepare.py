"""What a job needs before any actor starts: a model folder, its tokenizer, prompts and demonstrations.

Everything that can be wrong with the user's files is found here, in seconds, and said in one message.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.config import JobConfig
from cluster.data import DataSettings, PromptData, Quarantine, load_demonstrations, load_prompts
from cluster.data_files import Reading, read_rows
from cluster.scratch import alphabet_of, build_scratch_model
from learner.reward_settings import BackboneSettings
from learner.settings import ModelSettings
from rewards.build import build_reward, check_row, required_columns
from rewards.discriminator_settings import trains_discriminator
from rewards.models.foreign import opening, refuse_tokens_beyond
from rewards.models.weights import unsafe_files, unsafe_weights
from rewards.tasks.registry import get_task

# Never pickled weights, and never code.
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The inputs of a job; `max_length` bounds prompt plus response, in tokens.

    `reference_path`, `critic_path` and `discriminator_path` are None where the configuration names no model
    of their own.
    """

    model_path: Path
    reference_path: Path | None
    critic_path: Path | None
    tokenizer: Any
    max_length: int
    prompts: PromptData
    demonstrations: list[tuple[tuple[int, ...], tuple[int, ...]]]
    quarantine: Quarantine
    discriminator_path: Path | None = None


def prepare(config: JobConfig, run_dir: Path) -> Prepared:
    """Generate or read everything; raises ValueError with field, value and remedy."""
    try_rewards(config)
    inputs = run_dir / "inputs"
    inputs.mkdir(mode=0o700, exist_ok=True)
    data, demonstration_file = _data_settings(config, inputs)
    model_path = _model_folder(config, data, demonstration_file, inputs)
    quarantine = Quarantine(run_dir / "quarantine.jsonl")
    tokenizer = load_tokenizer(model_path)
    policy = load_model_config("model.path", model_path)
    max_length = longest_sequence(config.model, policy)
    reference_path, critic_path = (
        _other_model(config, f"model.{key}", name, policy, max_length)
        for key, name in (("reference", config.model.reference), ("critic", config.model.critic))
    )
    prompts = load_prompts(
        data,
        tokenizer,
        max_length=max_length,
        max_new_tokens=config.rollout.max_new_tokens,
        max_heldout=config.run.evaluate_prompts,
        seed=config.run.seed,
        quarantine=quarantine,
        required_columns=sorted(required_columns(config.reward)),
        check_row=partial(check_row, config.reward),
    )
    discriminator_path = _other_model(
        config, "discriminator.path", config.discriminator.path, policy, max_length
    )
    demonstrations = []
    if config.warmup.steps or trains_discriminator(config.reward):
        demonstrations = load_demonstrations(
            demonstration_file,
            tokenizer,
            max_length,
            quarantine=quarantine,
            settings=data,
            taken=frozenset(prompt.token_ids for prompt in prompts.heldout.prompts),
        )
    return Prepared(
        model_path=model_path,
        reference_path=reference_path,
        critic_path=critic_path,
        tokenizer=tokenizer,
        max_length=max_length,
        prompts=prompts,
        demonstrations=demonstrations,
        quarantine=quarantine,
        discriminator_path=discriminator_path,
    )


def try_rewards(config: JobConfig) -> None:
    """Build the rewards once, so that a function that cannot be used is refused before anything starts."""
    scoring = config.scoring
    build_reward(
        config.reward,
        config.task,
        timeout_s=scoring.reward_timeout_s,
        memory_gib=scoring.reward_memory_gib,
        environment=scoring.reward_env,
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


# --- models --------------------------------------------------------------------------------------------


def _model_folder(config: JobConfig, data: DataSettings, demonstration_file: str, inputs: Path) -> Path:
    model = config.model
    if model.scratch is None:
        return resolve_model("model.path", model.path, model.revision)
    if config.task is not None:
        alphabet = get_task(config.task.kind).alphabet()
    else:
        alphabet = _alphabet(config, data, demonstration_file, inputs)
    return build_scratch_model(model.scratch, alphabet, inputs / "model", config.run.seed)


def _alphabet(config: JobConfig, data: DataSettings, demonstration_file: str, inputs: Path) -> str:
    """Every character of the user's prompts, answers and completions.

    Rows are judged when they are read again, with the tokenizer that comes of this; where no row has a text,
    a blank alone lets that reading say what is wrong with them.
    """
    quarantine = Quarantine(inputs / "quarantine.jsonl")
    hub = {"subset": data.subset, "revision": data.revision}
    sources: list[tuple[str, str, str, dict[str, Any]]] = [
        ("data.train", data.train, data.train_split, hub),
        ("data.heldout", data.heldout, data.heldout_split, hub),
        ("warmup.data", demonstration_file, data.train_split, {}),
    ]
    columns = {data.prompt_column, data.completion_column, *(one.answer_column for one in config.reward)}
    texts: list[str] = []
    for field, name, split, where in sources:
        if name:
            rows = read_rows(name, Reading(name, quarantine), field=field, split=split, **where)
            texts += [text for _, row in rows for column in columns for text in texts_of(row.get(column))]
    quarantine.path.unlink()
    return alphabet_of(texts) or " "


def texts_of(value: Any) -> Iterator[str]:
    """What a policy reads or writes of a column's value: a text, a number, or the text of chat messages."""
    if isinstance(value, list):
        for message in value:
            if isinstance(message, dict):
                yield from texts_of(message.get("content"))
    elif isinstance(value, str | int | float):
        yield str(value)


def _other_model(config: JobConfig, field: str, name: str, policy: Any, max_length: int) -> Path | None:
    """The folder of a model that stands beside the policy, if it is one that fits it; `field` names it."""
    if not name:
        return None
    revision = config.model.revision if name == config.model.path else None
    folder = resolve_model(field, name, revision)
    other = load_model_config(field, folder).get_text_config()
    mine = policy.get_text_config()
    sizes = getattr(mine, "vocab_size", None), getattr(other, "vocab_size", None)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"{field} = {name!r} has a vocabulary of {sizes[1]} tokens, the policy one of {sizes[0]}: give a "
            "model with the policy's own tokenizer"
        )
    limit = getattr(other, "max_position_embeddings", None)
    if limit is not None and limit < max_length:
        raise ValueError(
            f"{field} = {name!r} reads {limit} tokens at most, less than the run's {max_length}: set "
            f"model.max_length = {limit}, or give a model that reads more"
        )
    return folder


def resolve_model(field: str, name: str, revision: str | None) -> Path:
    """A folder here, or the hub's model of that name, with weights that need no pickle."""
    folder = Path(name).expanduser()
    folder = folder.resolve() if folder.is_dir() else _download(field, name, revision)
    if unsafe := unsafe_weights(folder):
        raise ValueError(f"{field} = {name!r}: {unsafe}")
    return folder


def _download(field: str, name: str, revision: str | None) -> Path:
    """A hub model's safetensors, configuration and tokenizer; the cached copy where there is one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES, etag_timeout=10))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{field} = {name!r} is not a folder here, and the hub did not give a model of that name "
            f"({type(error).__name__}): give the path of a folder saved with save_pretrained, or check the "
            "name and the network"
        ) from None


def load_tokenizer(model_path: Path) -> Any:
    """The tokenizer beside a model; ValueError if there is none, or it cannot end a response."""
    from transformers import AutoTokenizer

    where = f"model.path = {str(model_path)!r}"
    if unsafe := unsafe_files(model_path):
        raise ValueError(f"{where}: {unsafe}")
    config = load_model_config("model.path", model_path)
    with opening(
        f"{where} has no tokenizer that can be loaded",
        "save one beside the model with tokenizer.save_pretrained",
    ):
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{where}: its tokenizer has no end token (eos_token), so no response could end; set one and "
            "save it"
        )
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(vocabulary, int):
        refuse_tokens_beyond(where, tokenizer, vocabulary)
    return tokenizer


def load_model_config(field: str, folder: Path) -> Any:
    """A folder's configuration, as transformers knows it; ValueError if it does not."""
    from transformers import AutoConfig

    with opening(f"{field} = {str(folder)!r} has no configuration that transformers knows"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def longest_sequence(model: ModelSettings | BackboneSettings, config: Any) -> int:
    """Prompt plus response in tokens: what is set, or what the model's configuration allows."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    wanted = model.max_length
    if wanted is None and limit is None:
        raise ValueError("model.max_length is missing, and the model's configuration states no limit: set it")
    if wanted is not None and limit is not None and wanted > limit:
        raise ValueError(f"model.max_length = {wanted} is beyond the model's {limit} tokens: lower it")
    return int(wanted or limit or 0)

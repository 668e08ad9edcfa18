"""What a supervised job needs before any actor starts: a model folder, and demonstrations as tokens."""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.packing import Pair
from cluster.data import DataSettings, Quarantine, load_demonstrations
from cluster.data_files import Reading, read_rows
from cluster.data_settings import DEFAULT_HELDOUT_FRACTION
from cluster.prepare import load_model_config, load_tokenizer, longest_sequence, resolve_model, texts_of
from cluster.scratch import alphabet_of, build_scratch_model
from cluster.supervised_job.config import SupervisedJobConfig
from rewards.tasks.registry import get_task


@dataclass(frozen=True, slots=True)
class SupervisedInputs:
    """No prompt stands both among the training demonstrations and among the held-out ones."""

    model_path: Path
    max_length: int
    train: list[Pair]
    heldout: list[Pair]
    quarantine: Quarantine

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is trained on, by which a resume knows its data."""
        rows = [[list(prompt), list(completion)] for prompt, completion in self.train]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def prepare_supervised_job(config: SupervisedJobConfig, run_dir: Path) -> SupervisedInputs:
    """Generate or read everything; raises ValueError with field, value and remedy."""
    inputs = run_dir / "inputs"
    inputs.mkdir(mode=0o700, exist_ok=True)
    quarantine = Quarantine(run_dir / "quarantine.jsonl")
    data = _data(config, inputs)
    model_path = _model_folder(config, data, inputs)
    tokenizer = load_tokenizer(model_path)
    limit = longest_sequence(config.model, load_model_config("model.path", model_path))

    def read(path: str, split: str, taken: frozenset[tuple[int, ...]]) -> list[Pair]:
        settings = data.model_copy(update={"train": path, "train_split": split})
        return list(
            load_demonstrations(
                path,
                tokenizer,
                limit,
                quarantine=quarantine,
                settings=settings,
                taken=taken,
                field="data.heldout" if path == data.heldout else "data.train",
                from_hub=True,
                limit=None if path == data.heldout else data.max_rows,
            )
        )

    if data.heldout:
        heldout = read(data.heldout, data.heldout_split, frozenset())
        train = read(data.train, data.train_split, frozenset(tuple(prompt) for prompt, _ in heldout))
    else:
        train, heldout = split_by_prompt(
            read(data.train, data.train_split, frozenset()),
            data.heldout_fraction or DEFAULT_HELDOUT_FRACTION,
            config.run.seed,
        )
    return SupervisedInputs(
        model_path, limit, train, heldout[: config.run.evaluate_demonstrations], quarantine
    )


def split_by_prompt(pairs: list[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, held out): a share of the distinct prompts, at least one on each side."""
    prompts = sorted({tuple(prompt) for prompt, _ in pairs})
    if len(prompts) < 2:
        raise ValueError(
            f"data.train has demonstrations of {len(prompts)} prompt(s) only, so none can be held out; "
            "name a file of others in data.heldout"
        )
    random.Random(seed).shuffle(prompts)
    apart = set(prompts[: min(len(prompts) - 1, max(1, round(fraction * len(prompts))))])
    train = [pair for pair in pairs if tuple(pair[0]) not in apart]
    return train, [pair for pair in pairs if tuple(pair[0]) in apart]


def _data(config: SupervisedJobConfig, inputs: Path) -> DataSettings:
    """The user's demonstrations, or a task's written to a file that is then read like the user's."""
    if config.data is not None:
        return config.data
    assert config.task is not None, "the configuration has data or a task"
    rows = get_task(config.task.kind).generate(config.task).demonstrations
    path = inputs / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return DataSettings(train=str(path))


def _model_folder(config: SupervisedJobConfig, data: DataSettings, inputs: Path) -> Path:
    model = config.model
    if model.scratch is None:
        return resolve_model("model.path", model.path, model.revision)
    if config.task is not None:
        alphabet = get_task(config.task.kind).alphabet()
    else:
        alphabet = alphabet_of(_texts(data, inputs)) or " "
    return build_scratch_model(model.scratch, alphabet, inputs / "model", config.run.seed).resolve()


def _texts(data: DataSettings, inputs: Path) -> list[str]:
    """All that the policy reads or writes. Rows are judged when they are read again, with a tokenizer."""
    quarantine = Quarantine(inputs / "quarantine.jsonl")
    sources = [("data.train", data.train, data.train_split)]
    if data.heldout:
        sources.append(("data.heldout", data.heldout, data.heldout_split))
    columns = (data.prompt_column, data.completion_column)
    found: list[Any] = []
    for field, name, split in sources:
        rows = read_rows(
            name,
            Reading(name, quarantine),
            field=field,
            split=split,
            subset=data.subset,
            revision=data.revision,
        )
        found += [text for _, row in rows for column in columns for text in texts_of(row.get(column))]
    quarantine.path.unlink(missing_ok=True)
    return found

"""What a reward model's job needs before any actor starts: a model folder, and every pair as token ids.

Everything that can be wrong with the user's files is found here, and said in one message.

load_preferences → RewardEncoder → a table of distinct sequences → PairData (training), PairSets (scoring)
                        └→ Quarantine, with line and reason
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.data_files import BadRow, Quarantine
from cluster.preferences.reading import load_preferences
from cluster.preferences.report import PreferenceReport
from cluster.preferences.settings import PreferenceSettings
from cluster.prepare import load_model_config, load_tokenizer, longest_sequence, resolve_model
from cluster.reward_job.config import EvaluationSettings, RewardJobConfig
from cluster.scratch import alphabet_of, build_scratch_model
from learner.reward_module import Sequences
from learner.reward_training import PairData
from rewards.models.card import TextFormat
from rewards.models.embedding import sequence_key
from rewards.models.text import Encoded, EncodingError, RewardEncoder
from rewards.models.transformer import choose_padding
from rewards.preferences.records import Preference

TRAIN, HELDOUT = "train", "heldout"
_ENCODE_AT_ONCE = 256  # pairs


@dataclass(slots=True)
class PairSet:
    """Pairs of one source by the numbers of their sequences; gold rewards where both are known."""

    chosen: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    subsets: list[str] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    gold: list[tuple[float, float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def has_gold(self) -> bool:
        """Whether every pair has its two gold rewards."""
        return bool(self.gold) and len(self.gold) == len(self.chosen)


@dataclass(frozen=True, slots=True)
class RewardInputs:
    """The inputs of a job. `sets` has "train", "heldout" and what `[[evaluate]]` names.

    `report` tells what the training source is like, `elsewhere` the same of each `[[evaluate]]` file.
    """

    model_path: Path
    text: TextFormat
    pad_token_id: int
    vocabulary: int
    data: PairData
    sets: dict[str, PairSet]
    report: PreferenceReport
    elsewhere: dict[str, PreferenceReport]
    quarantine: Quarantine

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is trained on, by which a resume knows its data."""
        data = self.data
        digest = hashlib.sha256(data.sequences.tokens.data)
        digest.update(data.sequences.starts.data)
        rest = (data.chosen, data.rejected, data.margin, data.weight, data.prompt)
        digest.update(json.dumps(rest).encode())
        return digest.hexdigest()


def prepare_reward_job(config: RewardJobConfig, run_dir: Path) -> RewardInputs:
    """Read everything; raises ValueError with field, value and remedy."""
    inputs = run_dir / "inputs"
    inputs.mkdir(mode=0o700, exist_ok=True)
    model_path = None
    if config.model.scratch is None:  # a wrong path is found before minutes of reading
        model_path = resolve_model("model.path", config.model.path, config.model.revision)
    quarantine = Quarantine(run_dir / "quarantine.jsonl")
    settings = config.preferences
    columns = [name for name in config.evaluation.columns if name not in settings.keep_columns]
    settings = settings.model_copy(update={"keep_columns": [*settings.keep_columns, *columns]})
    preferences = load_preferences(settings, quarantine)
    sources = {TRAIN: preferences.train, HELDOUT: preferences.heldout}
    names = {TRAIN: settings.train, HELDOUT: settings.heldout or settings.train}
    elsewhere: dict[str, PreferenceReport] = {}
    for one in config.evaluate:
        try:
            sources[one.name], elsewhere[one.name] = pairs_from_elsewhere(
                one.file, settings, quarantine, {pair.prompt_key for pair in preferences.train}
            )
        except ValueError as error:
            raise ValueError(f"evaluate.file = {one.file!r} (name = {one.name!r}): {error}") from None
        names[one.name] = one.file
    if config.model.scratch is not None:
        alphabet = alphabet_of(_texts(pair for pairs in sources.values() for pair in pairs)) or " "
        model_path = build_scratch_model(
            config.model.scratch, alphabet, inputs / "model", config.run.seed
        ).resolve()
    assert model_path is not None
    tokenizer = load_tokenizer(model_path)
    limit = longest_sequence(config.model, load_model_config("model.path", model_path))
    text = TextFormat(**config.reward_model.text.model_dump(), max_length=limit)
    encoder = RewardEncoder(tokenizer, text)
    table = SequenceTable(encoder)
    sets = {}
    for name, pairs in sources.items():
        sets[name] = table.add(pairs, names[name], quarantine, config.evaluation)
        if not len(sets[name]):
            raise ValueError(
                f"{_field(name)} = {names[name]!r}: none of its {len(pairs)} pairs can be read by the model "
                f"({quarantine.describe()}): see {quarantine.path}, or use a model with another tokenizer "
                "or length"
            )
    pad = choose_padding(tokenizer)
    return RewardInputs(
        model_path=model_path,
        text=text,
        pad_token_id=pad,
        vocabulary=len(tokenizer),
        data=_pair_data(table, sets[TRAIN]),
        sets=sets,
        report=preferences.report,
        elsewhere=elsewhere,
        quarantine=quarantine,
    )


def pairs_from_elsewhere(
    file: str, settings: PreferenceSettings, quarantine: Quarantine, trained: Collection[str]
) -> tuple[list[Preference], PreferenceReport]:
    """All pairs of a file but those whose prompt's key is in `trained`, and what the file is like.

    `settings` say how it is read. ValueError where it cannot be, or has no pair on another prompt.
    """
    changes: dict[str, Any] = {
        "train": file,
        "heldout": "",
        "heldout_fraction": 0.5,
        "part": "all",
        "subset": "",
        "revision": None,
    }
    found = load_preferences(settings.model_copy(update=changes), quarantine)
    pairs = sorted([*found.train, *found.heldout], key=lambda pair: pair.line)
    new = [pair for pair in pairs if pair.prompt_key not in trained]
    for pair in pairs:
        if pair.prompt_key in trained:
            bad = BadRow("in training set", "the same prompt is trained on")
            quarantine.add(file, pair.line, bad, str(pair.prompt))
    if not new:
        raise ValueError("all of its prompts are trained on; give pairs on other prompts")
    return new, found.report


def _field(name: str) -> str:
    known = {TRAIN: "preferences.train", HELDOUT: "preferences.heldout"}
    return known.get(name, "evaluate.file")


class SequenceTable:
    """Distinct sequences, numbered as they come, and the lengths of their responses."""

    def __init__(self, encoder: RewardEncoder) -> None:
        self._encoder = encoder
        self._numbers: dict[tuple[bytes, int], int] = {}
        self._tokens = array("i")
        self._starts = array("q", [0])

    @property
    def sequences(self) -> Sequences:
        """All of them, by number, without a copy: while they are in use no more can be added."""
        return Sequences(np.frombuffer(self._tokens, np.int32), np.frombuffer(self._starts, np.int64))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each one's response, without the end token."""
        return tuple(length for _, length in self._numbers)

    def add(
        self,
        pairs: Sequence[Preference],
        source: str,
        quarantine: Quarantine,
        evaluation: EvaluationSettings,
    ) -> PairSet:
        """Encode the pairs; what the model cannot read whole goes into quarantine."""
        result = PairSet()
        for pair, encoded in self._encoded(pairs):
            try:
                chosen, rejected = (_or_raise(one) for one in encoded)
                if chosen.ids == rejected.ids:
                    raise EncodingError("identical", "both responses are the same tokens")
                gold = _gold(pair, evaluation)
            except EncodingError as error:
                excerpt = str(pair.prompt)
                quarantine.add(source, pair.line, BadRow(error.reason, error.detail), excerpt)
                continue
            result.chosen.append(self._number(chosen))
            result.rejected.append(self._number(rejected))
            result.prompts.append(pair.prompt_key)
            result.subsets.append(pair.subset)
            result.margin.append(pair.margin)
            result.weight.append(pair.weight)
            if gold is not None:
                result.gold.append(gold)
        return result

    def _encoded(
        self, pairs: Sequence[Preference]
    ) -> Iterator[tuple[Preference, list[Encoded | EncodingError]]]:
        """Each pair with its chosen and its rejected sequence, encoded many at a time."""
        for start in range(0, len(pairs), _ENCODE_AT_ONCE):
            part = pairs[start : start + _ENCODE_AT_ONCE]
            items = [
                (pair.prompt, response, finished)
                for pair in part
                for response, finished in (
                    (pair.chosen, pair.chosen_finished),
                    (pair.rejected, pair.rejected_finished),
                )
            ]
            found = self._encoder.encode_items(items)
            for place, pair in enumerate(part):
                yield pair, found[2 * place : 2 * place + 2]

    def _number(self, one: Encoded) -> int:
        number = self._numbers.setdefault((sequence_key(one.ids), one.length), len(self._numbers))
        if number == len(self._starts) - 1:
            self._tokens.extend(one.ids)
            self._starts.append(len(self._tokens))
        return number


def _or_raise(found: Encoded | EncodingError) -> Encoded:
    if isinstance(found, EncodingError):
        raise found
    return found


def _gold(pair: Preference, evaluation: EvaluationSettings) -> tuple[float, float] | None:
    if not evaluation.columns:
        return None
    values = [(pair.row or {}).get(column) for column in evaluation.columns]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise EncodingError(
            "no gold reward", f"{' and '.join(map(repr, evaluation.columns))} must hold numbers"
        )
    return float(values[0] or 0.0), float(values[1] or 0.0)


def _pair_data(table: SequenceTable, train: PairSet) -> PairData:
    if not any(train.weight):
        raise ValueError("preferences.weight_column: all training pairs have weight 0; give some a weight")
    prompts = {key: number for number, key in enumerate(dict.fromkeys(train.prompts))}
    return PairData(
        sequences=table.sequences,
        lengths=table.lengths,
        chosen=tuple(train.chosen),
        rejected=tuple(train.rejected),
        margin=tuple(train.margin),
        weight=tuple(train.weight),
        prompt=tuple(prompts[key] for key in train.prompts),
    )


def _texts(pairs: Iterable[Preference]) -> Iterable[str]:
    """What a model from scratch must have characters for."""
    for pair in pairs:
        messages = [] if isinstance(pair.prompt, str) else pair.prompt
        yield from (str(message.get("content", "")) for message in messages)
        if isinstance(pair.prompt, str):
            yield pair.prompt
        yield pair.chosen
        yield pair.rejected


def describe_sets(sets: dict[str, PairSet]) -> str:
    """For example `512 training, 64 held-out pairs; longer: 40`."""
    counts = Counter({name: len(pairs) for name, pairs in sets.items()})
    further = ", ".join(f"{name}: {counts[name]}" for name in sets if name not in (TRAIN, HELDOUT))
    words = f"{counts[TRAIN]:,} training and {counts[HELDOUT]:,} held-out pairs"
    return words + (f"; {further}" if further else "")

"""What a preference job needs before any actor starts: a model folder, and every response as token ids.

Everything that can be wrong with the user's files is found here, and said in one message.

load_preferences, or load_labelled → Encoder → ResponseTable of distinct responses → Examples
                                        └→ Quarantine, with line and reason
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.data import Encoder
from cluster.data_files import BadRow, Quarantine
from cluster.data_settings import DataSettings
from cluster.preference_job.config import PreferenceJobConfig
from cluster.preference_job.labelled import LabelledResponse, has_labels, load_labelled
from cluster.preferences.reading import load_preferences
from cluster.preferences.report import PreferenceReport
from cluster.prepare import load_model_config, load_tokenizer, longest_sequence, resolve_model, texts_of
from cluster.scratch import alphabet_of, build_scratch_model
from learner.preference_batch import NONE, Examples, PreferenceData, Responses
from learner.reward_module import Sequences
from rewards.models.embedding import sequence_key
from rewards.preferences.records import Preference, Prompt

TRAIN, HELDOUT = "train", "heldout"


@dataclass(frozen=True, slots=True)
class Row:
    """One label as text: a pair, or a single response, of which the other side is None.

    `finished`: whether the chosen and the rejected response end there, or were cut off.
    """

    prompt: Prompt
    prompt_key: str
    chosen: str | None
    rejected: str | None
    margin: float
    weight: float
    line: int
    finished: tuple[bool, bool]


@dataclass(frozen=True, slots=True)
class PreferenceInputs:
    """The inputs of a job. The prompts' keys belong to the held-out examples, one each."""

    model_path: Path
    reference_path: Path | None
    data: PreferenceData
    heldout: Examples
    heldout_prompts: list[str]
    report: PreferenceReport | None
    quarantine: Quarantine

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is trained on, by which a resume knows its data."""
        responses, train = self.data.responses, self.data.train
        digest = hashlib.sha256(responses.sequences.tokens.tobytes())
        digest.update(responses.sequences.starts.tobytes())
        digest.update(responses.prompt_tokens.tobytes())
        rest = (train.chosen, train.rejected, train.mismatched, train.margin, train.weight)
        digest.update(json.dumps(rest).encode())
        return digest.hexdigest()


def prepare_preference_job(config: PreferenceJobConfig, run_dir: Path) -> PreferenceInputs:
    """Read everything; raises ValueError with field, value and remedy."""
    inputs = run_dir / "inputs"
    inputs.mkdir(mode=0o700, exist_ok=True)
    model_path = None
    if config.model.scratch is None:  # a wrong path is found before minutes of reading
        model_path = resolve_model("model.path", config.model.path, config.model.revision)
    quarantine = Quarantine(run_dir / "quarantine.jsonl")
    rows, report = _read(config, quarantine)
    if config.model.scratch is not None:
        alphabet = alphabet_of(_texts(row for part in rows.values() for row in part)) or " "
        model_path = build_scratch_model(
            config.model.scratch, alphabet, inputs / "model", config.run.seed
        ).resolve()
    assert model_path is not None
    tokenizer = load_tokenizer(model_path)
    policy = load_model_config("model.path", model_path)
    limit = longest_sequence(config.model, policy)
    encoder = Encoder(tokenizer, DataSettings(train="-", **config.text.model_dump()), limit)
    table = ResponseTable(encoder)
    drafts = {name: table.add(rows[name], name, quarantine, config) for name in (TRAIN, HELDOUT)}
    if config.kto is not None:
        add_mismatched(table, drafts[TRAIN], drafts[TRAIN], config.run.seed, limit)
        add_mismatched(table, drafts[HELDOUT], drafts[TRAIN], config.run.seed, limit)
    train = drafts[TRAIN].examples()
    if not any(train.weight):
        raise ValueError("preferences.weight_column: all training rows have weight 0; give some a weight")
    return PreferenceInputs(
        model_path=model_path,
        reference_path=_reference(config, policy, limit),
        data=PreferenceData(table.responses, train),
        heldout=drafts[HELDOUT].examples(),
        heldout_prompts=drafts[HELDOUT].prompts,
        report=report,
        quarantine=quarantine,
    )


# --- Rows --------------------------------------------------------------------------------------------------


def _read(
    config: PreferenceJobConfig, quarantine: Quarantine
) -> tuple[dict[str, list[Row]], PreferenceReport | None]:
    """Rows by part. With KTO a pair is two responses, a good one and a bad one."""
    settings, kto = config.preferences, config.kto
    if kto is not None and has_labels(settings, kto, quarantine):
        labelled = load_labelled(settings, kto, quarantine)
        return {
            TRAIN: [_of_label(one) for one in labelled.train],
            HELDOUT: [_of_label(one) for one in labelled.heldout],
        }, None
    pairs = load_preferences(settings, quarantine)
    single = kto is not None
    rows = {
        TRAIN: [row for pair in pairs.train for row in _of_pair(pair, single=single)],
        HELDOUT: [row for pair in pairs.heldout for row in _of_pair(pair, single=single)],
    }
    return rows, pairs.report


def _of_label(one: LabelledResponse) -> Row:
    chosen, rejected = (one.completion, None) if one.desirable else (None, one.completion)
    finished = (one.finished, one.finished)
    return Row(one.prompt, one.prompt_key, chosen, rejected, 0.0, one.weight, one.line, finished)


def _of_pair(pair: Preference, *, single: bool) -> Iterator[Row]:
    sides = [(pair.chosen, None), (None, pair.rejected)] if single else [(pair.chosen, pair.rejected)]
    finished = (pair.chosen_finished, pair.rejected_finished)
    for chosen, rejected in sides:
        yield Row(
            pair.prompt, pair.prompt_key, chosen, rejected, pair.margin, pair.weight, pair.line, finished
        )


def _texts(rows: Iterable[Row]) -> Iterator[str]:
    """What a model from scratch must have characters for."""
    for row in rows:
        yield from texts_of(row.prompt)
        yield from (text for text in (row.chosen, row.rejected) if text is not None)


# --- Tokens ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Draft:
    """Examples of one part while they are put together; see `Examples`."""

    chosen: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    mismatched: list[int] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    def examples(self) -> Examples:
        """The finished ones."""
        return Examples(
            tuple(self.chosen),
            tuple(self.rejected),
            tuple(self.mismatched),
            tuple(self.margin),
            tuple(self.weight),
        )

    def response_of(self, number: int) -> int:
        """The sequence of a single response, whichever its label."""
        chosen = self.chosen[number]
        return self.rejected[number] if chosen == NONE else chosen


class ResponseTable:
    """Distinct responses with their prompts, numbered as they come."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._numbers: dict[tuple[bytes, int], int] = {}
        self._tokens, self._starts, self._prompts = array("i"), array("q", [0]), array("i")

    @property
    def responses(self) -> Responses:
        """All of them, by number."""
        tokens, starts = np.array(self._tokens, np.int32), np.array(self._starts, np.int64)
        return Responses(Sequences(tokens, starts), np.array(self._prompts, np.int32))

    def add(
        self, rows: Sequence[Row], part: str, quarantine: Quarantine, config: PreferenceJobConfig
    ) -> Draft:
        """Encode the rows; what the model cannot read whole goes into quarantine.

        ValueError where nothing is left.
        """
        settings = config.preferences
        name = settings.heldout if part == HELDOUT and settings.heldout else settings.train
        draft = Draft()
        for row in rows:
            try:
                numbers = self._encode(row)
            except BadRow as bad:
                quarantine.add(name, row.line, bad, str(row.prompt))
                continue
            draft.chosen.append(numbers[0])
            draft.rejected.append(numbers[1])
            draft.margin.append(row.margin)
            draft.weight.append(row.weight)
            draft.prompts.append(row.prompt_key)
        if not draft.chosen:
            which = "heldout" if part == HELDOUT and settings.heldout else "train"
            raise ValueError(
                f"preferences.{which} = {name!r}: none of its {len(rows)} {'held-out ' * (part == HELDOUT)}"
                f"rows can be read by the model ({quarantine.describe()}): see {quarantine.path}, or use a "
                "model with another tokenizer or length"
            )
        return draft

    def _encode(self, row: Row) -> tuple[int, int]:
        """The numbers of a row's responses, `NONE` for one that it has not."""
        prompt, _ = self._encoder.prompt({"prompt": row.prompt})
        sides = zip((row.chosen, row.rejected), row.finished, strict=True)
        responses = [
            None
            if text is None
            else self._encoder.completion({"prompt": row.prompt, "completion": text}, finished=finished)
            for text, finished in sides
        ]
        for response in responses:
            self._encoder.check_length(len(prompt) + len(response or ()))
        if responses[0] == responses[1]:
            raise BadRow("identical", "both responses are the same tokens")
        first, second = (NONE if one is None else self.number(prompt, one) for one in responses)
        return first, second

    def number(self, prompt: Sequence[int], response: Sequence[int]) -> int:
        """The number of a response to a prompt, a new one where it is new."""
        ids = (*prompt, *response)
        number = self._numbers.setdefault((sequence_key(ids), len(prompt)), len(self._numbers))
        if number == len(self._prompts):
            self._tokens.extend(ids)
            self._starts.append(len(self._tokens))
            self._prompts.append(len(prompt))
        return number

    def parts(self, number: int) -> tuple[list[int], list[int]]:
        """Prompt and response of a number."""
        ids = self._tokens[self._starts[number] : self._starts[number + 1]].tolist()
        return ids[: self._prompts[number]], ids[self._prompts[number] :]


def add_mismatched(table: ResponseTable, draft: Draft, pool: Draft, seed: int, limit: int) -> None:
    """For KTO's z₀: to each response of `draft` its prompt with the response to another prompt in `pool`.

    They are drawn once: the next response in a random order whose prompt is another. What does not fit beside
    the prompt is cut off. ValueError where the pool has one prompt only.
    """
    if len(set(pool.prompts) | set(draft.prompts)) < 2:
        raise ValueError(
            'preferences.train has responses to one prompt only, but objective = "kto" compares them with '
            "responses to other prompts: add rows, or use pairs with another objective"
        )
    order = [int(i) for i in np.random.default_rng([seed, len(pool.prompts)]).permutation(len(pool.prompts))]
    for number, key in enumerate(draft.prompts):
        start = number % len(order)
        around = (order[(start + step) % len(order)] for step in range(len(order)))
        other = next(place for place in around if pool.prompts[place] != key)
        prompt, _ = table.parts(draft.response_of(number))
        _, response = table.parts(pool.response_of(other))
        draft.mismatched.append(table.number(prompt, response[: limit - len(prompt)]))


def _reference(config: PreferenceJobConfig, policy: Any, limit: int) -> Path | None:
    """The folder of `model.reference`, if it is one that fits the policy, whose configuration is `policy`."""
    name = config.model.reference
    if not name:
        return None
    folder = resolve_model("model.reference", name, None)
    other, mine = load_model_config("model.reference", folder).get_text_config(), policy.get_text_config()
    sizes = other.vocab_size, mine.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"model.reference = {name!r} has a vocabulary of {sizes[0]} tokens, the policy one of "
            f"{sizes[1]}: give a model with the policy's own tokenizer"
        )
    reads = getattr(other, "max_position_embeddings", None)
    if reads is not None and reads < limit:
        raise ValueError(
            f"model.reference = {name!r} reads {reads} tokens at most, less than the run's {limit}: set "
            f"model.max_length = {reads}, or give a model that reads more"
        )
    return folder


def describe(inputs: PreferenceInputs, config: PreferenceJobConfig) -> str:
    """For example `512 training, 64 held-out pairs`."""
    what = "pairs" if config.kto is None else "labelled responses"
    return f"{len(inputs.data.train):,} training, {len(inputs.heldout):,} held-out {what}"


def doubts(inputs: PreferenceInputs, config: PreferenceJobConfig) -> Iterator[str]:
    """What to warn of before training."""
    if inputs.report is not None:
        yield from inputs.report.doubts
        yield from inputs.report.warnings
    margins = any(inputs.data.train.margin)
    wanted = config.dpo is not None and config.dpo.margin
    if margins and not wanted:
        yield 'the rows have margins, which only objective = "dpo" with dpo.margin = true uses'
    if wanted and not margins:
        yield "dpo.margin = true, but every margin is 0"

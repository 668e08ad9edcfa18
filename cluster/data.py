"""Prompts and demonstrations as token ids, the held-out split, and the order of training prompts.

read_rows → Encoder (chat template, tokens, checks) → Prompt → held-out split → PromptCursor
                   └→ Quarantine, with line and reason
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.records import Prompt
from cluster.chat import Message, check_messages, conversation, turn_end
from cluster.data_files import BadRow, Quarantine, Reading, read_rows
from cluster.data_settings import DEFAULT_HELDOUT_FRACTION, DataSettings
from cluster.prompt_cursor import PromptCursor
from rewards.models.foreign import TemplateRefusedError, render
from rewards.models.text import tokens_after

__all__ = [
    "Counts",
    "DataSettings",
    "Encoder",
    "PromptCursor",
    "PromptData",
    "PromptSet",
    "Quarantine",
    "load_demonstrations",
    "load_prompts",
]


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of every line that was read: lines = good + blank + the sum of quarantined."""

    lines: int
    good: int
    blank: int
    quarantined: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts of one source or split. `counts` speaks of the source, before any held-out prompts left it."""

    prompts: tuple[Prompt, ...]
    counts: Counts


@dataclass(frozen=True, slots=True)
class PromptData:
    """Training and held-out prompts; no text stands in both."""

    train: PromptSet
    heldout: PromptSet


_CONVERSATIONS = ("messages", "conversations")
"""Columns that hold whole conversations, in data sets that have no `prompt`."""


# --- one row → tokens ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns the values of a row into tokens, or raises BadRow with the reason why it cannot.

    A text without a template is encoded with the special tokens that the tokenizer puts before it (a BOS, for
    many); a templated prompt and a completion are encoded without, as the template writes its own. A
    completion ends with `end`, after a templated prompt with `turn_end`.
    """

    tokenizer: Any
    settings: DataSettings
    max_tokens: int
    unknown: frozenset[int] = field(init=False)
    end: int | None = field(init=False)
    turn_end: int | None = field(init=False)
    after: int = field(init=False)

    def __post_init__(self) -> None:
        if self.settings.apply_chat_template == "always" and not self.tokenizer.chat_template:
            raise ValueError(
                'data.apply_chat_template = "always", but the tokenizer has no chat template: set "auto" or '
                '"never", or use a model with a template'
            )
        known = self.tokenizer
        # Some tokenizers name an end or padding token as their unknown one: that says nothing of a character.
        others = {known.bos_token_id, known.eos_token_id, known.pad_token_id, None}
        object.__setattr__(self, "unknown", frozenset({known.unk_token_id} - others))
        end = turn = known.eos_token_id
        if end is not None and known.chat_template:
            turn = turn_end(known)
        object.__setattr__(self, "end", end)
        object.__setattr__(self, "turn_end", turn)
        object.__setattr__(self, "after", tokens_after(known))

    def source(self, row: Mapping[str, Any]) -> Any:
        """The prompt's column; of a whole conversation what comes before the assistant's last message."""
        talk = self._conversation(row)
        if talk is None:
            return _column(row, self.settings.prompt_column)
        return talk[:-1] if talk[-1]["role"] == "assistant" else talk

    def _conversation(self, row: Mapping[str, Any]) -> list[Message] | None:
        """A row's `messages` or `conversations`, where these are what the prompt is read from."""
        wanted = self.settings.prompt_column
        names = (wanted,) if row.get(wanted) is not None else _CONVERSATIONS
        name = next((one for one in names if one in _CONVERSATIONS and row.get(one) is not None), None)
        if name is None:
            return None
        if row[name] == []:
            raise BadRow("empty prompt", "no messages")
        return conversation(row[name], name)

    def prompt(self, row: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
        """Token ids, and the text: the prompt itself, or for chat messages what the template made of them."""
        value = self.source(row)
        if isinstance(value, str):
            if not value.strip():
                raise BadRow("empty prompt", "only white space")
            if self._template_for_text():
                messages = [{"role": "user", "content": value}]
                return self._encode(self._render(messages), special=False), value
            ids = self._encode(value, special=True)
            return ids[: len(ids) - self.after], value
        if isinstance(value, list):
            text = self._render(check_messages(value))
            return self._encode(text, special=False), text
        raise BadRow("wrong type", f"the prompt is a {type(value).__name__}, not a text or chat messages")

    def completion(self, row: Mapping[str, Any], *, finished: bool = True) -> tuple[int, ...]:
        """Token ids of a response, as in a demonstration, the end token added if it is finished.

        A row with a conversation and no completion has it in the assistant's last message.
        """
        value = self._response(row)
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
            (message,) = conversation(value, self.settings.completion_column)
            if message["role"] != "assistant":
                raise BadRow("wrong type", f"the completion is of role {message['role']!r}, not 'assistant'")
            value = message["content"]
        if not isinstance(value, str):
            raise BadRow("wrong type", f"the completion is a {type(value).__name__}, not a text")
        if not value.strip():
            raise BadRow("empty completion", "only white space")
        ids = self._encode(value, special=False)
        end = self.turn_end if self._templated(row) else self.end
        if end in ids[:-1]:
            raise BadRow("end token inside", "no response that is sampled goes on after its end token")
        if not finished or end is None or ids[-1] == end:  # some rows bring their end token as text
            return ids
        return (*ids, int(end))

    def _response(self, row: Mapping[str, Any]) -> Any:
        talk = self._conversation(row)
        if row.get(self.settings.completion_column) is not None or talk is None:
            return _column(row, self.settings.completion_column)
        if talk[-1]["role"] != "assistant":
            raise BadRow(
                "wrong type", f"the last message is of role {talk[-1]['role']!r}, so nothing is demonstrated"
            )
        return talk[-1]["content"]

    def _templated(self, row: Mapping[str, Any]) -> bool:
        """Whether the template writes the row's prompt."""
        value = self.source(row)
        return isinstance(value, list) or (isinstance(value, str) and self._template_for_text())

    def check_length(self, tokens: int) -> None:
        """Refuse what is longer than the limit."""
        if tokens > self.max_tokens:
            raise BadRow("over-long", f"{tokens} tokens, at most {self.max_tokens} fit")

    def _template_for_text(self) -> bool:
        wanted = self.settings.apply_chat_template
        return wanted == "always" or (wanted == "auto" and bool(self.tokenizer.chat_template))

    def _render(self, messages: list[dict[str, Any]]) -> str:
        if not self.tokenizer.chat_template or self.settings.apply_chat_template == "never":
            cause = "the tokenizer has none" if not self.tokenizer.chat_template else "templates are off"
            raise BadRow("no chat template", f"chat messages need one, but {cause}")
        system = self.settings.system_prompt
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        try:
            return render(self.tokenizer, messages)
        except TemplateRefusedError as error:
            raise BadRow("chat template refused", str(error)) from error

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        ids = tuple(int(i) for i in self.tokenizer(text, add_special_tokens=special)["input_ids"])
        if not self.unknown.isdisjoint(ids):
            raise BadRow("unknown token", "a character that the tokenizer's vocabulary does not have")
        if not ids:
            raise BadRow("empty prompt", "no tokens")
        return ids


def _column(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    if value is None:
        state = "null" if column in row else f"not among {', '.join(map(repr, row)) or 'no columns'}"
        raise BadRow("missing column", f"{column!r} is {state}")
    return value


def _accept_row(row: Mapping[str, Any]) -> None:
    """The check of rows where no reward has one."""


# --- sources → prompts ---------------------------------------------------------------------------------


def load_prompts(
    settings: DataSettings,
    tokenizer: Any,
    *,
    max_length: int,
    max_new_tokens: int,
    max_heldout: int,
    seed: int,
    quarantine: Quarantine,
    required_columns: Sequence[str] = (),
    check_row: Callable[[Mapping[str, Any]], None] = _accept_row,
) -> PromptData:
    """Read training and held-out prompts.

    `required_columns` are what the rewards need in every row, and `check_row` raises ValueError for a row
    whose answer they cannot grade by; `max_heldout` bounds the held-out prompts.

    Raises ValueError where a source cannot be read or has no good row, or no held-out prompt can be had.
    """
    room = max_length - max_new_tokens
    if room < 1:
        raise ValueError(
            f"rollout.max_new_tokens = {max_new_tokens} leaves no room for a prompt in model.max_length = "
            f"{max_length}: lower the first or raise the second"
        )
    encoder = Encoder(tokenizer, settings, min(room, settings.max_prompt_tokens or room))
    using: dict[str, Any] = {
        "encoder": encoder,
        "quarantine": quarantine,
        "required_columns": required_columns,
        "check_row": check_row,
    }
    if not settings.heldout:
        source = _read_prompts("train", settings, **using, limit=settings.max_rows)
        return split_heldout(source, settings.heldout_fraction or DEFAULT_HELDOUT_FRACTION, max_heldout, seed)
    heldout = _read_prompts("heldout", settings, **using, limit=max_heldout)
    taken = frozenset(prompt.token_ids for prompt in heldout.prompts)
    train = _read_prompts("train", settings, **using, limit=settings.max_rows, taken=taken)
    return PromptData(train, heldout)


def _read_prompts(
    split: str,
    settings: DataSettings,
    *,
    encoder: Encoder,
    quarantine: Quarantine,
    required_columns: Sequence[str],
    check_row: Callable[[Mapping[str, Any]], None],
    limit: int | None,
    taken: frozenset[tuple[int, ...]] = frozenset(),
) -> PromptSet:
    train = split == "train"
    name = settings.train if train else settings.heldout
    reading = Reading(name, quarantine)
    rows = read_rows(
        name,
        reading,
        field=f"data.{split}",
        split=settings.train_split if train else settings.heldout_split,
        subset=settings.subset,
        revision=settings.revision,
    )
    prompts: dict[str, Prompt] = {}
    for line, row in rows:
        try:
            prompt = _prompt(split, line, row, settings=settings, encoder=encoder)
            _check_answers(row, required_columns, check_row)
            if prompt.id in prompts:
                raise BadRow("duplicate id", f"{prompt.id!r} stands in an earlier row")
            if prompt.token_ids in taken:
                raise BadRow("in held-out set", "the same prompt is in data.heldout")
        except BadRow as bad:
            reading.reject(line, bad, json.dumps(row, ensure_ascii=False))
        else:
            prompts[prompt.id] = prompt
            if len(prompts) == limit:
                break
    reading.require_good(len(prompts), f"data.{split}")
    return PromptSet(tuple(prompts.values()), _counts(reading, len(prompts)))


def _prompt(
    split: str,
    line: int,
    row: dict[str, Any],
    *,
    settings: DataSettings,
    encoder: Encoder,
) -> Prompt:
    ids, text = encoder.prompt(row)
    encoder.check_length(len(ids))
    name: Any = line
    if settings.id_column:
        name = _column(row, settings.id_column)
        if not isinstance(name, str | int):
            raise BadRow(
                "wrong type", f"{settings.id_column!r} is a {type(name).__name__}, not a text or number"
            )
    return Prompt(id=f"{split}:{name}", token_ids=ids, text=text, row=row, source=encoder.source(row))


def _check_answers(
    row: Mapping[str, Any], required: Sequence[str], check_row: Callable[[Mapping[str, Any]], None]
) -> None:
    """BadRow where the rewards lack a column or could not grade any completion by what is in it."""
    for column in required:
        _column(row, column)
    try:
        check_row(row)
    except ValueError as error:
        raise BadRow("bad answer", str(error)) from error


def _counts(reading: Reading, good: int) -> Counts:
    lines = good + reading.blank + sum(reading.quarantined.values())
    return Counts(lines, good, reading.blank, dict(reading.quarantined))


def split_heldout(source: PromptSet, fraction: float, largest: int, seed: int) -> PromptData:
    """Set `fraction` of the distinct prompts aside, at least one, at most `largest`, with all their rows.

    Which ones depends on the seed and the prompts' tokens only, not on the order of rows: the prompts with
    the smallest SHA-256 of (seed, tokens) are held out.
    """

    def rank(ids: tuple[int, ...]) -> bytes:
        return hashlib.sha256(f"{seed}:{ids}".encode()).digest()

    distinct = sorted({prompt.token_ids for prompt in source.prompts}, key=rank)
    if len(distinct) < 2:
        raise ValueError(
            "data.train has only one distinct prompt, so none can be held out: add rows or name data.heldout"
        )
    size = min(max(1, round(fraction * len(distinct))), largest, len(distinct) - 1)
    aside = set(distinct[:size])
    train = tuple(prompt for prompt in source.prompts if prompt.token_ids not in aside)
    heldout = tuple(prompt for prompt in source.prompts if prompt.token_ids in aside)
    return PromptData(PromptSet(train, source.counts), PromptSet(heldout, source.counts))


def load_demonstrations(
    path: str | Path,
    tokenizer: Any,
    max_length: int,
    *,
    quarantine: Quarantine,
    settings: DataSettings | None = None,
    taken: frozenset[tuple[int, ...]] = frozenset(),
    field: str = "warmup.data",
    from_hub: bool = False,
    limit: int | None = None,
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs (prompt ids, completion ids with the end token) from a file of `prompt` and `completion` rows.

    `settings` gives column names and the use of chat templates; without it the defaults hold. `taken` are
    the held-out prompts: a demonstration of one is put aside. `field` is the setting that names the file;
    `from_hub`: a dataset's subset and revision are those of `settings`. No more than `limit` rows are read.
    """
    settings = settings or DataSettings.model_validate({"train": str(path)})
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end token (eos_token), so demonstrations cannot be ended: set one"
        )
    encoder = Encoder(tokenizer, settings, max_length)
    reading = Reading(str(path), quarantine)
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    hub: dict[str, Any] = {"subset": settings.subset, "revision": settings.revision} if from_hub else {}
    for line, row in read_rows(str(path), reading, field=field, split=settings.train_split, **hub):
        if len(pairs) == limit:
            break
        try:
            prompt, _ = encoder.prompt(row)
            completion = encoder.completion(row)
            encoder.check_length(len(prompt) + len(completion))
            if prompt in taken:
                raise BadRow("in held-out set", "evaluation uses the same prompt")
        except BadRow as bad:
            reading.reject(line, bad, json.dumps(row, ensure_ascii=False))
        else:
            pairs.append((prompt, completion))
    reading.require_good(len(pairs), field)
    return pairs

"""A preference: for this prompt, this response was chosen over that one. Standard library only.

Keys are SHA-256 in hex, the same on every machine and in every run:

    prompt_key = H(messages as JSON), a text counting as one user message
    key        = H(prompt_key, the two responses' own hashes in sorted order)

Before hashing, white space is folded in a prompt and stripped from a response, and both are brought to
Unicode's composed form (NFC): two rows that differ only there are the same prompt, so a split by prompt
cannot put one of them on each side. The texts themselves stay as they are.
"""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Preference:
    """One label: `chosen` was preferred to `rejected` as a response to `prompt`.

    `margin` is what the rewards should differ by at least, `weight` the label's weight in the loss,
    `annotator` who gave it ("" if unknown), `subset` a group for evaluation, `line` where the row stood in
    its file, counted from 1 (0: in none), and `row` the columns of the row that were asked for.
    `chosen_finished`, `rejected_finished`: whether the response ends there, or was cut off.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0
    weight: float = 1.0
    annotator: str = ""
    subset: str = ""
    line: int = 0
    row: Mapping[str, Any] | None = None
    chosen_finished: bool = True
    rejected_finished: bool = True

    @property
    def prompt_key(self) -> str:
        """The prompt's identity: all labels of one prompt have the same."""
        return prompt_key(self.prompt)

    @property
    def key(self) -> str:
        """The pair's identity: the same whichever response was chosen."""
        return pair_key(self.prompt, self.chosen, self.rejected)


def prompt_key(prompt: Prompt) -> str:
    """64 hex digits for a prompt; a text and a single user message of that text have the same."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    folded = [
        {
            name: " ".join(_composed(value).split()) if isinstance(value, str) else value
            for name, value in one.items()
        }
        for one in messages
    ]
    return _digest(json.dumps(folded, sort_keys=True))


def response_key(response: str) -> str:
    """64 hex digits for a response, white space at its ends aside."""
    return _digest(_composed(response).strip())


def pair_key(prompt: Prompt, first: str, second: str) -> str:
    """64 hex digits for a prompt with two responses, in either order."""
    return join_keys(prompt_key(prompt), response_key(first), response_key(second))


def join_keys(prompt: str, first: str, second: str) -> str:
    """The pair's key from the keys of its parts."""
    return _digest("\n".join((prompt, *sorted((first, second)))))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

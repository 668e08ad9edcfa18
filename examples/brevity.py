"""A reward of one's own: short answers score higher. Used by examples/pretrained.toml."""

from collections.abc import Mapping
from typing import Any

LONG = 400  # characters


def brevity(prompt: Any, completion: str, row: Mapping[str, Any]) -> dict[str, float]:
    """1 for an empty answer, falling to 0 at LONG characters.

    `prompt` is the row's own prompt (a text or chat messages), `row` the whole row. A plain number may be
    returned; in a mapping, "reward" is the reward and every other number is logged beside it.
    """
    return {"reward": max(0.0, 1.0 - len(completion) / LONG), "characters": float(len(completion))}

"""Takes secrets out of what is written down: the configuration, log lines, the summary."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"
_SECRET_NAME = re.compile(r"key|token(?!iz)|secret|password|passwd|credential", re.IGNORECASE)
_SHORTEST_SECRET = 8  # shorter values of the environment are everyday words


def redact(value: Any, name: str = "") -> Any:
    """A copy in which every text under a telling name is replaced, at any depth.

    Only texts: `max_new_tokens = 64` is no secret. Texts elsewhere go through `scrub`.
    """
    if isinstance(value, Mapping):
        return {
            key: redact(item, name if _SECRET_NAME.search(name) else str(key)) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    if isinstance(value, str):
        return HIDDEN if value and _SECRET_NAME.search(name) else scrub(value)
    return value


def scrub(text: str) -> str:
    """The text without the values of environment variables that have a telling name."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name) and value in text:
            text = text.replace(value, HIDDEN)
    return text

"""Takes secrets out of what is written down: the configuration, log lines, the summary."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rewards.reward_child import HIDDEN, without_secrets

_SECRET_NAME = re.compile(
    r"key|token(?!iz)|secret|passw|passphrase|credential|(?<![a-z])(pat|dsn|auth)(?![a-z])", re.IGNORECASE
)
_LOGIN_IN_URL = re.compile(r"(?P<before>\w://[^\s/@:]*:)[^\s/@]+(?=@)")
_AUTHORIZATION = re.compile(
    r"(?P<before>authorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)\s+)[\w.~+/=-]+", re.IGNORECASE
)
_named: set[str] = set()


def hide_variables(names: Iterable[str]) -> None:
    """Treat these environment variables of this process as secrets too, whatever they are called."""
    _named.update(names)


def secret_variables(keep: Iterable[str] = ()) -> list[str]:
    """Environment variables with a telling name, or named to `hide_variables`, but for those in `keep`."""
    kept = set(keep)
    return [name for name in os.environ if name not in kept and (name in _named or _SECRET_NAME.search(name))]


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
    """The text without secrets: values of environment variables that have a telling name or were named to
    `hide_variables`, passwords in addresses, and tokens in headers.
    """
    text = without_secrets(text, _secrets())
    if "://" in text:
        text = _LOGIN_IN_URL.sub(rf"\g<before>{HIDDEN}", text)
    return _AUTHORIZATION.sub(rf"\g<before>{HIDDEN}", text)


def _secrets() -> Iterator[str]:
    """The values to hide."""
    for name, value in os.environ.items():
        if name in _named or _SECRET_NAME.search(name):
            yield value

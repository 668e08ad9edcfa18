"""Tokenizers that several tests of data read with."""

from typing import Any

import pytest
from data_helpers import ALPHABET, TEMPLATE

from cluster.scratch import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token a character: ids 0–3 are special."""
    return build_tokenizer(ALPHABET, 256)


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    """The same with a chat template."""
    made = build_tokenizer(ALPHABET, 256)
    made.chat_template = TEMPLATE
    return made

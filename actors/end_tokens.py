"""The tokens at which a model stops."""

import contextlib
from pathlib import Path
from typing import Any

from rewards.models.foreign import opening


def end_tokens(model_path: str, tokenizer: Any = None) -> frozenset[int]:
    """Every token id that ends a response: the tokenizer's, the model's, and its generation config's.

    The folder's own tokenizer may be given, where it is loaded already.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    found: set[int] = set()
    with opening(f"model {model_path}: its tokenizer or configuration cannot be read"):
        sources: list[Any] = [
            tokenizer or AutoTokenizer.from_pretrained(model_path, trust_remote_code=False),
            AutoConfig.from_pretrained(model_path, trust_remote_code=False),
        ]
        if not Path(model_path).is_dir() or (Path(model_path) / "generation_config.json").exists():
            with contextlib.suppress(OSError):  # a hub model without that file
                sources.append(GenerationConfig.from_pretrained(model_path))
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        several = ids if isinstance(ids, list | tuple | set) else [] if ids is None else [ids]
        if odd := [one for one in several if not isinstance(one, int)]:
            raise ValueError(
                f"model {model_path}: {type(source).__name__} names {odd[0]!r} as an end token; "
                "eos_token_id must be a token's number, or a list of such: correct it"
            )
        found |= {one for one in several if one >= 0}
    if not found:
        raise ValueError(f"model {model_path}: neither tokenizer nor configuration names an end token")
    return frozenset(found)

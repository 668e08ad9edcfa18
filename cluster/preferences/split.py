"""Which prompts are held out, and which half of the others a prompt is in.

Each answer depends on the seed and the prompt alone. So a prompt never changes sides when rows are added, and
models trained on files that overlap still have the same held-out prompts and disjoint halves.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal


def heldout_prompts(keys: Sequence[str], fraction: float, seed: int) -> set[int]:
    """The places in `keys` (distinct prompt keys) that are held out: those whose hash is below `fraction`.

    At least one is held out and at least one is left, whatever the hashes. ValueError with fewer than two.
    """
    if len(keys) < 2:
        raise ValueError(
            "preferences.train has only one distinct prompt, so none can be held out: add rows or name "
            "preferences.heldout"
        )
    ranks = [_uniform("heldout", seed, key) for key in keys]
    chosen = {place for place, rank in enumerate(ranks) if rank < fraction}
    if not chosen:
        return {min(range(len(keys)), key=ranks.__getitem__)}
    if len(chosen) == len(keys):
        chosen.remove(max(chosen, key=ranks.__getitem__))
    return chosen


def part_of(key: str, seed: int) -> Literal["a", "b"]:
    """The half that a prompt's labels belong to, each with probability ½."""
    return "a" if _uniform("part", seed, key) < 0.5 else "b"


def _uniform(purpose: str, seed: int, key: str) -> float:
    digest = hashlib.sha256(f"{purpose}:{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64

"""What an audit finds."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not in order, and the remedy."""

    what: str
    remedy: str

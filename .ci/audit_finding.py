"""What an audit looks at, and what it finds."""

import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not in order, and the remedy."""

    what: str
    remedy: str


def distributions() -> Iterator[metadata.Distribution]:
    """Those on the path, but for copies that a package carries inside itself, as Ray does once imported."""
    site = Path(sysconfig.get_path("purelib")).resolve()
    path = [entry for entry in sys.path if site not in Path(entry or ".").resolve().parents]
    return iter(metadata.distributions(path=path))

"""Files of rows as bytes, whether or not they are packed with gzip."""

import gzip
import zlib
from pathlib import Path
from typing import BinaryIO, cast

PACKED = ".gz"
# What reading a damaged or cut-off file can raise; gzip's own error is an OSError.
READ_ERRORS = (OSError, EOFError, zlib.error)


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, in lower case: `.jsonl` of `train.jsonl.gz` too."""
    plain = path.with_suffix("") if path.suffix.lower() == PACKED else path
    return plain.suffix.lower()


def open_rows(path: Path) -> BinaryIO:
    """The file's content, unpacked as it is read."""
    if path.suffix.lower() == PACKED:
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")

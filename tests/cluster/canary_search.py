"""Searches everything that a run leaves or shows for secrets that were planted in its environment."""

import base64
import bz2
import contextlib
import gzip
import html
import io
import json
import lzma
import tarfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import psutil
from wandb_files import records

_DEEPEST = 4  # archives inside archives
_LARGEST = 256 * 1024 * 1024


def forms(secret: str) -> set[bytes]:
    """How a secret may be written: plainly, as UTF-16, hexadecimal, base64 at any offset, or with escapes."""
    plain = secret.encode()
    found = {plain, secret.encode("utf-16-le"), plain.hex().encode(), plain.hex().upper().encode()}
    escaped = (urllib.parse.quote(secret, safe=""), json.dumps(secret)[1:-1], html.escape(secret))
    found |= {text.encode() for text in escaped}
    for shift in range(3):
        # Three bytes make four characters, so there are three ways to begin; the first character and the last
        # ones depend on what stands around the secret and are left out.
        text = base64.b64encode(b"\0" * shift + plain)
        first, last = -(-shift * 4 // 3), -4 if (shift + len(plain)) % 3 else len(text)
        for alphabet in (text, text.replace(b"+", b"-").replace(b"/", b"_")):
            found.add(alphabet[first:last])
    return found


def found_in(content: bytes, secrets: Mapping[str, str], name: str = "", depth: int = 0) -> set[str]:
    """Names of the secrets that stand in some bytes, or in what they are an archive or a log of."""
    seen = {label for label, secret in secrets.items() if any(form in content for form in forms(secret))}
    if depth < _DEEPEST:
        for inner in _inside(content, name):
            seen |= found_in(inner, secrets, depth=depth + 1)
    return seen


def _inside(content: bytes, name: str) -> Iterator[bytes]:
    """The parts of an archive, and compressed content unpacked; nothing of what is neither."""
    if content.startswith(b"PK") and zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield from (archive.read(one) for one in archive.namelist())
    openers = ((b"\x1f\x8b", gzip.decompress), (b"BZh", bz2.decompress), (b"\xfd7zXZ", lzma.decompress))
    for magic, unpack in openers:
        if content.startswith(magic):
            with contextlib.suppress(OSError, EOFError, lzma.LZMAError, ValueError):
                yield unpack(content)
    if content[:1] == b"\x78":
        with contextlib.suppress(zlib.error):
            yield zlib.decompress(content)
    if content[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive.getmembers():
                if (file := archive.extractfile(member)) is not None:
                    yield file.read()
    if name.endswith(".wandb"):  # a record may be cut in pieces, with bytes of the log's own between them
        yield from records(content)


def search_tree(root: Path, secrets: Mapping[str, str]) -> tuple[dict[str, set[str]], int]:
    """Files under `root` with secrets in their content or name, and how many files were looked into."""
    hits: dict[str, set[str]] = {}
    count = 0
    for path in sorted(root.rglob("*")):
        seen = found_in(str(path.relative_to(root)).encode(), secrets)
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile, or a link to nowhere
            if path.is_file():
                assert path.stat().st_size <= _LARGEST, f"{path} is too large to be searched"
                seen |= found_in(path.read_bytes(), secrets, path.name)
                count += 1
        if seen:
            hits[str(path)] = seen
    return hits, count


def search_commands(processes: Iterable[psutil.Process], secrets: Mapping[str, str]) -> dict[str, set[str]]:
    """Command lines with secrets in them, as everybody on the host can read them."""
    hits: dict[str, set[str]] = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            line = "\0".join(process.cmdline())
            if seen := found_in(line.encode(), secrets):
                hits[line] = seen
    return hits

"""A file that is one JSON array of objects, taken apart into the text of each element."""

import json
import re
from collections.abc import Iterator

_SPACE = re.compile(r"[ \t\r\n]*")
_BEGINS = re.compile(rb"(\xef\xbb\xbf)?[ \t\r\n]*\[[ \t\r\n]*\{")


def begins_array(head: bytes) -> bool:
    """Whether a file with this beginning is an array of objects, and so no JSON Lines."""
    return _BEGINS.match(head) is not None


def array_elements(text: str) -> Iterator[str]:
    """The text of each element of the array that `text` is.

    Raises ValueError where what follows is no element, or something follows the array.
    """
    decoder = json.JSONDecoder()
    place = _next(text, 0) + 1
    more = True
    while more:
        start = _next(text, place)
        try:
            _, end = decoder.raw_decode(text, start)
        except RecursionError as error:
            raise ValueError("nested too deep") from error
        yield text[start:end]
        place = _next(text, end) + 1
        mark = text[place - 1 : place]
        if mark not in (",", "]") or not mark:
            raise ValueError(f"neither ',' nor ']' but {mark!r} follows an element: character {place - 1}")
        more = mark == ","
    rest = _next(text, place)
    if rest != len(text):
        raise ValueError(f"{text[rest : rest + 20]!r} follows the array: character {rest}")


def _next(text: str, place: int) -> int:
    """Where the first character from `place` on stands that is no white space."""
    found = _SPACE.match(text, place)
    assert found is not None, "the pattern matches nothing at all, too"
    return found.end()

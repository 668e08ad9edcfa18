"""From the bytes of a terminal to keys: what an escape sequence or a pasted text spells is no choice."""

import re

_SEQUENCE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|O[ -~]|[^\[O])", re.DOTALL)
_PASTE, _PASTE_END = b"\x1b[200~", b"\x1b[201~"
_NAMES = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1bOA": "up",
    b"\x1bOB": "down",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b"\x1b[H": "home",
    b"\x1b[F": "end",
}
CTRL_C, ESCAPE = "ctrl-c", "escape"


class Keys:
    """Collects bytes until they are a key; unknown sequences are no key."""

    def __init__(self) -> None:
        self._bytes = b""
        self._pasting = False

    @property
    def waiting(self) -> bool:
        """Whether an escape sequence has begun."""
        return bool(self._bytes) and not self._pasting

    def feed(self, data: bytes) -> list[str]:
        """The keys that are complete with these bytes."""
        self._bytes += data
        keys: list[str] = []
        while self._bytes:
            if self._pasting:
                if not self._leave_paste():
                    break
            elif self._bytes[:1] == b"\x1b":
                found = _SEQUENCE.match(self._bytes)
                if found is None:
                    break  # not whole yet
                self._bytes = self._bytes[found.end() :]
                self._pasting = found.group() == _PASTE
                keys += [_NAMES[found.group()]] if found.group() in _NAMES else []
            else:
                keys += [self._single()]
        return keys

    def _leave_paste(self) -> bool:
        """Drop what is pasted; true once its end has come."""
        place = self._bytes.find(_PASTE_END)
        if place < 0:
            self._bytes = self._bytes[-len(_PASTE_END) :]  # its end may be split
            return False
        self._bytes = self._bytes[place + len(_PASTE_END) :]
        self._pasting = False
        return True

    def _single(self) -> str:
        byte, self._bytes = self._bytes[:1], self._bytes[1:]
        return CTRL_C if byte == b"\x03" else byte.decode("latin-1")

    def timeout(self) -> list[str]:
        """Nothing came after an escape: it was the key of that name, or a sequence that broke off."""
        alone = self._bytes == b"\x1b"
        self._bytes = b""
        return [ESCAPE] if alone else []

"""One annotator going through ranked pairs: which comes next, what a choice means, what undo takes back.

A pure state machine. What it returns is to be written down before the next key is read.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from cluster.labelling.records import Annotation, Choice, Name, Pair

Pressed = Literal["a", "b", "tie", "skip"]


def shown_first(pair: Pair, annotator: str, seed: int) -> Name:
    """Which response of the pair this annotator sees as A: a coin that falls the same way every time."""
    digest = hashlib.sha256(f"shown:{seed}:{annotator}:{pair.key}".encode()).digest()
    return "a" if digest[0] < 128 else "b"


class Session:
    """The pairs in their order, and this annotator's choices so far, the latest last."""

    def __init__(
        self, pairs: Sequence[Pair], annotator: str, *, seed: int = 0, earlier: Iterable[Annotation] = ()
    ) -> None:
        """`earlier` are the annotations of the file that the session goes on with."""
        self.pairs = pairs
        self.annotator = annotator
        self._seed = seed
        self._choices: dict[str, Choice] = {}  # in the order in which they were made
        known = {pair.key: pair for pair in pairs}
        self._pairs = known
        for one in earlier:
            if one.annotator == annotator and one.key in known:
                self._note(one.key, one.choice)
        self._queue = [pair for pair in reversed(pairs) if pair.key not in self._choices]

    def _note(self, key: str, choice: Choice) -> None:
        self._choices.pop(key, None)
        if choice != "undo":
            self._choices[key] = choice

    @property
    def current(self) -> Pair | None:
        """The pair to show; None when all are done."""
        return self._queue[-1] if self._queue else None

    def remaining(self) -> list[Pair]:
        """The pairs that are not done, in the order in which they will be shown."""
        return self._queue[::-1]

    @property
    def done(self) -> int:
        """Pairs with a choice, a tie or a skip."""
        return len(self._choices)

    def first(self, pair: Pair) -> Name:
        """The response that is shown as A."""
        return shown_first(pair, self.annotator, self._seed)

    def choose(self, pressed: Pressed, *, seconds: float | None = None, time: str = "") -> Annotation:
        """What a key means for the current pair; A is the response that is shown first."""
        pair = self._queue.pop()
        first = self.first(pair)
        second: Name = "b" if first == "a" else "a"
        choice: Choice = pressed
        if pressed in ("a", "b"):
            choice = first if pressed == "a" else second
        self._note(pair.key, choice)
        return Annotation(pair.key, choice, self.annotator, first, seconds=seconds, time=time)

    def undo(self, *, time: str = "") -> Annotation | None:
        """Take back the latest choice, also an earlier session's, and show its pair; None: no choice."""
        if not self._choices:
            return None
        key = next(reversed(self._choices))
        pair = self._pairs[key]
        self._note(key, "undo")
        self._queue.append(pair)
        return Annotation(key, "undo", self.annotator, self.first(pair), time=time)

    def summary(self) -> str:
        """How far it is."""
        counts = Counter("decided" if one in ("a", "b") else one for one in self._choices.values())
        told = f"{counts['decided']} decided, {counts['tie']} ties, {counts['skip']} skipped"
        return f"{self.done} of {len(self.pairs)} pairs: {told}; {len(self._queue)} left"

"""All labels of one source while it is read: texts held once, duplicates and contradictions found.

A label is a duplicate if the same pair stands in an earlier row in the same order and from the same annotator
(or, in both rows, from nobody named). Contradictory is a pair that stands in both orders.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cluster.data_files import BadRow
from rewards.preferences.records import Preference, Prompt, prompt_key, response_key

Ints = NDArray[np.int64]
Pair = tuple[int, int, int]  # prompt, and its two responses in ascending order


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A pair in both orders: places of the labels that name the one response, and of those for the other."""

    forward: list[int]
    backward: list[int]


class LabelTable:
    """Labels in the order of their rows; `add` refuses duplicates. Prompts and responses are numbered."""

    def __init__(self) -> None:
        self.labels: list[Preference] = []
        self.prompt_keys: list[str] = []
        self._prompt, self._chosen, self._rejected = array("q"), array("q"), array("q")
        self._annotator, self._copies = array("q"), array("q")
        self._prompts: dict[str, int] = {}
        self._first_prompt: list[Prompt] = []
        self._responses: dict[bytes, int] = {}
        self._first_response: list[str] = []
        self.annotators: dict[str, int] = {"": 0}
        self._pairs: dict[Pair, int] = {}
        # Of pairs seen more than once: which place has the label of (order, annotator).
        self._signed: dict[Pair, dict[tuple[bool, int], int]] = {}

    def add(self, label: Preference) -> None:
        """Take a label in; BadRow for a duplicate."""
        prompt, shared = self._number_prompt(label.prompt)
        chosen, better = self._number_response(label.chosen)
        rejected, worse = self._number_response(label.rejected)
        annotator = self.annotators.setdefault(label.annotator, len(self.annotators))
        pair = (prompt, min(chosen, rejected), max(chosen, rejected))
        place = len(self.labels)
        first = self._pairs.setdefault(pair, place)
        if first != place:
            self._check_new(pair, (chosen < rejected, annotator), first, place)
        self.labels.append(replace(label, prompt=shared, chosen=better, rejected=worse))
        for column, number in (
            (self._prompt, prompt),
            (self._chosen, chosen),
            (self._rejected, rejected),
            (self._annotator, annotator),
            (self._copies, 1),
        ):
            column.append(number)

    def _check_new(self, pair: Pair, sign: tuple[bool, int], first: int, place: int) -> None:
        signed = self._signed.setdefault(pair, {self._sign(first): first})
        earlier = signed.setdefault(sign, place)
        if earlier != place:
            self._copies[earlier] += 1
            raise BadRow("duplicate", f"the same label stands in line {self.labels[earlier].line}")

    def _sign(self, place: int) -> tuple[bool, int]:
        return self.forward(place), self._annotator[place]

    def _number_prompt(self, prompt: Prompt) -> tuple[int, Prompt]:
        key = prompt_key(prompt)
        number = self._prompts.setdefault(key, len(self._prompts))
        if number == len(self.prompt_keys):
            self.prompt_keys.append(key)
            self._first_prompt.append(prompt)
        first = self._first_prompt[number]
        return number, first if first == prompt else prompt

    def _number_response(self, text: str) -> tuple[int, str]:
        key = bytes.fromhex(response_key(text))
        number = self._responses.setdefault(key, len(self._responses))
        if number == len(self._first_response):
            self._first_response.append(text)
        first = self._first_response[number]
        return number, first if first == text else text

    # --- what was found --------------------------------------------------------------------------------

    @property
    def prompt(self) -> Ints:
        """(N,) the number of each label's prompt."""
        return np.array(self._prompt, np.int64)

    @property
    def chosen(self) -> Ints:
        """(N,) the number of each label's better response."""
        return np.array(self._chosen, np.int64)

    @property
    def rejected(self) -> Ints:
        """(N,) the number of each label's worse response."""
        return np.array(self._rejected, np.int64)

    @property
    def annotator(self) -> Ints:
        """(N,) the number of each label's annotator; 0 is nobody named."""
        return np.array(self._annotator, np.int64)

    @property
    def copies(self) -> Ints:
        """(N,) how many rows had each label."""
        return np.array(self._copies, np.int64)

    @property
    def votes(self) -> Ints:
        """(N,) how many rows each counts for in a dispute: those of nobody named all count.

        A named annotator's second row of the same kind is a copy, not a second opinion.
        """
        return np.where(self.annotator == 0, self.copies, 1)

    def prompt_of(self, place: int) -> int:
        """The number of one label's prompt."""
        return self._prompt[place]

    def forward(self, place: int) -> bool:
        """Which order a label has: the same for all labels that name the same response of a pair."""
        return self._chosen[place] < self._rejected[place]

    def pair_prompts(self) -> Ints:
        """(pairs,) the prompt of each distinct pair."""
        return np.fromiter((pair[0] for pair in self._pairs), np.int64, len(self._pairs))

    @property
    def distinct_pairs(self) -> int:
        """Pairs, however often they were labelled."""
        return len(self._pairs)

    def repeated(self) -> Iterator[list[int]]:
        """The places of the labels of each pair that has at least two different ones."""
        yield from (list(signed.values()) for signed in self._signed.values() if len(signed) > 1)

    def contradictions(self) -> list[Contradiction]:
        """Every pair in both orders."""
        found = []
        for places in self.repeated():
            forward = [place for place in places if self.forward(place) == self.forward(places[0])]
            backward = [place for place in places if self.forward(place) != self.forward(places[0])]
            if backward:
                found.append(Contradiction(forward, backward))
        return found

    def settle(self, policy: Literal["majority", "put-aside", "keep", "refuse"]) -> dict[int, BadRow]:
        """Which labels to put aside for contradicting others, and why. ValueError if the policy refuses."""
        found = self.contradictions()
        if policy == "refuse" and found:
            lines = ", ".join(
                f"{self.labels[one.forward[0]].line} and {self.labels[one.backward[0]].line}"
                for one in found[:5]
            )
            raise ValueError(
                f'preferences.contradictions = "refuse", but {len(found)} pairs stand in both orders '
                f"(lines {lines}{', …' if len(found) > 5 else ''}): correct them, or choose another policy"
            )
        aside: dict[int, BadRow] = {}
        if policy == "keep":
            return aside
        votes = self.votes
        for one in found:
            forward, backward = (
                sum(self.labels[place].weight * int(votes[place]) for place in side)
                for side in (one.forward, one.backward)
            )
            for mine, other, weight, against in (
                (one.forward, one.backward, forward, backward),
                (one.backward, one.forward, backward, forward),
            ):
                if policy == "majority" and weight > against:
                    continue
                line = self.labels[other[0]].line
                detail = f"line {line} has the same pair the other way round"
                if policy == "majority":
                    detail += f" (weight {weight:g} against {against:g})"
                aside.update({place: BadRow("contradiction", detail) for place in mine})
        return aside

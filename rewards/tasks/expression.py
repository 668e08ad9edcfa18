"""Arithmetic of a model's text, by an own parser: never evaluated as code, exact, and bounded in all ways.

    sum     = product { ("+" | "-") product }
    product = factor  { ("*" | "/") factor }
    factor  = NUMBER | "-" factor | "(" sum ")"

Numbers are plain ASCII digits without leading zeros. Powers, calls, names and anything else are refused.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 256  # characters
MAX_DEPTH = 32  # nested parentheses and signs
MAX_DIGITS = 9  # of one number

_SPELLINGS = str.maketrans({"×": "*", "∗": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
_TOKEN = re.compile(r"[ \t\n]*(?:([0-9]+)|([-+*/()]))")


class ExpressionError(Exception):
    """The text is no arithmetic expression within the bounds, or it divides by zero."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The exact value of an expression, and the numbers in it from left to right."""

    value: Fraction
    numbers: tuple[int, ...]


def evaluate(text: str) -> Evaluated:
    """Parse and compute; `ExpressionError` if it cannot be done."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"longer than {MAX_LENGTH} characters")
    tokens = _tokens(text.translate(_SPELLINGS).strip(" \t\n"))
    parser = _Parser(tokens)
    value = parser.sum(0)
    if parser.peek() is not None:
        raise ExpressionError(f"{parser.peek()!r} is out of place")
    return Evaluated(value, tuple(token for token in tokens if isinstance(token, int)))


def _tokens(text: str) -> list[int | str]:
    tokens: list[int | str] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ExpressionError(f"{text[place]!r} is not arithmetic")
        digits, symbol = match.groups()
        if digits and (len(digits) > MAX_DIGITS or (digits[0] == "0" and len(digits) > 1)):
            raise ExpressionError("a number has too many digits or a leading zero")
        tokens.append(int(digits) if digits else symbol)
        place = match.end()
    return tokens


class _Parser:
    """Recursive descent over tokens, computing as it goes."""

    def __init__(self, tokens: list[int | str]) -> None:
        self._tokens = tokens
        self._place = 0

    def peek(self) -> int | str | None:
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def _take(self) -> int | str | None:
        token = self.peek()
        self._place += 1
        return token

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while self.peek() in ("+", "-"):
            plus = self._take() == "+"
            term = self._product(depth)
            value = value + term if plus else value - term
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._factor(depth)
        while self.peek() in ("*", "/"):
            times = self._take() == "*"
            factor = self._factor(depth)
            if not times and factor == 0:
                raise ExpressionError("a division by zero")
            value = value * factor if times else value / factor
        return value

    def _factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise ExpressionError(f"nested more than {MAX_DEPTH} deep")
        symbol = self._take()
        if isinstance(symbol, int):
            return Fraction(symbol)
        if symbol == "-":
            return -self._factor(depth + 1)
        if symbol == "(":
            value = self.sum(depth + 1)
            if self._take() != ")":
                raise ExpressionError("a parenthesis is not closed")
            return value
        raise ExpressionError("a number is missing" if symbol is None else f"{symbol!r} is out of place")

"""Reads the final number of a text, and compares numbers exactly enough at any size."""

import decimal
import re
from decimal import Decimal

# Wide enough that a difference of two answers is exact; nothing traps, so that 1e999999999 is only a number.
CONTEXT = decimal.Context(prec=60, traps=[])

_BOXED = r"\boxed{"
_FRACTION = re.compile(r"\\[dt]?frac\{\s*([-+−]?[0-9.]+)\s*\}\{\s*([0-9.]+)\s*\}")
# A minus right after a digit, letter or closing bracket is an operator, not a sign: "10-3" ends in 3.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])[-+−])?"
    r"\$?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?P<exponent>[eE][-+]?[0-9]+)?"
    r"(?:/(?P<divisor>[0-9]+))?"
)


def last_number(text: str) -> Decimal | None:
    r"""The last number in `text`, or None.

    Understood: signs, thousands commas, decimals, exponents, `3/4`, `\frac{3}{4}`, a dollar sign. Where the
    text has a `\boxed{...}`, only the last box counts.
    """
    start = text.rfind(_BOXED)
    if start >= 0:
        text = _braced(text, start + len(_BOXED))
    text = _FRACTION.sub(lambda match: f" {match[1]}/{match[2]} ", text)
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007 - only the last one is wanted
        pass
    return _value(match) if match else None


def close(first: Decimal, second: Decimal, tolerance: float) -> bool:
    """Whether |first − second| ≤ tolerance."""
    difference = CONTEXT.abs(CONTEXT.subtract(first, second))
    return difference.is_finite() and difference <= Decimal(tolerance)


def _value(match: re.Match[str]) -> Decimal | None:
    """The number that a match spells; None for a division by zero and other nonsense."""
    text = match["digits"].replace(",", "") + (match["exponent"] or "")
    value = CONTEXT.create_decimal(text)
    if match["divisor"]:
        value = CONTEXT.divide(value, CONTEXT.create_decimal(match["divisor"]))
    if match["sign"] in ("-", "−"):
        value = CONTEXT.minus(value)
    return value if value.is_finite() else None


def _braced(text: str, start: int) -> str:
    """The text from `start` to the brace that closes it, or to the end."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return text[start:]

"""The answer in a text that a model wrote."""

from __future__ import annotations

import re
from decimal import Decimal

__all__ = ["answers", "last_number", "number_in"]

_NUMBER = re.compile(r"(?<![\w.,])-?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> str | None:
    r"""The last whole or decimal number of a text, thousands separators left out.

    >>> last_number("6 * 7 = 42, so the total is $1,042.")
    '1042'
    >>> last_number("from 10-5 to -5")
    '-5'
    """
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def number_in(text: str) -> str | None:
    """The last number of a text in one way of writing it; None where there is none.

    >>> number_in("It costs $1,042.50."), number_in("18.0 hours"), number_in("none")
    ('1042.5', '18', None)
    """
    found = last_number(text)
    if found is None:
        return None
    number = Decimal(found)
    whole = number == number.to_integral_value()
    return format(number.to_integral_value() if whole else number.normalize(), "f")


def answers(text: str, right: str) -> bool:
    r"""Whether a text gives the right answer: the same last number, or else the words themselves.

    right: as data sets have it; what stands before "####" (GSM8K) is its reasoning.

    >>> answers("So it is 18 dollars.", "3 + 15 = 18\n#### 18"), answers("In PARIS.", "Paris")
    (True, True)
    """
    right = right.rpartition("####")[2].strip()
    number = number_in(right)
    return number_in(text) == number if number is not None else right.casefold() in text.casefold()

"""The answer in a text that a model wrote, and whether two answers are the same.

`answer_of` and `equivalent` are SIFT's evaluation (2502.14922, Section 4). The last \\boxed{…} is
the answer. Where a model boxes nothing, the last number behind the last "answer" is taken, else
the last number of the text (ours: small models seldom box). Two answers are the same if they are
the same text once money, units, spaces and thousands separators are gone, or numbers less than
1e-6 apart; a fraction is a number. `number_in` and `answers` ask for less: the text's last number.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

__all__ = ["answer_of", "answers", "equivalent", "last_number", "number_in", "number_of"]

_LOOSE = re.compile(r"(?<![\w.,])-?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?")
_TOLERANCE = 1e-6
_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+"
_PLAIN = re.compile(rf"(?<![\w.])(?:{_NUMBER})(?:\s*/\s*\d+)?(?!\w)")
_WORDS = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\left": "", r"\right": "", "−": "-"}
_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))")
_ROOT = re.compile(r"\\sqrt\s*(?:\{([^{}]*)\}|(\w))")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_UNIT = re.compile(rf"^({_NUMBER}|-?\d+/\d+)[a-z²³]+(?:\^\{{?\d\}}?)?$")


def last_number(text: str) -> str | None:
    r"""The last whole or decimal number of a text, thousands separators left out.

    >>> last_number("6 * 7 = 42, so the total is $1,042.")
    '1042'
    >>> last_number("from 10-5 to -5")
    '-5'
    """
    found = _LOOSE.findall(text)
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


def answer_of(text: str) -> str | None:
    r"""What a text answers, as it stands there; None where it holds no answer.

    >>> answer_of(r"So it is \boxed{\frac{1}{2}}."), answer_of("3 + 4 = 7 apples"), answer_of("Hm.")
    ('\\frac{1}{2}', '7', None)
    """
    boxed = _last_boxed(text)
    if boxed:
        return boxed
    tail = re.split(r"(?i)\banswer\b", text)[-1]
    found = [re.sub(r"\s", "", one) for part in (tail, text) for one in _PLAIN.findall(part)[-1:]]
    return found[0] if found else None


def equivalent(one: str | None, other: str | None) -> bool:
    r"""Whether two answers are the same; an answer that is not there equals none.

    >>> equivalent("$1,000", "1000.0"), equivalent(r"\dfrac12", "0.5"), equivalent(None, None)
    (True, True, False)
    """
    if one is None or other is None:
        return False
    first, second = _normal(one), _normal(other)
    if first == second:
        return bool(first)
    numbers = number_of(one), number_of(other)
    if numbers[0] is None or numbers[1] is None:
        return False
    return abs(numbers[0] - numbers[1]) < _TOLERANCE


def number_of(answer: str | None) -> float | None:
    r"""The number an answer is, None where it is none.

    >>> number_of("18 dollars"), number_of(r"\frac{3}{4}"), number_of("Paris")
    (18.0, 0.75, None)
    """
    if answer is None:
        return None
    found = re.fullmatch(r"\(?(-?[\d.]+)\)?(?:/\(?(-?[\d.]+)\)?)?", _normal(answer))
    try:
        value = float(found[1]) / float(found[2] or 1) if found else math.nan
    except (ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) else None


def _last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{…} that is closed."""
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip()
    return None


def _normal(answer: str) -> str:
    """One way of writing for each answer."""
    text = answer.strip().lower()
    for before, after in _WORDS.items():
        text = text.replace(before, after)
    text = _TEXT.sub(r"\1", text)
    text = re.sub(r"^[a-z]\w?\s*=\s*", "", text)  # "x = 5"
    text = re.sub(r"\\[!,; ]|\^?\{?\\circ\}?|[$%€£\"]|\\(?=[$%])|\{,\}", "", text)
    text = _ROOT.sub(lambda found: f"sqrt({found[1] or found[2]})", text)
    text = _FRACTION.sub(lambda found: f"{found[1] or found[2]}/{found[3] or found[4]}", text)
    text = re.sub(r"\s+", "", text).rstrip(".")
    if unit := _UNIT.match(text):
        text = unit[1]
    if re.fullmatch(_NUMBER, text):
        text = text.replace(",", "")
        text = re.sub(r"\.0+$", "", text)
    return re.sub(r"^(-?)\.", r"\g<1>0.", text)

"""What kind of error a wrong sum is (arXiv 2402.14903, section 5 and the authors' analysis)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from pertoken.probe._addition import Problem
from pertoken.tokenize.numbers import Direction, groups

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Errors:
    """A wrong answer against the right one.

    length: digits of the answer minus those of the right one.
    digits, tokens: which are wrong, from the left; empty where the length is wrong, since then no
        alignment is certain (our reading), or the tokens are not known.
    power_of_ten: k where the answer is off by exactly 10^k, else None.
    carry_in, carry_out: wrong digits that should have taken, or given, a carry.
    dropped_digit: right if one digit of an addend is left out.
    left_aligned: right if the shorter addend is moved to the left end of the longer.
    chunkwise: right if groups are added one by one and their sums written in a row, with the
        groups matched from the left or from the right; both where they are as many.
    """

    length: int
    digits: tuple[bool, ...]
    tokens: tuple[bool, ...]
    power_of_ten: int | None
    carry_in: int
    carry_out: int
    dropped_digit: bool
    left_aligned: bool
    chunkwise: tuple[Side, ...]


def analyse(
    problem: Problem, answer: int, direction: Direction | None = None, group: int = 3
) -> Errors:
    """What is wrong with an answer.

    direction, group: how the numbers are cut into tokens; None where it is not regular.

    >>> errors = analyse(Problem(5555555, 5555555), 11112110, "l2r")
    >>> errors.digits.index(True), errors.tokens, errors.power_of_ten
    (4, (False, True, False), 3)
    """
    right, got = str(problem.answer), str(answer)
    digits: tuple[bool, ...] = ()
    tokens: tuple[bool, ...] = ()
    gave = carries(problem)
    took = 0
    given = 0
    if len(right) == len(got):
        digits = tuple(one != other for one, other in zip(right, got, strict=True))
        # A carry goes from each place of the addends to the next one on the left.
        for place, wrong in enumerate(reversed(digits)):
            took += wrong and place > 0 and gave[place - 1]
            given += wrong and place < len(gave) and gave[place]
        if direction is not None:
            both = zip(groups(right, direction, group), groups(got, direction, group), strict=True)
            tokens = tuple(one != other for one, other in both)
    off = str(abs(answer - problem.answer))
    return Errors(
        length=len(got) - len(right),
        digits=digits,
        tokens=tokens,
        power_of_ten=len(off) - 1 if off.rstrip("0") == "1" else None,
        carry_in=took,
        carry_out=given,
        dropped_digit=answer != problem.answer and answer in _with_a_digit_dropped(problem),
        left_aligned=problem.lengths[0] != problem.lengths[1] and answer == _left_aligned(problem),
        chunkwise=_chunkwise(problem, answer, direction, group),
    )


def carries(problem: Problem) -> list[bool]:
    """Does a carry leave each digit of the longer addend? From the right.

    >>> carries(Problem(95, 6))
    [True, True]
    """
    found, carry = [], 0
    digits = (reversed(str(number)) for number in (problem.first, problem.second))
    for one, other in zip_longest(*digits, fillvalue="0"):
        carry = int(int(one) + int(other) + carry > 9)
        found.append(bool(carry))
    return found


def longest_chain(problem: Problem) -> int:
    """Digits of the longest row of carries.

    >>> longest_chain(Problem(959, 61))
    3
    """
    longest = here = 0
    for carry in carries(problem):
        here = here + 1 if carry else 0
        longest = max(longest, here)
    return longest


def _with_a_digit_dropped(problem: Problem) -> set[int]:
    found = set()
    for number, other in ((problem.first, problem.second), (problem.second, problem.first)):
        text = str(number)
        shorter = (text[:place] + text[place + 1 :] for place in range(len(text)))
        found |= {int(each) + other for each in shorter if each}
    return found


def _left_aligned(problem: Problem) -> int:
    first, second, _ = problem.lengths
    width = max(first, second)
    return int(problem.first * 10 ** (width - first) + problem.second * 10 ** (width - second))


def _chunkwise(
    problem: Problem, answer: int, direction: Direction | None, group: int
) -> tuple[Side, ...]:
    if direction is None or answer == problem.answer:
        return ()
    one, other = (
        [int(part) for part in groups(str(number), direction, group)]
        for number in (problem.first, problem.second)
    )
    sums: dict[Side, str] = {
        "left": _in_a_row(one, other),
        "right": _in_a_row(one[::-1], other[::-1], backwards=True),
    }
    return tuple(side for side, text in sums.items() if answer == int(text))


def _in_a_row(one: Sequence[int], other: Sequence[int], backwards: bool = False) -> str:
    parts = [str(a + b) for a, b in zip_longest(one, other, fillvalue=0)]
    return "".join(parts[::-1] if backwards else parts)

"""Additions to ask a model: drawn by digit lengths, written in a format, read from its answer.

All as in "Tokenization counts" (arXiv 2402.14903) and the code of its authors, but for what is
marked "(our reading)".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from pertoken.errors import PertokenError, nearest
from pertoken.tokenize.numbers import format_number

Lengths = tuple[int, ...]

PAIRS: tuple[Lengths, ...] = tuple(product((7, 8, 9), repeat=2))
"""Digits of both addends; the paper asks 10 problems of each."""

TRIPLES: tuple[Lengths, ...] = (
    (7, 7, 7),
    (7, 7, 8),
    (8, 7, 8),
    (7, 8, 8),
    (8, 7, 9),
    (7, 8, 9),
    (8, 8, 8),
    (8, 8, 9),
    (9, 7, 9),
    (7, 9, 9),
    (9, 8, 9),
    (8, 9, 9),
    (9, 9, 9),
)
"""Digits of the addends and of the answer; the paper asks 100 problems of each."""

SEPARATORS = {"comma": ",", "space": " ", "dec": ".", "hashtag": "#", "dollar": "$", "foo": "foo"}
SYSTEM = "You are a helpful assistant."
_NUMBER = re.compile(f"[0-9](?:(?:{'|'.join(map(re.escape, SEPARATORS.values()))})*[0-9])*")
_MOST = 18  # digits that fit into 64 bits


@dataclass(frozen=True)
class Problem:
    """An addition."""

    first: int
    second: int

    @property
    def answer(self) -> int:
        """The right one."""
        return self.first + self.second

    @property
    def lengths(self) -> Lengths:
        """Digits of the addends and of the answer."""
        return len(str(self.first)), len(str(self.second)), len(str(self.answer))

    @property
    def longer(self) -> bool:
        """Does the answer have more digits than both addends?"""
        *addends, answer = self.lengths
        return answer > max(addends)


def draw(lengths: Sequence[int], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Addends [count, 2] of additions with the given digits, drawn as in the paper.

    lengths: of the addends, or of the addends and the answer. With the answer's length: the shorter
    addend is uniform over what leaves room for the other, then the answer over what is left.

    >>> draw((2, 3, 4), 2, np.random.default_rng(0)).sum(-1) > 999
    array([ True,  True])
    """
    check_lengths([lengths])
    if len(lengths) == 2:
        return np.stack([rng.integers(10 ** (n - 1), 10**n, count) for n in lengths], -1)
    first, second, total = lengths
    short, long = min(first, second), max(first, second)
    least = 10 ** (long - 1)  # of the longer addend
    shorter = rng.integers(10 ** (short - 1), min(10**short, 10**total - least), count)
    answer = rng.integers(
        np.maximum(10 ** (total - 1), shorter + least),
        np.minimum(10**long + shorter, 10**total),
    )
    pair = (shorter, answer - shorter)
    return np.stack(pair if first < second else pair[::-1], -1)


def check_lengths(lengths: Sequence[Sequence[int]]) -> None:
    """Refuse lengths that no addition has, and kinds that don't go together."""
    for one in lengths:
        shown = ",".join(map(str, one))
        if len(one) not in (2, 3) or not all(1 <= length <= _MOST for length in one):
            raise PertokenError(
                f"lengths {shown}: give the digits of both addends, and perhaps of the answer, "
                f"each from 1 to {_MOST}"
            )
        if len(one) == 3 and one[2] - max(one[:2]) not in (0, 1):
            raise PertokenError(
                f"lengths {shown}: no addition of {one[0]} and {one[1]} digits has an answer of "
                f"{one[2]}"
            )
    if len({len(one) for one in lengths}) > 1:
        raise PertokenError("lengths must all have the answer's digits, or none of them")


def problem_set(lengths: Sequence[Lengths] = PAIRS, each: int = 10, seed: int = 0) -> list[Problem]:
    """`each` problems of every length, the lengths in turn, as in the paper.

    >>> [problem.lengths for problem in problem_set([(1, 2, 2), (2, 2, 3)], each=1)]
    [(1, 2, 2), (2, 2, 3)]
    """
    rng = np.random.default_rng([seed, 0])
    columns = [draw(one, each, rng).tolist() for one in lengths]
    return [Problem(*pair) for row in zip(*columns, strict=True) for pair in row]


def shots_for(problem: Problem, count: int, lengths: Lengths, seed: Sequence[int]) -> list[Problem]:
    """Solved examples for a problem, of the same digit lengths; the problem itself is not among
    them (our reading).

    lengths: 2 where the answer's length was left free for the problem too, else 3.
    """
    rng = np.random.default_rng([*seed, 1])
    found: list[Problem] = []
    for _ in range(100):
        drawn = [Problem(*pair) for pair in draw(lengths, count, rng).tolist()]
        found += [each for each in drawn if each != problem]
        if len(found) >= count:
            return found[:count]
    raise PertokenError(f"there are no {count} other problems of lengths {lengths} to show")


@dataclass(frozen=True)
class Format:
    """How numbers are written in the question, in a repetition before the answer, in the answer.

    Each is "nosep" or a separator and a direction, such as "comma_r2l".
    """

    question: str
    repeat: str | None
    answer: str

    @classmethod
    def parse(cls, name: str) -> Format:
        """One name for all, question/answer, or question/repeat/answer.

        >>> Format.parse("nosep/comma_r2l/comma_r2l").respond(Problem(1234, 1))
        '1,234+1=1,235'
        """
        parts = name.split("/")
        for part in parts:
            _refuse_style(part)
        if len(parts) == 1:
            return cls(name, None, name)
        if len(parts) == 2:
            return cls(parts[0], None, parts[1])
        if len(parts) == 3:
            return cls(parts[0], parts[1], parts[2])
        raise PertokenError(f"format {name!r} has more than question/repeat/answer")

    def ask(self, problem: Problem) -> str:
        """The question."""
        return _sum(problem, self.question)

    def respond(self, problem: Problem) -> str:
        """The right answer, behind a repetition where there is to be one."""
        again = "" if self.repeat is None else _sum(problem, self.repeat)
        return again + write(problem.answer, self.answer)


@dataclass(frozen=True)
class Reading:
    """What was read from a response.

    answer: None where it does not hold exactly one number. format_kept: is it written as asked?
    repeated: were the addends copied right? None where they were not to be.
    """

    answer: int | None
    format_kept: bool
    repeated: bool | None


def read(response: str, problem: Problem, form: Format) -> Reading:
    """Read a response as the paper's authors do: separators do not count, one number is wanted.

    >>> read(" 1,235", Problem(1234, 1), Format.parse("nosep"))
    Reading(answer=1235, format_kept=False, repeated=None)
    """
    front, equals, back = response.rpartition("=") if form.repeat else ("", "", response)
    written = _NUMBER.findall(back)
    answer = _whole(written[0]) if len(written) == 1 else None
    kept = answer is not None and written[0] == write(answer, form.answer)
    repeated = None
    if form.repeat is not None:
        copies = [_whole(text) for part in front.split("+") for text in _NUMBER.findall(part)]
        repeated = bool(equals) and copies == [problem.first, problem.second]
    return Reading(answer, kept, repeated)


def messages(problem: Problem, shots: Sequence[Problem], form: Format) -> list[dict[str, str]]:
    """The paper's chat: a system line, the examples as turns, the question."""
    turns = [{"role": "system", "content": SYSTEM}]
    for shot in shots:
        turns.append({"role": "user", "content": form.ask(shot)})
        turns.append({"role": "assistant", "content": form.respond(shot)})
    return [*turns, {"role": "user", "content": form.ask(problem)}]


def plain_prompt(problem: Problem, shots: Sequence[Problem], form: Format) -> str:
    """The same for a model without a chat template: a line for each example (our reading).

    >>> plain_prompt(Problem(1, 2), [Problem(3, 4)], Format.parse("nosep"))
    '3+4=7\\n1+2='
    """
    lines = [form.ask(shot) + form.respond(shot) for shot in shots]
    return "\n".join([*lines, form.ask(problem)])


def write(number: int, style: str) -> str:
    """A number in a style.

    >>> write(1234567, "nosep"), write(1234567, "hashtag_l2r")
    ('1234567', '123#456#7')
    """
    if style == "nosep":
        return str(number)
    separator, _, direction = style.partition("_")
    return format_number(number, SEPARATORS[separator], "l2r" if direction == "l2r" else "r2l")


def _sum(problem: Problem, style: str) -> str:
    return f"{write(problem.first, style)}+{write(problem.second, style)}="


def _whole(written: str) -> int:
    return int(re.sub("[^0-9]", "", written))


def _refuse_style(style: str) -> None:
    known = ["nosep", *(f"{name}_{side}" for name in SEPARATORS for side in ("r2l", "l2r"))]
    if style not in known:
        raise PertokenError(
            f"unknown number format {style!r}{nearest(style, known)}: nosep, or "
            f"{', '.join(SEPARATORS)} with _r2l or _l2r, such as comma_r2l"
        )

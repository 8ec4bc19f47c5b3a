"""A bar is judged as written; nothing unmeasured passes."""

import math
import operator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pertoken.errors import PertokenError
from pertoken.reproduce._bars import Bar, freeze

OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.sampled_from(sorted(OPERATORS)), numbers, numbers)
@example(">=", 1.12, 1.12)
@example(">", 1.12, 1.12)
@example("==", 100.0, 100.0)
@example("<=", -0.0, 0.0)
def test_a_bar_means_its_operator(sign: str, limit: float, figure: float) -> None:
    # repr of a float may be 1e-05 or 1e+16: every spelling Python writes must be readable
    assert Bar.parse(f"{sign} {limit!r}").holds(figure) == OPERATORS[sign](figure, limit)


@given(st.sampled_from(sorted(OPERATORS)), numbers)
def test_what_was_not_measured_never_holds(sign: str, limit: float) -> None:
    bar = Bar.parse(f"{sign}{limit!r}")
    for figure in (None, math.nan, math.inf, -math.inf):
        assert not bar.holds(figure)


@pytest.mark.parametrize(
    "text", ["", "1.12", ">= ", "=> 1", ">= 1.12 x", ">= 1,12", "~ 2", ">= nan", "at least 2", 1.12]
)
def test_an_unreadable_bar_is_refused(text: object) -> None:
    with pytest.raises(PertokenError, match=r"not readable.*>= 1\.12"):
        Bar.parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("bars", [None, [">= 1"], {1: ">= 1"}])
def test_bars_must_be_a_mapping(bars: object) -> None:
    with pytest.raises(PertokenError, match=r"goose must declare BARS"):
        freeze(bars, "the reproduction of goose")


def test_an_unreadable_bar_is_named_with_its_metric() -> None:
    with pytest.raises(PertokenError, match="'speed-up'"):
        freeze({"speed-up": "fast"}, "the reproduction of goose")


def test_frozen_bars_do_not_move() -> None:
    bars = {"speed-up": ">= 2"}
    frozen = freeze(bars, "here")
    bars["speed-up"] = ">= 1"
    assert frozen["speed-up"].value == 2

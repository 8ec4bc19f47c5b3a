import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken.errors import PertokenError, nearest

SLUGS = ["goose", "token-recycling", "token-premiums", "kv-direct", "sift"]


def test_is_a_value_error() -> None:
    assert issubclass(PertokenError, ValueError)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("gose", " (did you mean 'goose'?)"),
        ("GOOSE", " (did you mean 'goose'?)"),
        ("kv_direct", " (did you mean 'kv-direct'?)"),
        ("recycling", " (did you mean 'token-recycling'?)"),
        ("token", " (did you mean 'token-recycling' or 'token-premiums'?)"),
        ("zzz", ""),
        ("", ""),
        ("  ", ""),
    ],
)
def test_nearest(typed: str, hint: str) -> None:
    assert nearest(typed, SLUGS) == hint


def test_without_options_there_is_no_hint() -> None:
    assert nearest("goose", []) == ""


def test_two_spellings_of_one_name_are_both_shown() -> None:
    assert nearest("a b", ["A_B", "a-b"]) == " (did you mean 'A_B' or 'a-b'?)"


@given(st.text(), st.lists(st.text()))
def test_any_input_gives_a_hint_or_nothing(typed: str, options: list[str]) -> None:
    hint = nearest(typed, options)
    assert hint == "" or hint.startswith(" (did you mean ")


@given(st.sampled_from(SLUGS), st.data())
def test_one_lost_letter_is_found(slug: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(slug) - 1))
    assert repr(slug) in nearest(slug[:at] + slug[at + 1 :], SLUGS)

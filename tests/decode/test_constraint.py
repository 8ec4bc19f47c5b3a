"""Constraints: predicates on text and regular expressions, through any tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pertoken.decode.constraint import RegexConstraint, TextConstraint, ask
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer

TOKENIZER = ByteTokenizer()
encode = TOKENIZER.encode


def test_special_tokens_never_satisfy_a_text_constraint() -> None:
    anything = TextConstraint(lambda text: True, tokenizer=TOKENIZER)
    special = TOKENIZER.all_special_ids[0]
    assert anything.accepts([*encode("a")])
    assert not anything.accepts([*encode("a"), special])
    assert not anything.complete([special])


def test_tokens_that_are_special_without_a_role_are_special_too() -> None:
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"a": 0, "<|head|>": 1}, merges=[]))
    backend.add_special_tokens([AddedToken("<|head|>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert not tokenizer.all_special_ids
    any_text = TextConstraint(lambda text: True, tokenizer=tokenizer)
    assert any_text.accepts([0])
    assert not any_text.accepts([0, 1])
    assert any_text.vocabulary.tolist() == [True, False]


def test_accepts_and_complete_are_two_questions() -> None:
    pair = TextConstraint("()".startswith, "()".__eq__, tokenizer=TOKENIZER)
    assert [pair.accepts(encode(text)) for text in ("", "(", "()", ")")] == [
        True,
        True,
        True,
        False,
    ]
    assert [pair.complete(encode(text)) for text in ("", "(", "()", ")")] == [
        *(False, False, True, False)
    ]


def test_half_a_character_is_neither_complete_nor_refused() -> None:
    exact = RegexConstraint("ça", tokenizer=TOKENIZER)
    whole = encode("ça")
    assert [exact.accepts(whole[:n]) for n in range(len(whole) + 1)] == [True] * (len(whole) + 1)
    assert [exact.complete(whole[:n]) for n in range(len(whole) + 1)] == [False] * len(whole) + [
        True
    ]


def test_bytes_that_no_character_has_are_refused() -> None:
    letters = RegexConstraint("[a-z]*", tokenizer=TOKENIZER)
    broken = 2 + 0xFF
    assert not letters.accepts([*encode("a"), broken, *encode("b")])
    assert not letters.accepts([*encode("a"), *[broken] * 4])
    assert not letters.accepts([broken] * 40)
    emoji = encode("🙂")
    anything = RegexConstraint("🙂+", tokenizer=TOKENIZER)
    assert all(anything.accepts([*emoji, *emoji[:cut]]) for cut in range(5))


def test_look_around_and_alternatives_match_partially() -> None:
    odd = RegexConstraint(r"(?!cat)[a-z]{3}|7+", tokenizer=TOKENIZER)
    assert odd.accepts(encode("ca"))
    assert not odd.accepts(encode("cat"))
    assert odd.complete(encode("car"))
    assert odd.complete(encode("77"))
    assert not odd.accepts(encode("7a"))


def test_a_pattern_that_is_none_names_its_place() -> None:
    with pytest.raises(PertokenError, match=r"not a regular expression: '\(a': .*position"):
        RegexConstraint("(a", tokenizer=TOKENIZER)


@pytest.mark.parametrize("answer", [True, np.True_, torch.tensor(True)])
def test_bools_of_other_libraries_are_answers(answer: Any) -> None:
    if isinstance(answer, torch.Tensor):
        with pytest.raises(PertokenError, match="got Tensor"):
            ask(lambda _: answer, "x")
    else:
        assert ask(lambda _: answer, "x") is True


def test_a_long_text_is_shortened_in_the_message() -> None:
    with pytest.raises(PertokenError) as error:
        ask(lambda _: "yes", "x" * 500)
    assert len(str(error.value)) < 150

"""Tokens as text: nothing lost, nothing twice."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken._pieces import Detokenizer, pieces
from pertoken.testing import ByteTokenizer

BYTES = ByteTokenizer()


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_joined_pieces_are_the_text(text: str) -> None:
    found = pieces(BYTES, BYTES.encode(text))
    assert "".join(found) == text
    assert len(found) == len(BYTES.encode(text))


def test_an_unfinished_character_waits_and_is_flushed() -> None:
    reader = Detokenizer(BYTES)
    first, second = BYTES.encode("é")
    assert reader.push(first) == ""
    assert reader.push(second) == "é"
    assert reader.push(first) == ""
    assert reader.flush() == "\N{REPLACEMENT CHARACTER}"
    assert reader.flush() == ""


def test_broken_bytes_do_not_wait_for_ever() -> None:
    broken = [2 + 0xFF] * 50
    found = pieces(BYTES, [*broken, *BYTES.encode("ok")])
    assert "".join(found).endswith("ok")
    assert any(found[:20])


def test_special_tokens_are_left_out_on_request() -> None:
    ids = [*BYTES.encode("a"), BYTES.eos_token_id]
    assert pieces(BYTES, ids) == ["a", "</s>"]
    reader = Detokenizer(BYTES, skip_special_tokens=True)
    assert "".join(reader.push(token) for token in ids) == "a"


@pytest.mark.model
def test_a_real_tokenizer(smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    text = "  def f(x):\n    return 'Größe 😀 日本'  # ok\n"
    ids = tokenizer(text)["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == text


def test_a_tokenizer_that_drops_the_first_blank() -> None:
    class Dropping:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join([" a", " b", "\n"][i] for i in ids).removeprefix(" ")

    assert pieces(Dropping(), [0, 1, 2, 1, 0]) == ["a", " b", "\n", " b", " a"]

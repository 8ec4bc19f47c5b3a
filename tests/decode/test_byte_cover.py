"""The cover of a text holds its probability, and reading byte by byte changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from pertoken.decode import ByteModel
from pertoken.errors import PertokenError
from pertoken.testing import tiny_model
from pertoken.testing.byte_brute import BruteForce, six_tokens

TOKENIZER = six_tokens()
MODEL = tiny_model("llama", vocab_size=len(TOKENIZER))


def exact(byte_model: ByteModel) -> BruteForce:
    return BruteForce(MODEL, TOKENIZER, byte_model.canonical.vocab.token_bytes, "ab")


@pytest.mark.parametrize("validity", ["renormalize", "truncate", "off"])
def test_the_next_byte_is_the_sum_over_all_token_strings(validity: str) -> None:
    byte_model = ByteModel(MODEL, TOKENIZER, validity=validity)  # type: ignore[arg-type]
    brute = exact(byte_model)
    assert len(brute.prefixes) == 15
    for prefix in brute.prefixes:
        found = byte_model.next_byte_log_probs(prefix).exp()
        torch.testing.assert_close(found, brute.next_byte(prefix, validity), atol=1e-10, rtol=0)


@pytest.mark.parametrize("validity", ["renormalize", "truncate"])
@pytest.mark.parametrize("text", [b"a", b"ab", b"bba", b"abab"])
def test_the_cover_is_every_token_string_that_reaches_the_end(text: bytes, validity: str) -> None:
    byte_model = ByteModel(MODEL, TOKENIZER, validity=validity)  # type: ignore[arg-type]
    wanted = dict(exact(byte_model).cover(text, validity))
    total = sum(wanted.values())
    found = {tuple(ids): math.exp(weight) for ids, weight in byte_model.cover(text)}
    assert found == pytest.approx({ids: w / total for ids, w in wanted.items()}, abs=1e-12)


@pytest.mark.parametrize("text", [b"a", b"ab", b"bba", b"ababbab"])
def test_the_cover_sums_to_the_product_of_the_scores(text: bytes) -> None:
    byte_model = ByteModel(MODEL, TOKENIZER)
    reader = byte_model.read(b"")
    for byte in text:
        reader.push(byte)
    mass = reader.mass()  # type: ignore[attr-defined]
    assert mass == pytest.approx(float(byte_model.score(text).sum()), abs=1e-12)
    brute = sum(weight for _, weight in exact(byte_model).cover(text[:3], "renormalize"))
    assert brute == pytest.approx(math.exp(float(byte_model.score(text[:3]).sum())), rel=1e-12)


def test_a_reader_says_what_one_gets_by_asking_anew() -> None:
    byte_model = ByteModel(MODEL, TOKENIZER)
    reader = byte_model.read(b"ab")
    text = b"ab"
    for byte in b"abba":
        torch.testing.assert_close(reader.log_probs(), byte_model.next_byte_log_probs(text))
        reader.push(byte)
        text += bytes([byte])
    torch.testing.assert_close(reader.log_probs(), byte_model.next_byte_log_probs(text))


def test_without_a_token_before_texts_a_prompt_must_hold_a_token() -> None:
    tokenizer = six_tokens()
    tokenizer.bos_token = None
    byte_model = ByteModel(MODEL, tokenizer)
    assert byte_model.begin == []
    with pytest.raises(PertokenError, match="no beginning-of-text token"):
        byte_model.next_byte_log_probs(b"ab")
    found = byte_model.next_byte_log_probs(b"bba").exp()  # bb, and behind it a, ab or aba
    with torch.no_grad():
        probs = MODEL(torch.tensor([[5]])).logits[0, -1].softmax(-1).tolist()
    reaching = probs[3] + probs[4]  # behind bb and a, no token may begin with b
    assert float(found[ord("b")]) == pytest.approx(reaching / (probs[1] + reaching))

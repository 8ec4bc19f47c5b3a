"""Encodings of a text and the canonical one, against brute force over all sequences of tokens."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pertoken import PertokenError
from pertoken.byte_vocab import ByteVocab
from pertoken.testing import ByteTokenizer, tiny_tokenizer
from pertoken.tokenize import count_encodings, encodings, is_canonical, noncanonical_share
from pertoken.tokenize.ways import spans


def byte_level() -> Any:
    """Merges that make ab, abb and "Ġa": so that "abb" is no concatenation of greedy tokens."""
    vocab = {token: place for place, token in enumerate(["a", "b", "Ġ", "ab", "bb", "abb", "Ġa"])}
    backend = Tokenizer(models.BPE(vocab, [("a", "b"), ("b", "b"), ("ab", "b"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def sentencepiece() -> Any:
    """Blanks are ▁, and there is a byte for "a": two tokens write it."""
    names = ["<unk>", "<0x61>", "a", "b", "▁", "ab", "▁a"]
    vocab = {token: place for place, token in enumerate(names)}
    merges = [("a", "b"), ("▁", "a")]
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


TOKENIZERS = {"byte-level": byte_level(), "sentencepiece": sentencepiece()}
BYTES = tiny_tokenizer()
VOCAB = ByteVocab(BYTES)
VOCABS = {name: ByteVocab(each) for name, each in TOKENIZERS.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_canonical_are_exactly_the_ids_that_some_text_is_encoded_to(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    own = set()
    for length in range(1, 7):
        for letters in product("ab ", repeat=length):
            own.add(tuple(tokenizer.encode("".join(letters), add_special_tokens=False)))
    known = [t for t, spelled in enumerate(VOCABS[name].token_bytes) if spelled]
    longest = max(len(spelled) for spelled in VOCABS[name].token_bytes if spelled)
    for count in (1, 2, 6 // longest):  # their texts have six letters at most
        for ids in product(known, repeat=count):
            assert is_canonical(ids, tokenizer) == (ids in own), ids


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(TOKENIZERS)), text=st.text("ab ", min_size=1, max_size=5))
def test_encodings_are_exactly_the_sequences_that_write_the_text(name: str, text: str) -> None:
    vocab = VOCABS[name]
    tokens = [(t, spelled) for t, spelled in enumerate(vocab.token_bytes) if spelled]

    def brute(rest: bytes) -> list[list[int]]:
        if not rest:
            return [[]]
        return [
            [token, *more]
            for token, spelled in tokens
            if rest.startswith(spelled)
            for more in brute(rest[len(spelled) :])
        ]

    wanted = brute(text.encode())
    found = encodings(text, vocab, n=10**6)
    assert sorted(found) == sorted(wanted)
    assert count_encodings(text, vocab) == len(wanted)
    assert TOKENIZERS[name].encode(text, add_special_tokens=False) in found
    assert {TOKENIZERS[name].decode(ids) for ids in found} == {text}


def test_drawn_encodings_are_different_and_all_as_likely() -> None:
    vocab, text = VOCABS["byte-level"], "abba"
    everything = encodings(text, vocab, n=100)
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(600):
        drawn = [tuple(ids) for ids in encodings(text, vocab, n=2, seed=seed)]
        assert len(set(drawn)) == 2
        counts.update(drawn)
    # 1,200 draws over 9 encodings: a standard deviation is 11.
    assert set(counts) == {tuple(ids) for ids in everything}
    expected = 1200 / len(everything)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_counts_are_exact_where_nothing_could_be_listed() -> None:
    # Tokens a and aa: the encodings of a row of a's are a Fibonacci number.
    backend = Tokenizer(models.BPE({"a": 0, "aa": 1}, [("a", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    numbers = [1, 1]
    while len(numbers) < 301:
        numbers.append(numbers[-1] + numbers[-2])
    assert count_encodings("a" * 300, backend) == numbers[300]
    assert len(encodings("a" * 300, backend, n=3)) == 3


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.sampled_from("aé你👩 \n1"), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_own_encodings_have_nothing_that_is_not_canonical(text: str, seed: int) -> None:
    tokenizer = BYTES
    ids = tokenizer.encode(text)
    assert is_canonical(ids, tokenizer)
    assert noncanonical_share(ids, tokenizer) == 0
    assert spans(ids, tokenizer)[-1][1] == len(text)
    for other in encodings(text, VOCAB, n=3, seed=seed):
        assert tokenizer.decode(other) == text
        assert is_canonical(other, tokenizer) == (other == ids)
        assert (noncanonical_share(other, tokenizer) > 0) == (other != ids)


def test_a_last_character_that_is_cut_off_does_not_count() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("aç")
    assert noncanonical_share(ids[:-1], tokenizer) == 0
    assert not is_canonical(ids[:-1], tokenizer)
    assert noncanonical_share([], tokenizer) == 0


def test_what_cannot_be_written_is_refused_in_a_line() -> None:
    with pytest.raises(PertokenError, match=r"no encoding of 'xyz'"):
        encodings("xyz", VOCABS["byte-level"])
    with pytest.raises(PertokenError, match="n must be 1 or more, got 0"):
        encodings("a", VOCABS["byte-level"], n=0)
    with pytest.raises(PertokenError, match="no byte view"):
        encodings("a", object())
    with pytest.raises(PertokenError, match="character 2 of the text is a broken one"):
        count_encodings("a\ud800", VOCABS["byte-level"])

"""Laws of supertokens: what goes in comes out, tokens cross words, cuts hardly show."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from pertoken.errors import PertokenError
from pertoken.tokenize import train_supertokens
from pertoken.tokenize.supertokens import _LONGEST, LENGTHS, chunks

WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "was", "on", "with", "be"]


def text_of(seed: int, words: int) -> str:
    """Words with a lasting liking for some pairs, in lines."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(words):
        found.append(WORDS[int(generator.zipf(1.5)) % len(WORDS)])
        if generator.random() < 0.3:
            found += ["as", "soon", "as"]
        if number % 12 == 11:
            found.append("\n")
    return " ".join(found)


@pytest.fixture(scope="module")
def trained() -> Any:
    return train_supertokens([text_of(seed, 400) for seed in range(30)], 600)


def test_every_text_comes_back(trained: Any) -> None:
    """10,000 strings of characters of all planes, normalised or not, without the surrogates."""
    generator = np.random.default_rng(0)
    planes = generator.integers(0, 17, size=(10_000, 6)) * 0x10000
    points = planes * generator.integers(0, 2, size=planes.shape) + generator.integers(
        0, 0x10000, size=planes.shape
    )
    points[(points >= 0xD800) & (points < 0xE000)] = ord(" ")
    texts = ["".join(map(chr, row)) for row in points.tolist()]
    texts[:6] = ["A\u030a", "\u212b", "\u1e9b\u0323", "\r\n\n \t", "\0\x7f", "aaaaaaaaaaaaaaa"]
    ids = trained(texts, add_special_tokens=False)["input_ids"]
    assert trained.batch_decode(ids) == texts
    assert {point >> 16 for point in points.ravel().tolist()} == set(range(17))


def test_the_authors_normaliser_gives_texts_back_normalised() -> None:
    tokenizer = train_supertokens(["some text"], 300, nfc=True)
    assert tokenizer.decode(tokenizer("A\u030a")["input_ids"]) == unicodedata.normalize(
        "NFC", "A\u030a"
    )


def test_tokens_cross_words_and_stay_within_their_length(trained: Any) -> None:
    pieces = trained.get_vocab()
    assert any("Ġ" in piece[1:] and piece[-1] != "Ġ" for piece in pieces)
    assert max(len(piece) for piece in pieces if piece != "<|endoftext|>") <= 30
    assert len(trained) == 600
    assert trained.eos_token_id == 0


def test_fewer_tokens_than_bpe_of_the_same_size(trained: Any) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [text_of(seed, 400) for seed in range(30)],
        trainers.BpeTrainer(
            vocab_size=600,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    held_out = text_of(99, 1000)
    assert 1.15 * len(trained(held_out)["input_ids"]) < len(backend.encode(held_out).ids)


def test_cuts_change_fewer_than_one_token_in_a_thousand(trained: Any) -> None:
    text = text_of(7, 20_000)
    assert len(text) > 5 * _LONGEST
    cut = trained(text)["input_ids"]
    whole = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    uncut = whole.encode(text, add_special_tokens=False)
    places = set(zip(uncut.ids, uncut.offsets, strict=True))
    offsets = trained(text, return_offsets_mapping=True)["offset_mapping"]
    changed = sum(each not in places for each in zip(cut, map(tuple, offsets), strict=True))
    assert changed < len(cut) / 1000
    for other in (text.replace("\n", " "), text.replace("\n", "").replace(" ", "")):
        pieces = trained.backend_tokenizer.pre_tokenizer.pre_tokenize_str(other)
        assert max(end - begin for _, (begin, end) in pieces) <= _LONGEST
        assert trained.decode(trained(other)["input_ids"]) == other


def test_it_survives_saving(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = text_of(5, 4000) + " A\u030a 🙂"
    assert again(text)["input_ids"] == trained(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == text


def test_chunk_lengths_follow_the_weights() -> None:
    generator = np.random.default_rng(0)
    text = "x" * 200_000
    found = np.array([len(chunk) for chunk in chunks(text, LENGTHS["bell"], generator)[:-1]])
    weights = np.array(list(LENGTHS["bell"].values()))
    wanted = weights / weights.sum()
    assert weights.sum() == pytest.approx(1.1)
    shares = [((low <= found) & (found <= high)).mean() for low, high in LENGTHS["bell"]]
    # 16,000 chunks: five standard errors of a share are at most 0.015.
    assert np.abs(shares - wanted).max() < 0.015
    assert found.mean() == pytest.approx(12.6, abs=0.2)
    assert "".join(chunks(text_of(1, 99), LENGTHS["wide"], generator)) == text_of(1, 99)


def test_runs_of_a_character_are_taken_out_in_training() -> None:
    tokenizer = train_supertokens(["-" * 400] * 20, 400)
    assert not any("--" in piece for piece in tokenizer.get_vocab() if len(piece) > 6)


def test_the_same_seed_gives_the_same_tokenizer() -> None:
    texts = [text_of(1, 2000)]
    one, two, three = (train_supertokens(texts, 500, seed=seed).get_vocab() for seed in (0, 0, 1))
    assert one == two != three


def test_bad_input_is_one_clear_line() -> None:
    for texts, size, options, line in (
        (["", ""], 300, {}, "the corpus is empty"),
        ([], 300, {}, "the corpus is empty"),
        (["a"], 256, {}, "smaller than the alphabet: 256 bytes and 1 special"),
        (["a"], 300, {"lengths": "bel"}, "unknown lengths 'bel' .did you mean 'bell'"),
        (["a"], 300, {"lengths": {(0, 3): 1.0}}, "ranges from 1 up"),
        (["a"], 300, {"lengths": {(1, 3): 0.0}}, "a weight above 0"),
    ):
        with pytest.raises(PertokenError, match=line):
            train_supertokens(texts, size, **options)

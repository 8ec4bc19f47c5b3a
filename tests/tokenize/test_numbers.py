"""Numbers in groups of digits: borders where the literal rule has them, and nowhere else."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2Tokenizer, PreTrainedTokenizerFast

from pertoken import PertokenError
from pertoken.testing import ByteTokenizer
from pertoken.tokenize.numbers import (
    DIRECTIONS,
    Direction,
    NumberDirection,
    direction_of,
    format_number,
    grouping_of,
    number_cuts,
)

NUMBERS = [f"{n:0{width}}" for width in (1, 2, 3) for n in range(10**width)]
# Digits most of all; those of other scripts do not touch them, since `\\p{N}` takes both together.
TEXTS = st.lists(
    st.sampled_from([*"0123456789" * 3, *".,-+ \n", "a", "Zz", "é٣²a"]), max_size=40
).map("".join)
# As cl100k cuts: three digits at most, from the left.
CL100K = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"


def byte_level(kind: str, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows all numbers of up to three digits as tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = dict.fromkeys(["<|end|>", *letters, *NUMBERS])
    vocab = {name: place for place, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    own: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    if kind == "cl100k":
        split = pre_tokenizers.Split(Regex(CL100K), "isolated")
        own = pre_tokenizers.Sequence([split, own])
    if kind == "digits":
        own = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own])
    backend.pre_tokenizer = own
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", **options)


def literal_borders(text: str, direction: str, group: int) -> set[int]:
    """The rule, digit by digit: how many digits stand before and behind each place."""
    found = set()
    for place in range(1, len(text)):
        before = after = 0
        while place - before > 0 and text[place - before - 1] in "0123456789":
            before += 1
        while place + after < len(text) and text[place + after] in "0123456789":
            after += 1
        if not before or not after:
            continue
        start = place - before
        fraction = start >= 2 and text[start - 1] == "." and text[start - 2] in "0123456789"
        if direction == "single":
            found.add(place)
        elif direction == "r2l" and not fraction:
            found |= {place} if after % group == 0 else set()
        elif before % group == 0:
            found.add(place)
    return found


def piece_borders(tokenizer: Any, text: str) -> set[int]:
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return {start for _, (start, _) in pieces} - {0}


def inside_numbers(text: str) -> set[int]:
    digits = "0123456789"
    return {i for i in range(1, len(text)) if text[i - 1] in digits and text[i] in digits}


PLAIN = {kind: byte_level(kind) for kind in ("gpt2", "cl100k")}
GROUPED = {
    (kind, direction, group): NumberDirection(direction, group=group)(PLAIN[kind])
    for kind in PLAIN
    for direction in DIRECTIONS
    for group in ((1, 2, 3) if kind == "cl100k" else (1, 2, 3, 5))
}


@settings(max_examples=300)
@given(TEXTS, st.sampled_from(list(GROUPED)))
@example("-1234567.1234567", ("cl100k", "r2l", 3))
@example("0001234.0001234.0001234", ("cl100k", "r2l", 3))
@example("1,234,567 and 12345,67890", ("cl100k", "r2l", 3))
@example("v1.2345678 .1234567", ("cl100k", "r2l", 3))
def test_numbers_are_cut_by_the_literal_rule_and_the_rest_as_before(
    text: str, which: tuple[str, Direction, int]
) -> None:
    kind, direction, group = which
    inside = inside_numbers(text)
    borders = piece_borders(GROUPED[which], text)
    assert borders & inside == literal_borders(text, direction, group)
    assert borders - inside == piece_borders(PLAIN[kind], text) - inside


@given(TEXTS)
def test_the_decoded_text_is_the_text(text: str) -> None:
    tokenizer = GROUPED["cl100k", "r2l", 3]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("digits", [4999, 5000])
def test_a_very_long_number(digits: int) -> None:
    tokens = GROUPED["cl100k", "r2l", 3].tokenize("7" * digits)
    assert [len(token) for token in tokens] == [digits % 3 or 3] + [3] * (-(-digits // 3) - 1)


def test_examples_as_tokens() -> None:
    r2l = GROUPED["cl100k", "r2l", 3].tokenize
    assert PLAIN["cl100k"].tokenize("1234567") == ["123", "456", "7"]
    assert r2l("1234567") == ["1", "234", "567"]
    assert r2l("-0012.34567") == ["-", "0", "012", ".", "345", "67"]
    assert r2l("a12345b") == ["a", "12", "345", "b"]
    assert r2l("1,234,567") == ["1", ",", "234", ",", "567"]
    assert r2l("۱۲۳۴") == PLAIN["cl100k"].tokenize("۱۲۳۴")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_direction_is_recognised(direction: Direction) -> None:
    assert direction_of(NumberDirection(direction)(PLAIN["cl100k"])) == direction
    group = 1 if direction == "single" else 2
    assert grouping_of(NumberDirection(direction, group=2)(PLAIN["cl100k"])) == (direction, group)


def test_directions_of_other_tokenizers() -> None:
    assert direction_of(PLAIN["cl100k"]) == "l2r"
    assert direction_of(byte_level("digits")) == direction_of(ByteTokenizer()) == "single"
    merges = [("1", "2"), ("3", "4"), ("5", "6"), ("7", "8"), ("9", "0")]
    vocab = [*"0123456789", *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(vocab)}, merges))
    irregular = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert direction_of(irregular) == "irregular"
    shares = number_cuts(irregular)
    assert list(shares) == list(range(1, 13))
    assert all(sum(found.values()) == pytest.approx(1) for found in shares.values())
    assert all(sum(sizes) == length for length, found in shares.items() for sizes in found)


def test_it_is_idempotent_and_replaces_another_grouping() -> None:
    for kind in PLAIN:
        once = GROUPED[kind, "r2l", 3]
        same = once.backend_tokenizer.to_str()
        assert NumberDirection("r2l")(once).backend_tokenizer.to_str() == same
        other = NumberDirection("single")(NumberDirection("l2r", group=2)(once))
        assert NumberDirection("r2l")(other).backend_tokenizer.to_str() == same


def test_the_tokenizer_that_was_given_stays_as_it_was() -> None:
    plain = byte_level("cl100k")
    before = plain.backend_tokenizer.to_str()
    NumberDirection("r2l")(plain)
    assert plain.backend_tokenizer.to_str() == before


def test_it_survives_saving_with_all_settings(tmp_path: Path) -> None:
    plain = byte_level("cl100k", padding_side="left", model_max_length=77, pad_token="<pad>")
    plain.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    plain.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    NumberDirection("r2l")(plain).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.tokenize("<tool>x = 1234567;") == [
        "<tool>",
        "x",
        "Ġ",
        "=",
        "Ġ",
        "1",
        "234",
        "567",
        ";",
    ]
    assert (again.padding_side, again.model_max_length) == ("left", 77)
    assert (again.pad_token, again.eos_token) == ("<pad>", "<|end|>")
    assert again.get_vocab() == plain.get_vocab()
    assert again.chat_template == plain.chat_template
    assert again.all_special_tokens == plain.all_special_tokens
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert raw.encode("1234567").tokens == ["1", "234", "567"]
    once = again.backend_tokenizer.to_str()
    assert NumberDirection("r2l")(again).backend_tokenizer.to_str() == once


def test_a_class_that_builds_its_own_pre_tokenizer_does_not_lose_it(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: i for i, name in enumerate(["<|endoftext|>", *letters, "12", "34", "56"])}
    own = GPT2Tokenizer(vocab=vocab, merges=[("1", "2"), ("3", "4"), ("5", "6")])
    assert own.tokenize("123456") == ["12", "34", "56"]
    NumberDirection("r2l")(own).save_pretrained(tmp_path)
    GPT2Config().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.tokenize("123456 0123") == ["12", "3", "4", "56", "Ġ", "0", "12", "3"]
    assert again.eos_token == own.eos_token


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_sentencepiece_like_tokenizers(scheme: Any) -> None:
    names = ["<unk>", "▁", "a", ".", ",", "-", *NUMBERS, *("▁" + number for number in NUMBERS)]
    backend = Tokenizer(models.Unigram([(name, -1.0) for name in names], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    grouped = NumberDirection("r2l")(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert grouped.tokenize("1234567 -1234.5678")[:3] == ["▁1", "234", "567"]
    assert grouped.tokenize("a1234.5678") == ["▁", "a", "1", "234", ".", "567", "8"]
    assert grouped.decode(grouped.encode("a 1234567")) == "a 1234567"
    assert direction_of(grouped) == "r2l"


def test_a_tokenizer_without_a_pre_tokenizer() -> None:
    names = ["<unk>", "▁", "a", *NUMBERS]
    backend = Tokenizer(models.Unigram([(name, -1.0) for name in names], unk_id=0))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    grouped = NumberDirection("r2l")(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert grouped.tokenize("a 1234567") == ["a", "▁", "1", "234", "567"]
    assert NumberDirection("r2l")(grouped).backend_tokenizer.to_str() == (
        grouped.backend_tokenizer.to_str()
    )


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(PertokenError, match=r"no effect here.*format_number"):
        NumberDirection("r2l")(byte_level("digits"))
    with pytest.raises(PertokenError, match="fast tokenizer, not object"):
        NumberDirection("r2l")(object())
    with pytest.raises(PertokenError, match="cannot be put into"):
        NumberDirection("r2l", group=4)(PLAIN["cl100k"])  # three digits are its most
    words = {name: i for i, name in enumerate(["[UNK]", *NUMBERS, *("##" + n for n in NUMBERS)])}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(PertokenError, match="cannot be put into"):
        NumberDirection("r2l")(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(PertokenError, match="did you mean 'r2l'"):
        NumberDirection("R2L ")  # type: ignore[arg-type]
    with pytest.raises(PertokenError, match="group must be 1"):
        NumberDirection("r2l", group=0)


def test_tokens_that_hide_their_digits_are_refused() -> None:
    class Hidden:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [0]

        def convert_ids_to_tokens(self, token: int) -> str:
            return "<unk>"

    with pytest.raises(PertokenError, match="do not show its digits: <unk>"):
        direction_of(Hidden())


@given(st.integers(min_value=-(10**30), max_value=10**30), st.sampled_from(DIRECTIONS))
def test_a_formatted_number_is_the_number_with_groups_of_the_direction(
    number: int, direction: Direction
) -> None:
    shown = format_number(number, "foo", direction)
    assert int(shown.replace("foo", "")) == number
    digits = str(abs(number))
    cuts = sorted({0, *literal_borders(digits, direction, 3), len(digits)})
    parts = [digits[a:b] for a, b in pairwise(cuts)]
    assert shown.lstrip("-") == "foo".join(parts)
    if direction == "r2l":
        assert format_number(number) == f"{number:,}"


def test_numbers_as_text() -> None:
    assert format_number("0001234") == "0,001,234"
    assert format_number("+1234.56789", " ", "l2r") == "+123 4.56789"
    for bad in ("", "12a", "1,234", "٣٤", "--1"):
        with pytest.raises(PertokenError, match="is not a number"):
            format_number(bad)


def test_the_grouping_is_in_the_file_as_ordinary_parts(tmp_path: Path) -> None:
    GROUPED["cl100k", "r2l", 3].save_pretrained(tmp_path)
    parts = json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert [part["type"] for part in parts] == ["Split", "Split", "ByteLevel"]
    assert parts[0]["behavior"] == "MergedWithPrevious"

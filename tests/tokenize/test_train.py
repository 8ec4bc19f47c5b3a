"""Training: superword against a literal two-stage BPE, round trips, save and load, refusals."""

from __future__ import annotations

import itertools
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pertoken import PertokenError
from pertoken.tokenize import train_tokenizer
from pertoken.tokenize.train import END, alphabet, splitter, train_backend

OWN = ("bpe", "unigram", "wordpiece", "character", "superword")
PROVERBS = """All human beings are born free and equal in dignity and rights. They are free.
Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont libres.
Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Bütün insanlar hürdür.
すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。すべての人間は自由。
လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် လည်းကောင်း၊ တူညီလွတ်လပ်သော လူတိုင်းသည်
In 1948, in 1966 and in 1976: x=3.14, y=3.15; "it's", they're -- 'said' he   said she.
""".splitlines()


def literal(lines: list[str], size: int, turn: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Two-stage BPE by its definition: (tokens after the alphabet, merges), slowly.

    At each step the corpus is encoded anew with the merges so far, the commonest pair joined; of
    equally common ones that of the lowest ids.
    """
    vocab = [END, *alphabet()]
    merges: list[tuple[str, str]] = []
    corpora = {
        words: [w for line in lines for w, _ in splitter(words=words).pre_tokenize_str(line)]
        for words in (True, False)
    }
    inside = True
    while len(vocab) < size:
        inside = inside and len(vocab) < turn
        ids = {token: place for place, token in enumerate(vocab)}
        counts: Counter[tuple[int, int]] = Counter()
        for word, times in Counter(corpora[inside]).items():
            tokens = [ids[token] for token in encode(word, merges)]
            for pair in itertools.pairwise(tokens):
                counts[pair] += times
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is not None and counts[best] >= 2:
            merges.append((vocab[best[0]], vocab[best[1]]))
            vocab.append("".join(merges[-1]))
        elif inside:
            inside = False  # no pair is left inside words
        else:
            break
    return vocab, merges


def encode(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The pair of the lowest rank is joined, leftmost first, until none is left."""
    rank = {merge: place for place, merge in enumerate(merges)}
    tokens = list(word)
    while True:
        pairs = [
            (rank.get(pair, len(rank)), at) for at, pair in enumerate(itertools.pairwise(tokens))
        ]
        best, at = min(pairs, default=(len(rank), 0))
        if best == len(rank):
            return tokens
        tokens[at : at + 2] = ["".join(tokens[at : at + 2])]


@pytest.mark.parametrize(("size", "turn"), [(300, 270), (400, 360), (330, 257)])
def test_superword_is_a_literal_two_stage_bpe(size: int, turn: int) -> None:
    backend = train_backend(PROVERBS, size, "superword", transition=turn / size)
    vocab, merges = literal(PROVERBS, size, turn)
    ids = backend.get_vocab()
    assert sorted(ids, key=ids.__getitem__) == vocab
    # Encoding with the merged list gives what the training saw.
    for line in PROVERBS:
        (word, _), *others = splitter(words=False).pre_tokenize_str(line)
        assert not others
        assert backend.encode(line).tokens == encode(word, merges)


@pytest.mark.parametrize("seed", range(4))
def test_superword_is_exact_where_pairs_overlap(seed: int) -> None:
    """Few letters and no sense, the hardest case for counts that are kept up to date."""
    draw = random.Random(seed)
    lines = ["".join(draw.choices("abc ", [3, 2, 2, 2], k=60)) for _ in range(4)]
    backend = train_backend(lines, 300, "superword", transition=0.9)
    vocab, merges = literal(lines, 300, 270)
    assert len(set(vocab)) == len(vocab)
    ids = backend.get_vocab()
    assert sorted(ids, key=ids.__getitem__) == vocab
    assert [backend.encode(line).tokens for line in lines] == [
        [
            token
            for word, _ in splitter(words=False).pre_tokenize_str(line)
            for token in encode(word, merges)
        ]
        for line in lines
    ]


def test_superword_tokens_span_spaces_and_never_lines() -> None:
    backend = train_backend(
        ["one of the many\none of the few"] * 3, 300, "superword", transition=0.88
    )
    tokens = list(backend.get_vocab())
    assert any(re.search(r"[a-z]Ġ[a-z]", token) for token in tokens)
    assert not any(
        "Ċ" in token.strip("Ċ") or token.startswith("Ċ") != ("Ċ" in token) for token in tokens
    )


@pytest.mark.parametrize("kind", OWN)
def test_every_kind_writes_what_it_read(kind: str) -> None:
    tokenizer = train_tokenizer(PROVERBS, 600, kind)
    assert 257 < len(tokenizer) <= 600

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    def check(text: str) -> None:
        text = text.replace(END, "")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)

    check()
    for text in [
        *PROVERBS,
        "## a ##b ###",
        "<0x41>▁ x",
        "a\r\n\n  b\n",
        "x" * 300,
        "  two  spaces ",
    ]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("kind", OWN)
def test_saved_and_loaded_it_is_the_same(kind: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(PROVERBS, 560, kind)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.eos_token == END
    assert len(loaded) == len(tokenizer)
    for line in [*PROVERBS, "never seen: ☃ ## e\u0301"]:
        assert loaded(line)["input_ids"] == tokenizer(line)["input_ids"]
        assert loaded.decode(loaded(line)["input_ids"]) == unicodedata.normalize("NFC", line)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "character", "superword"])
def test_training_again_gives_the_same(kind: str) -> None:
    first, second = (train_backend(PROVERBS, 580, kind).to_str() for _ in range(2))
    assert first == second


def test_normal_forms_of_a_text_are_one_text() -> None:
    composed = train_tokenizer(["é" * 4, "e\u0301" * 4], 260)
    assert composed("e\u0301\u0301")["input_ids"] == composed("é\u0301")["input_ids"]
    plain = train_tokenizer(["é" * 4], 260, normalizer=None)
    assert plain("e\u0301")["input_ids"] != plain("é")["input_ids"]


def test_a_word_piece_is_found_by_longest_match() -> None:
    tokenizer = train_tokenizer(["undone unreal done real"] * 3 + ["un"] * 9, 540, "wordpiece")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("undone")["input_ids"])
    vocab = tokenizer.get_vocab()
    rest = "undone"
    for token in tokens:
        mark = "" if rest == "undone" else "##"
        longest = next(n for n in range(len(rest), 0, -1) if mark + rest[:n] in vocab)
        assert token == mark + rest[:longest]
        rest = rest[longest:]


def test_special_tokens_come_first_and_stay_whole() -> None:
    tokenizer = train_tokenizer(PROVERBS, 300, special_tokens=("</s>", "<sep>"))
    assert tokenizer("</s><sep>")["input_ids"] == [0, 1]
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.decode([0, 1], skip_special_tokens=True) == ""


def test_a_file_is_a_corpus(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(PROVERBS), encoding="utf-8")
    whole = train_tokenizer(["\n".join(PROVERBS)], 300)
    assert train_tokenizer(file, 300).get_vocab() == whole.get_vocab()
    assert train_tokenizer([file], 300).get_vocab() == whole.get_vocab()


def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("déjà".encode("latin-1"))
    for texts, size, options, line in [
        ([], 300, {}, "the corpus is empty"),
        ([" \n"], 300, {}, "the corpus is empty"),
        (latin, 300, {}, r"latin.txt is not UTF-8 \(byte 2\)"),
        (tmp_path / "none.txt", 300, {}, "there is no corpus file .*none.txt"),
        ("one string", 300, {}, "a list of texts"),
        (["a"], 256, {}, "256 is smaller than the alphabet of bpe: 257 tokens"),
        (["a"], 511, {"kind": "wordpiece"}, "511 is smaller than the alphabet of wordpiece: 512"),
        (["a"], 300, {"kind": "superwrd"}, r"did you mean 'superword'\?"),
        (["a"], 300, {"kind": "superword", "transition": 1.5}, "transition is a share"),
        (["a"], 300, {"normalizer": "nfx"}, "unknown normalizer 'nfx'"),
        (["a"], 300, {"min_frequency": 0}, "min_frequency must be 1 or more"),
    ]:
        with pytest.raises(PertokenError, match=line) as found:
            train_tokenizer(texts, size, **options)
        assert "\n" not in str(found.value)


def test_supertokens_are_trained_in_their_own_file() -> None:
    pytest.importorskip("pertoken.tokenize.supertokens")
    tokenizer = train_tokenizer(PROVERBS * 4, 400, "supertokens", seed=3)
    assert len(tokenizer) <= 400
    for line in PROVERBS:
        ids = tokenizer(line, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", line)
    same = tokenizer("e\u0301", add_special_tokens=False)["input_ids"]
    assert same == tokenizer("é", add_special_tokens=False)["input_ids"]

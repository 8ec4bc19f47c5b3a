"""The byte view of a tokenizer, and which token sequences it writes itself, against encoding."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from pertoken._merges import MergeTable
from pertoken._pieces_of_text import completions, dangling
from pertoken.byte_vocab import ByteVocab
from pertoken.canonical import Canonical, Lattice, encode
from pertoken.errors import PertokenError

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "ab ab\n\nab aab  b\n b\n\n\na 1 12 'll a'll b's é éa ba\n  \nab",
    "can't ab'll 'l l 'la 'sé ab\n\nab\n\nba  \n\n ab",
    "ab\u3000ë éa\u3000\u3000 ë \u00a0 \u00a0aa bb ab  ab   b",
]


def trained(pre_tokenizer: Any, size: int = 48, **options: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE(**options))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=[], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def sentencepiece(*, lead: bool = False, added: tuple[str, ...] = ()) -> Tokenizer:
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    words = ("▁a", "ab", "▁ab", "▁▁", "ba", "aa", "▁▁▁", "bab", "\n\n")
    for piece in (*"▁ab\né", *words):
        vocab[piece] = len(vocab)
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in vocab and word[cut:] in vocab
    ]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if lead else spaces
    )
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # as Gemma's
    backend.add_special_tokens(["<unk>"])
    backend.add_tokens([AddedToken(text, normalized=False) for text in added])
    return backend


@pytest.mark.parametrize("proper", [True, False])
def test_two_tokens_stay_apart_iff_encoding_says_so(proper: bool) -> None:
    # proper: each merge comes after those that make its parts, as training gives them.
    for seed in range(120):
        draw = random.Random(seed)
        letters = "abc"[: draw.choice([1, 2, 3])]
        vocab = {letter: place for place, letter in enumerate(letters)}
        merges: list[tuple[str, str]] = []
        for _ in range(draw.randint(1, 14)):
            pair = draw.choice(list(vocab)), draw.choice(list(vocab))
            made = "".join(pair)
            if len(made) <= 8 and pair not in merges and not (proper and made in vocab):
                vocab.setdefault(made, len(vocab))
                merges.append(pair)
        if not proper:
            draw.shuffle(merges)
        backend = Tokenizer(models.BPE(vocab, merges))
        table = MergeTable(vocab, merges)
        for text, token in vocab.items():
            assert bool(table.reachable[token]) == (backend.encode(text).ids == [token])
            row = table.row(token)
            for behind, other in vocab.items():
                apart = backend.encode(text + behind).ids == [token, other]
                assert row[other] == table.apart(token, other) == apart, (seed, text, behind)
        for _ in range(20):
            ids = backend.encode("".join(draw.choices(letters, k=draw.randint(3, 24)))).ids
            assert all(table.apart(*pair) for pair in itertools.pairwise(ids))


BACKENDS: dict[str, tuple[Callable[[], Tokenizer], tuple[str, ...]]] = {
    "gpt2": (lambda: trained(byte_level()), ("ab \n1", "al'éë ", "al' ", " \n\u3000éë\u00a0")),
    "digits apart": (
        lambda: trained(
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])
        ),
        ("ab \n1", " \n\u3000éë"),
    ),
    "gpt4": (
        lambda: trained(
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(GPT4), "isolated"), byte_level(use_regex=False)]
            )
        ),
        ("ab \n1", "al'éë ", " \n\u3000éë"),
    ),
    "whole pieces": (
        lambda: trained(byte_level(), ignore_merges=True),
        ("ab \n1", "al' "),
    ),
    "no cuts": (lambda: trained(byte_level(use_regex=False)), ("ab \n1", " \n\u3000éë")),
    "sentencepiece": (sentencepiece, ("ab \n", "aé ")),
    "leading space": (lambda: sentencepiece(lead=True), ("ab \n", "aé ")),
    "added text": (lambda: sentencepiece(added=("aba", "ab\n", "\n\n", "b ")), ("ab \n",)),
    "added text, overlapping": (lambda: sentencepiece(added=("aa", "aab", "ba")), ("ab ",)),
}
FOLLOWING = "cÀ\u0080\u3800\u3029\u3020\u302b"  # every way to finish a character that is in use


def spelled(canonical: Canonical, ids: tuple[int, ...]) -> bytes:
    return b"".join(canonical.vocab.token_bytes[token] or b"" for token in ids)


@pytest.mark.parametrize("name", BACKENDS)
def test_paths_are_the_beginnings_of_encodings(name: str) -> None:
    make, alphabets = BACKENDS[name]
    backend = make()
    canonical = Canonical(backend)
    start = canonical.vocab.start
    for letters in alphabets:
        length = 3
        whole = set()
        for count, extra in itertools.product(range(length + 1), range(3)):
            for signs in itertools.product(*[letters] * count, *[letters + FOLLOWING] * extra):
                whole.add(tuple(backend.encode("".join(signs), add_special_tokens=False).ids))
        valid = {ids[:count] for ids in whole for count in range(len(ids) + 1)}
        found, ended, texts = set(), set(), {start[:count] for count in range(len(start) + 1)}
        for signs in itertools.product(letters, repeat=length):
            lattice = Lattice(canonical)
            for byte in start + "".join(signs).encode():
                lattice.push(byte)
                texts.add(bytes(lattice.text))
            for path in itertools.chain(*lattice.paths):
                found.add(tuple(path.ids))
                if canonical.complete(path, bytes(lattice.text)):
                    ended.add(tuple(path.ids))
        assert ended == {ids for ids in whole if spelled(canonical, ids) in texts}
        # Bytes of characters that are in no piece begin more characters than those tried here.
        fallback = set(canonical.vocab.fallback.values())
        wanted = {ids for ids in valid if spelled(canonical, ids) in texts}
        more = {ids for ids in found - wanted if not fallback or ids[-1] not in fallback}
        assert (wanted - found, more) == (set(), set())


def with_all_bytes(backend: Tokenizer) -> Tokenizer:
    parts = json.loads(backend.to_str())
    if not parts["model"]["byte_fallback"]:
        for letter in pre_tokenizers.ByteLevel.alphabet():
            parts["model"]["vocab"].setdefault(letter, len(parts["model"]["vocab"]))
    return Tokenizer.from_str(json.dumps(parts))


def test_texts_of_any_kind_are_encoded_as_the_tokenizer_does() -> None:
    draw = random.Random(0)
    signs = "ab12 \n\t'sl é\u3000ß中\U0001f44b-/."
    for make, _ in BACKENDS.values():
        backend = with_all_bytes(make())
        canonical = Canonical(backend)
        for _ in range(25):
            text = "".join(draw.choices(signs, k=draw.randint(1, 12)))
            ids = backend.encode(text, add_special_tokens=False).ids
            assert encode(canonical, text.encode()) == ids, (text, ids)


def test_the_bytes_of_tokens() -> None:
    vocab = ByteVocab(trained(byte_level()))
    backend = trained(byte_level())
    for token in range(vocab.size):
        letters = backend.id_to_token(token)
        assert vocab.token_bytes[token] is not None
        assert len(vocab.token_bytes[token] or b"") == len(letters)
    text = "é 'll\n\u3000".encode()
    ids = backend.encode(text.decode()).ids
    assert b"".join(vocab.token_bytes[token] or b"" for token in ids) == text
    vocab = ByteVocab(sentencepiece(added=("b ", "▁▁")))
    named = {
        sentencepiece(added=("b ",)).id_to_token(t): b for t, b in enumerate(vocab.token_bytes)
    }
    assert (named["▁ab"], named["<0xC3>"], named["é"], named["<unk>"]) == (
        b" ab",
        b"\xc3",
        "é".encode(),
        None,
    )
    assert [vocab.token_bytes[token] for token in vocab.added] == [b"b "]
    assert vocab.fallback[0xC3] == vocab.token_bytes.index(b"\xc3")


def test_the_tokens_with_a_beginning_lie_side_by_side() -> None:
    vocab = ByteVocab(sentencepiece())
    for prefix in (b"", b" ", b"a", b"ab", b"\xc3", b"\xff", b"zz"):
        low, high = vocab.range(prefix)
        found = set(vocab.order[low:high].tolist())
        wanted = {t for t, b in enumerate(vocab.token_bytes) if b and b.startswith(prefix)}
        assert found == wanted
        same = {t for t in wanted if vocab.token_bytes[t] == prefix}
        exact = vocab.exact(low, high, prefix)
        assert set(vocab.order[low:exact].tolist()) == same
        following = vocab.byte_at(len(prefix), exact, high).tolist()
        behind = [(vocab.token_bytes[t] or b"")[len(prefix)] for t in vocab.order[exact:high]]
        assert following == behind == sorted(behind)


def test_beginnings_of_characters() -> None:
    for sign in ("é", "ß", "中", "\u0800", "\ud7ff", "\U0001f44b", "\U0010ffff"):
        whole = sign.encode()
        for count in range(1, len(whole)):
            assert dangling(b"a" + whole[:count]) == count
            assert ord(sign) in completions(whole[:count])
        assert dangling(b"a" + whole) == 0
        assert list(completions(whole)) == [ord(sign)]
    assert not completions(b"\xc0")
    assert not completions(b"\xe0\x80")  # too long a spelling
    assert not completions(b"\xf4\x90")  # beyond Unicode


def test_tokenizers_without_a_byte_view() -> None:
    def refusal(backend: Any) -> str:
        with pytest.raises(PertokenError) as error:
            ByteVocab(backend)
        assert "\n" not in str(error.value)
        return str(error.value)

    wordpiece = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert "WordPiece" in refusal(wordpiece)
    assert "WordLevel" in refusal(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    assert "BPE tokenizer of this make" in refusal(Tokenizer(models.BPE({"a": 0}, [])))
    lossy = trained(byte_level())
    lossy.normalizer = normalizers.Lowercase()
    assert "Lowercase" in refusal(lossy)
    spaced = trained(pre_tokenizers.ByteLevel(add_prefix_space=True))
    assert "add_prefix_space=True" in refusal(spaced)
    split = trained(pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), byte_level()]))
    assert "drops text" in refusal(split)
    greedy = trained(byte_level())
    greedy.add_tokens([AddedToken("ab", rstrip=True)])
    assert "swallows blanks" in refusal(greedy)
    assert "would get a space as well" in refusal(sentencepiece(lead=True, added=("ab",)))
    marked = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    assert "the end of words" in refusal(marked)
    assert "dropout" in refusal(Tokenizer(models.BPE({"a": 0}, [], dropout=0.1)))
    assert "fast tokenizer" in refusal(object())
    folded = trained(byte_level())
    folded.normalizer = normalizers.NFC()
    assert ByteVocab(folded).kind == "byte-level"


def test_text_that_cannot_be_written() -> None:
    canonical = Canonical(sentencepiece())
    with pytest.raises(PertokenError, match="no encoding of"):
        encode(canonical, "a▁".encode())
    with pytest.raises(PertokenError, match="no encoding of"):
        encode(canonical, b"a\xc3")

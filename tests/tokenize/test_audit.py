"""The audit's figures are those of their definitions, and its page needs nothing from outside."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pertoken._html import _source_hash
from pertoken.errors import PertokenError
from pertoken.tokenize import SECTIONS, Audit, Row, Section, audit
from pertoken.tokenize._material import Material, find_languages
from pertoken.tokenize.sections_vocabulary import STRINGS

LANGUAGES = {
    "eng": ("eng", "English", "All are free and equal."),
    "deu_1996": ("deu", "German, Standard (1996)", "Alle sind frei und gleich."),
    "ell_monotonic": ("ell", "Greek", "Όλοι είναι ελεύθεροι."),
    "mya": ("mya", "Burmese", "လူတိုင်းသည် လွတ်လပ်သည်။"),
}


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with udhr and gsm8k in small, and no consent to brown."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {
            "code": code,
            "iso639_3": iso,
            "language": name,
            "direction": "ltr",
            "articles": [f"{text}\n{text}"] * 30,
        }
        for code, (iso, name, text) in LANGUAGES.items()
    ]
    (folder / "udhr.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    sums = {"question": "What is 12 + 30?", "answer": "<<12+30=42>>42\n#### 42"}
    (folder / "gsm8k_test.jsonl").write_text(json.dumps(sums))
    monkeypatch.setenv("PERTOKEN_DATA", str(folder))
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PERTOKEN_ACCEPT_LICENCE", raising=False)
    return folder


def of_bytes(merges: Sequence[tuple[str, str]] = (), extra: Sequence[str] = ()) -> Any:
    """A byte-level BPE: </s> and <|im_start|>, the bytes, the merges' tokens, and loose `extra`."""
    pieces = ["</s>", "<|im_start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [left + right for left, right in merges] + list(extra)
    backend = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>"), AddedToken("<|im_start|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("Ġ", "T"))


def values(found: Audit, section: str, label: str) -> tuple[Any, ...]:
    (row,) = [row for row in found.sections[section].lines if row.label == label]
    return row.values


def test_counts_are_those_of_the_tokenizer() -> None:
    own = {"a": ["the cat and the\nhat", "  the "], "b": "Über 1212 the"}
    tokenizer = of_bytes(MERGES)
    found = audit(tokenizer, texts=own, sections=["text"])
    rows = {(row.group, row.label): row.values for row in found.sections["text"].lines}
    for name, given in own.items():
        texts = [given] if isinstance(given, str) else given
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        size = sum(len(text.encode()) for text in texts)
        words = sum(len(re.findall(r"\S+", text)) for text in texts)
        assert rows["bytes per token", name] == (size / tokens,)
        assert rows["tokens per word", name] == (tokens / words,)


def test_padding_and_truncation_of_the_tokenizer_do_not_count() -> None:
    tokenizer = of_bytes()
    inputs = tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert [len(ids) for ids in inputs["input_ids"]] == [2, 2]
    found = audit(tokenizer, texts={"x": ["a", "abcd"]}, sections=["text"])
    assert found.sections["text"].lines[0].values == (1.0,)
    again = tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert again["input_ids"] == inputs["input_ids"]


def test_bytes_cost_what_bytes_cost(texts: Path) -> None:
    """A tokenizer that knows only bytes: the premium is the ratio of bytes, a token is a byte."""
    found = audit(of_bytes(), ["de", "ell", "mya"], sections=["languages"])
    part = found.sections["languages"]
    premiums, density = (rows for _, rows in part.groups())
    assert [row.label for row in premiums] == [
        "English (eng)",
        "German, Standard (1996) (deu_1996)",
        "Greek (ell_monotonic)",
        "Burmese (mya)",
    ]
    size = {code: len(text.encode()) for code, (_, _, text) in LANGUAGES.items()}
    assert [row.values[0] for row in premiums] == [size[code] / size["eng"] for code in LANGUAGES]
    assert [row.values[0] for row in density] == [1.0] * 4


def test_a_language_that_cannot_be_written_has_no_premium(texts: Path) -> None:
    """One unknown token for each word would make it the cheapest of all."""
    vocab = {"[UNK]": 0} | {sign: at for at, sign in enumerate("abcdefghijklmnopqrstuvwxyz. ", 1)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="[UNK]", fuse_unk=True))
    backend.normalizer = normalizers.Lowercase()
    found = audit({"a": backend, "b": of_bytes()}, ["de", "el"], sections=["languages"])
    rows = found.sections["languages"].lines
    assert rows[1].values[0] is not None
    assert rows[2].values[0] is None
    assert rows[2].cells()[0] == "-"
    assert "cannot be written" in found.table()


def test_the_dearest_languages_are_shown_unasked(texts: Path) -> None:
    material = Material()
    chosen = material.chosen({"bytes": of_bytes()}, worst=1)
    assert chosen == ["eng", "deu_1996", "mya"]
    assert Material("all").chosen({}) == ["eng", "deu_1996", "ell_monotonic", "mya"]


@pytest.mark.parametrize(
    ("code", "found"), [("en", "eng"), ("deu", "deu_1996"), ("deu_1996", "deu_1996"), ("my", "mya")]
)
def test_language_codes(code: str, found: str, texts: Path) -> None:
    assert find_languages([code, code]) == [found]


@pytest.mark.parametrize(("code", "hint"), [("greek", "ell_monotonic"), ("deu_199", "deu_1996")])
def test_an_unknown_language_names_the_nearest(code: str, hint: str, texts: Path) -> None:
    with pytest.raises(PertokenError, match=f"unknown language '{code}'.*'{hint}'"):
        audit(of_bytes(), [code])


def test_round_trips() -> None:
    """Bytes lose nothing; lower case loses what has capitals and nothing else."""
    lower = of_bytes()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    found = audit({"bytes": of_bytes(), "lower": lower}, sections=["fidelity"])
    for kind, strings in STRINGS.items():
        own = sum(text == "".join(map(str.lower, text)) for text in strings) / len(strings)
        bytes_, lowered = values(found, "fidelity", kind)
        assert bytes_ == 1
        if kind not in ("scripts", "rare characters"):  # `str.lower` knows words
            assert lowered == own


def test_tokens_not_found_are_those_that_no_text_gives() -> None:
    """Against all texts of up to five letters."""
    merges = [("a", "b"), ("ab", "a"), ("b", "a"), ("ba", "b"), ("Ġ", "a"), ("a", "a")]
    tokenizer = of_bytes(merges, extra=["bb", "Ġab", "aab"])
    used: set[int] = set()
    for length in range(1, 6):
        texts = ["".join(letters) for letters in itertools.product("ab ", repeat=length)]
        used.update(token for ids in tokenizer(texts)["input_ids"] for token in ids)
    pieces = [*("".join(pair) for pair in merges), "bb", "Ġab", "aab"]
    never = [piece for piece in pieces if tokenizer.convert_tokens_to_ids(piece) not in used]
    assert {"bb", "Ġab", "aab"} <= set(never)
    found = audit(tokenizer, sections=["fidelity"])
    whole = 128 + len(pieces)  # ASCII, and what was joined
    assert values(found, "fidelity", "tokens not found in text") == (len(never) / whole,)
    assert values(found, "fidelity", "parts of characters") == (128 / (128 + whole),)


def test_a_piece_of_sentencepiece_is_found_with_and_without_its_blank() -> None:
    from pertoken.tokenize import open_tokenizer

    for kind in ("bpe", "unigram"):
        file = Path(__file__).parent / "data" / f"{kind}.model"
        share = values(
            audit(open_tokenizer(file), sections=["fidelity"]),
            "fidelity",
            "tokens not found in text",
        )
        assert share[0] < 0.05


def test_control_tokens_are_read_from_text() -> None:
    found = audit(of_bytes(), sections=["controls"])
    assert values(found, "controls", "own special tokens") == (1.0,)
    assert values(found, "controls", "<|im_start|>") == ("control",)
    assert values(found, "controls", "<bos>") == ("text",)
    # What the note recommends does what it says.
    tokenizer = of_bytes()
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in tokenizer.encode(
        "<|im_start|>", split_special_tokens=True
    )


def test_redundancy_counts_forms() -> None:
    """Of 128 ASCII tokens 26 differ by case; Ġthe repeats the, ĠT repeats T and so t."""
    found = audit(of_bytes([*MERGES]), sections=["redundancy"])
    count = 128 + len(MERGES)
    blank, case, either = (row.values[0] for row in found.sections["redundancy"].lines)
    assert blank == pytest.approx(2 / count)
    assert case == pytest.approx(26 / count)
    assert either == pytest.approx(28 / count)


def test_numbers_show_where_they_are_cut() -> None:
    tokenizer = of_bytes([("1", "2"), ("12", "3"), ("0", "0")])
    found = audit(tokenizer, sections=["numbers"])
    assert values(found, "numbers", "1,234,567") == ("1|,|2|3|4|,|5|6|7",)
    assert values(found, "numbers", "00123") == ("00|123",)
    assert values(audit(of_bytes(), sections=["numbers"]), "numbers", "direction") == ("single",)
    assert values(audit(of_bytes(), sections=["numbers"]), "numbers", "3 digits") == ("1+1+1",)


def test_overview_reads_the_description(tmp_path: Path) -> None:
    tokenizer = of_bytes(MERGES)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300, "model_type": "llama"}))
    found = audit({"mine": tokenizer, "folder": tmp_path}, sections=["overview"])
    size = 2 + 256 + len(MERGES)
    assert values(found, "overview", "bytes") == ("all", "all")
    assert values(found, "overview", "tokens") == (size, size)
    assert values(found, "overview", "special tokens") == (2, 2)
    assert values(found, "overview", "padded rows") == (None, 300 - size)
    holes = Tokenizer(models.BPE({"a": 0, "b": 7}, []))
    assert values(audit(holes, sections=["overview"]), "overview", "unused ids") == (6,)


def test_every_section_stands_beside_the_others(texts: Path, tmp_path: Path) -> None:
    byte, word = of_bytes(MERGES), Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}))
    word.pre_tokenizer = pre_tokenizers.Whitespace()
    told: list[str] = []
    found = audit(
        {"byte": byte, "word": word}, "all", progress=lambda what, done, total: told.append(what)
    )
    assert list(found.sections) == list(SECTIONS)
    for part in found.sections.values():
        assert all(len(row.values) == 2 for row in part.lines)
        assert part.title in found.table()
    assert "without prose (Brown): brown is not fetched without your consent" in found.table()
    assert "texts, byte" in told
    assert json.loads(found.to_json(tmp_path / "a.json")) == found.to_dict()
    frame = pytest.importorskip("pandas") and found.to_dataframe()
    assert len(frame) == sum(2 * len(part.lines) for part in found.sections.values())


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    name = '<script>alert("x")</script>'
    both = {name: of_bytes(), "b": of_bytes(MERGES)}
    found = audit(both, texts={"<b>": "the cat"}, sections=["text", "fidelity", "redundancy"])
    page = found.to_html(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text() == page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=|https?:(?!//www\.w3)|url\(", page.split("</style>")[1])
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert f"style-src '{_source_hash(style)}'" in page
    assert page.count("<rect") >= 4  # the key and the bars
    assert "<b>" not in page
    assert '<svg class="bars"' not in audit(of_bytes(), sections=["overview"]).to_html()


def test_a_section_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def lengths(tokenizers: Any, material: Material) -> Section:
        """Letters of the longest token."""
        longest = tuple(
            max(len(text) for _, text in material.pieces(tokenizer))
            for tokenizer in tokenizers.values()
        )
        return Section("Lengths", tuple(tokenizers), (Row("g", "longest", "count", longest),), "g")

    monkeypatch.setitem(SECTIONS, "lengths", lengths)
    found = audit(of_bytes(MERGES), sections=["lengths"])
    assert values(found, "lengths", "longest") == (4,)
    assert "Lengths" in found.to_html()


def test_plot_draws_the_rows() -> None:
    pytest.importorskip("plotly")
    part = audit({"a": of_bytes(), "b": of_bytes()}, sections=["redundancy"]).sections["redundancy"]
    figure = part.plot()
    assert [bar.name for bar in figure.data] == ["a", "b"]
    assert len(figure.data[0].y) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizers": "cl100"}, r"unknown tokenizer 'cl100' \(did you mean 'cl100k'"),
        ({"tokenizers": []}, "no tokenizer to audit"),
        ({"tokenizers": [3]}, "no tokenizer of transformers"),
        ({"sections": ["txt"]}, r"unknown section 'txt' \(did you mean 'text'"),
        ({"sections": []}, "no section to show"),
        ({"texts": {"mine": "  \n"}}, "the text 'mine' is empty"),
        ({"texts": {"mine": "a\ud800"}}, "'mine' is not UTF-8 text: its character 2"),
    ],
)
def test_a_mistake_is_one_line(options: dict[str, Any], words: str) -> None:
    given = {"tokenizers": of_bytes()} | options
    with pytest.raises(PertokenError, match=words) as caught:
        audit(**given)
    assert "\n" not in str(caught.value)

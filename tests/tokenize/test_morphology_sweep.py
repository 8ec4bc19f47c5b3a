"""Morphology sweeps: every family in one grid, gone on with, and what a probe learns of pieces."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pertoken import PertokenError
from pertoken.tokenize import (
    Analyzer,
    MorphologySweep,
    morphology_report,
    morphology_sweep,
    open_analyzer,
    read_morphology_sweep,
    word_probe,
)
from pertoken.tokenize._morphology_cell import FAMILIES
from pertoken.tokenize._whole import whole_words
from pertoken.tokenize.train import train_backend

GOLD = open_analyzer("gold")
TEXT = " ".join(GOLD.words)
PAIRS = [(word, "many" if "ler" in word or "lar" in word else "one") for word in GOLD.words]


def plan(**more: Any) -> dict[str, Any]:
    return {
        "corpora": {"all": [TEXT, TEXT]},
        "vocabularies": [560, 700],
        "families": list(FAMILIES),
        "analyzer": "gold",
        **more,
    }


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[MorphologySweep, Path]:
    path = tmp_path_factory.mktemp("sweep") / "cells.jsonl"
    return morphology_sweep(plan(probes={"plural": PAIRS}), path), path


def test_every_family_has_its_cells(swept: tuple[MorphologySweep, Path]) -> None:
    found, path = swept
    assert len(found.cells) == 2 * len(FAMILIES)
    assert found.best()["family"] == "morphology"
    assert found.curve("all", "morphology") == {560: 1.0, 700: 1.0}  # its own gold cuts it
    fertility = {name: found.curve("all", name, "fertility")[700] for name in FAMILIES}
    assert fertility["word"] < fertility["morphology"] < fertility["character"]
    assert found.curve("all", "word", "micro precision")[700] > 0.98
    assert found.curve("all", "character", "micro recall")[700] == 1
    assert read_morphology_sweep(path).cells == found.cells
    assert all(row["probes"]["plural"]["accuracy"] >= 0 for row in found.cells)
    table = found.table().splitlines()
    assert table[0].split()[-2:] == ["probe", "plural"]
    assert len(table) == 1 + len(found.cells)
    assert "probe plural" in found.rows()[0]
    assert found.to_html().count("<tr>") >= len(found.cells)
    assert len(found.plot().data) == len(FAMILIES)


def test_a_finished_cell_is_not_trained_again(
    swept: tuple[MorphologySweep, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, path = swept
    module = import_module("pertoken.tokenize.morphology_sweeps")
    made: list[tuple[Any, ...]] = []

    def watched(*call: Any) -> dict[str, Any]:
        made.append(call[1:3])
        figures = {"size": 0, "micro F1": 0.0, "fertility": 1.0, "probes": {}}
        return {**figures, "invalid": [], "valid": 0, "pure": 0, "different": 0}

    monkeypatch.setattr(module, "measure", watched)
    again = morphology_sweep(plan(probes={"plural": PAIRS}), path)
    assert again.cells == found.cells
    assert made == []
    content = path.read_bytes()
    own = path.with_name("cut.jsonl")
    own.write_bytes(content[:-10])  # killed while it wrote
    morphology_sweep(plan(probes={"plural": PAIRS}), own)
    assert made == [(700, "morphology")]
    morphology_sweep(plan(probes={"plural": PAIRS}, words=["evler"]), own)  # other words: all anew
    assert len(made) == 1 + len(found.cells)


@pytest.mark.parametrize("morphemes", [(), ("ev", "le")])
def test_a_cell_has_the_figures_of_the_report(morphemes: tuple[str, ...], tmp_path: Path) -> None:
    """Of its tokens too, which are no words of any text."""

    def analyze(word: str) -> list[list[str]]:
        known = {one.morphemes for each in GOLD.words for one in GOLD(each)}
        own = [list(cut) for cut in known if "".join(cut) == word]
        return own or [[word]] * (len(word) == 2) or [[word[:1], word[1:]]] * (len(word) == 3)

    reader = Analyzer(analyze, words=GOLD.words, morphemes=morphemes)
    texts, words = [TEXT, TEXT], list(GOLD.words)
    given = plan(analyzer=reader, families=["bpe"], vocabularies=[400], words=words[::2])
    (cell,) = morphology_sweep(given, tmp_path / "out.jsonl").cells
    report = morphology_report(train_backend(texts, 400, "bpe"), words[::2], reader)
    assert report["valid"] > report["pure"] > 0
    for name, value in report.values.items():
        assert name == "vocabulary" or cell[name] == value, name
    assert "invalid" not in cell


def test_other_gold_is_another_cell(tmp_path: Path) -> None:
    gold, out = tmp_path / "gold.tsv", tmp_path / "out.jsonl"
    given = plan(words=["evler"], families=["bpe"], vocabularies=[400], analyzer=gold)
    for content, cells in (("", 1), ("", 1), ("ler\tler\n", 2)):  # a token, and no measured word
        gold.write_text(f"evler\tev\tler\n{content}", encoding="utf-8")
        morphology_sweep(given, out)
        assert len(out.read_text().splitlines()) == cells


def test_files_are_named_from_the_plan(tmp_path: Path) -> None:
    (tmp_path / "web.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "gold.tsv").write_text("evler\tev\tler\n", encoding="utf-8")
    (tmp_path / "case.tsv").write_text("evler\tmany\nev\tone\nev\tone\n", encoding="utf-8")
    text = 'vocabularies = [300]\nfamilies = ["word"]\nanalyzer = "gold.tsv"\n'
    text += '[corpora]\nweb = "web.txt"\n[probes]\ncase = "case.tsv"\n'
    (tmp_path / "plan.toml").write_text(text)
    (cell,) = morphology_sweep(tmp_path / "plan.toml", tmp_path / "out.jsonl").cells
    assert (cell["corpus"], cell["words"], cell["probes"]["case"]["majority"]) == ("web", 1, 0)
    (tmp_path / "case.tsv").write_text("evler\tmany\nev\n", encoding="utf-8")
    with pytest.raises(PertokenError, match=r"line 2 of .*case.tsv is no TEXT, tab, LABEL"):
        morphology_sweep(tmp_path / "plan.toml", tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"corpora": {}}, "a sweep takes corpora"),
        ({"corpora": {"x": [" "]}}, "the corpus x is empty"),
        ({"vocabularies": 700}, "a sweep takes vocabularies, a list of sizes"),
        ({"families": ["wordpeice"]}, r"unknown family 'wordpeice' \(did you mean 'wordpiece'"),
        ({"vocabularies": [300]}, "a vocabulary of 300 is smaller than the alphabet of wordpiece"),
        ({"vocab": [300]}, r"unknown setting 'vocab' of a sweep \(did you mean 'vocabularies'"),
        ({"analyzer": len}, "a sweep takes words, a text file, unless the analyser is a gold"),
        ({"seed": 0.5}, "seed is a whole number"),
    ],
)
def test_a_plan_that_cannot_be_run_is_one_line(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PertokenError, match=message):
        morphology_sweep(plan(**more), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_words_and_morphemes_that_are_no_token_are_unknown_and_cut_off() -> None:
    cuts = {"evler": ["ev", "ler"], "okullar": ["okul", "lar"]}
    backend = whole_words([" evler evler ağ"], 10, 2, ["<end>"], cuts)
    assert set(backend.get_vocab()) == {"<end>", "<unk>", " ev", "ler"}  # ağ stands there once
    assert backend.encode(" evler").tokens == [" ev", "ler"]
    readings = {word: [parts] for word, parts in cuts.items()}
    found = morphology_report(backend, list(cuts), readings.get)
    assert found["micro F1"] == 1
    assert found["cut exactly"] == found["coverage"] == found["lemma is one token"] == 1 / 2
    assert found["unknown"] == 2 / 4
    assert whole_words([" evler evler"], 3, 1, ["<end>"], cuts).get_vocab_size() == 3


def test_a_probe_learns_what_pieces_tell_and_is_drawn_by_its_seed() -> None:
    stems = ["bab", "dad", "fag", "gah", "kal", "mor", "pes", "ruv"]
    pairs = [(stem + end, end) for end in ("ler", "den", "im") for stem in stems]
    train, test = pairs[0::2], pairs[1::2]
    cuts = {stem + end: [stem, end] for end in ("ler", "den", "im") for stem in stems}
    ends = whole_words([" " + " ".join(cuts)], 1000, 1, [], cuts)
    words = whole_words([" " + " ".join(cuts)], 1000, 1, [])
    good = word_probe(ends, train, test)
    assert good.accuracy == good.f1 == 1
    assert good.majority == pytest.approx(1 / 3)
    assert word_probe(words, train, test).accuracy <= 0.5  # no word was seen
    small = word_probe(ends, train, test, parameters=200)
    assert small.parameters <= 200 < good.parameters
    assert small == word_probe(ends, train, test, parameters=200)
    with pytest.raises(PertokenError, match="a probe needs texts of two labels"):
        word_probe(ends, train[:1], test)


def test_the_families_train_what_train_tokenizer_trains() -> None:
    from pertoken.tokenize._morphology_cell import train_family

    mine = train_family([TEXT, TEXT], 300, "bpe", {})
    assert mine.get_vocab() == train_backend([TEXT, TEXT], 300, "bpe").get_vocab()

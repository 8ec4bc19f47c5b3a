"""`pertoken turkish` and `turkish-sweep`: columns, JSON, a page, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pertoken.cli import main
from pertoken.tokenize import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("turkish")
    train_tokenizer(["a"], 258).save_pretrained(path / "small")
    train_tokenizer(["a"], 257).save_pretrained(path / "bytes")
    (path / "text.txt").write_text("Evler, evler; xq evde.", encoding="utf-8")
    (path / "gold.tsv").write_text("evler\tev\tler\nevde\tev\tde\n", encoding="utf-8")
    return path


def test_tokenizers_are_columns(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["turkish", "./small", "./bytes"]) == 0
    shown = capsys.readouterr().out
    assert "./small" in shown
    assert "60 words cut by turkish_gold.tsv" in shown
    given = ["turkish", "./small", "--text", "text.txt", "--analyzer", "gold.tsv"]
    assert main([*given, "--json", "-", "--html", "page.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["row"]: row["values"]["./small"] for row in found["rows"]}
    assert rows["micro recall"] == 1  # single bytes
    assert "not analysed: 2 words left out (Evler, xq)" in found["notes"]
    assert "<svg" in (folder / "page.html").read_text(encoding="utf-8")
    assert main([*given, "--inner", "--limit", "2", "--json", "-"]) == 0
    inner = {row["row"]: row["values"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert inner["micro precision"]["./small"] == 1 / 4  # of "evler" alone


def test_every_tokenizer_is_opened_before_a_word_is_cut(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pertoken.tokenize

    def none(*_: object, **__: object) -> None:
        raise AssertionError("a tokenizer is missing")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(pertoken.tokenize, "morphology_report", none, raising=False)
    assert main(["turkish", "./small", "./none"]) == 2
    assert "none" in capsys.readouterr().err


def test_a_plan_is_swept_and_gone_on_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    plan = 'vocabularies = [300]\nfamilies = ["word", "bpe"]\nanalyzer = "gold.tsv"\n'
    (folder / "plan.toml").write_text(plan + '[corpora]\nweb = "text.txt"\n')
    for _ in range(2):
        assert main(["turkish-sweep", "plan.toml"]) == 0
        shown, said = capsys.readouterr()
        assert shown.splitlines()[1].split()[:2] == ["web", "word"]
        assert "2 cells in plan.jsonl" in said
    assert len((folder / "plan.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["turkish", "nowhere-at-all"], "nowhere-at-all"),
        (["turkish", "gpt2", "--analyzer", "zeyrk"], "did you mean 'zeyrek'"),
        (["turkish", "gpt2", "--text", "none.txt"], "there is no text file none.txt"),
        (["turkish-sweep", "none.toml"], "cannot read none.toml"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1

"""`pertoken premiums`: tables and a page, going on, one line for what is wrong."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pertoken.cli import main
from pertoken.tokenize import Sweep

SENTENCES = {
    "eng": ["all are born free", "all are equal", "all have rights", "no one is a slave"],
    "deu": ["alle sind frei", "alle sind gleich", "alle haben Rechte", "niemand ist Sklave"],
    "ell": ["όλοι ελεύθεροι", "όλοι είναι ίσοι", "όλοι έχουν δικαιώματα", "κανείς δούλος"],
}
PLAN = 'text = "texts"\nvocabularies = [260, 266, 272]\nkinds = ["bpe", "superword"]\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for language, lines in SENTENCES.items():
        text = "\n".join(lines * 3)
        (tmp_path / "texts" / f"{language}.txt").write_text(text, encoding="utf-8")
    file = tmp_path / "plan.toml"
    file.write_text(PLAN)
    return file


def test_a_sweep_is_shown_and_written(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html = tmp_path / "page.html"
    assert main(["premiums", "sweep", str(config), "--html", str(html)]) == 0
    shown, said = capsys.readouterr()
    assert "18 cells in" in said
    assert "Corpus token counts over the languages" in shown
    for kind in ("bpe", "superword"):
        assert f"{kind}: the vocabulary at which each language takes" in shown
    page = html.read_text(encoding="utf-8")
    assert page.count("<polyline") == 6
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    rows = [json.loads(line) for line in (tmp_path / "plan.jsonl").read_text().splitlines()]
    assert len(rows) == 18
    again = tmp_path / "again.html"
    assert main(["premiums", "show", str(tmp_path / "plan.jsonl"), "--html", str(again)]) == 0
    assert capsys.readouterr().out == shown
    assert again.read_text(encoding="utf-8") == page
    assert main(["premiums", "show", str(tmp_path / "plan.jsonl"), "--target", "250"]) == 0
    assert "takes 250 tokens" in capsys.readouterr().out


def test_a_second_run_trains_nothing(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["premiums", "sweep", str(config)]) == 0
    first = capsys.readouterr().out

    def refuse(*_: object) -> None:
        pytest.fail("trained again")

    monkeypatch.setattr(import_module("pertoken.tokenize.sweeps"), "measure", refuse)
    assert main(["premiums", "sweep", str(config)]) == 0
    assert capsys.readouterr().out == first


def test_lost_cells_are_said_with_exit_code_1(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lossy(*_: Any, **__: Any) -> Sweep:
        return Sweep("eng", [], [("deu", "bpe", 260)])

    monkeypatch.setattr(import_module("pertoken.tokenize.sweeps"), "sweep", lossy)
    assert main(["premiums", "sweep", str(config)]) == 1
    said = capsys.readouterr().err
    assert "1 lost, their worker was killed (deu bpe 260): run the same command again" in said


def test_what_is_wrong_is_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    languages = tmp_path / "languages.toml"
    languages.write_text(PLAN + 'languages = ["eng", "deuu"]')
    out = str(tmp_path / "x.jsonl")
    for words, line in [
        (["sweep", str(languages)], "unknown language 'deuu' (did you mean 'deu'?)"),
        (["sweep", str(tmp_path / "none.toml")], "cannot read"),
        (["sweep", str(config), "--jobs", "0"], "jobs must be 1 or more"),
        (["sweep", str(config), "--out", out, "--html", out], "both want to write"),
        (["sweep", str(config), "--html", str(tmp_path / "no" / "x.html")], "there is no folder"),
        (["show", str(tmp_path / "none.jsonl")], "no sweep at"),
        (["show", str(config)], "is no file of a sweep"),
        (["show", str(config), "--target", "0"], "--target is a number of tokens above 0"),
    ]:
        assert main(["premiums", *words]) == 2
        said = capsys.readouterr().err
        assert line in said
        assert said.count("\n") == 1
    assert not Path(out).exists()

"""`pertoken audit` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pertoken.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "t.txt").write_text("the cat and the hat")
    rows = [
        {"code": code, "iso639_3": iso, "language": name, "direction": "ltr", "articles": [text]}
        for code, iso, name, text in (
            ("eng", "eng", "English", "free"),
            ("deu_1996", "deu", "German", "frei und gleich"),
        )
    ]
    (tmp_path / "udhr.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.setenv("PERTOKEN_DATA", str(tmp_path))
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PERTOKEN_ACCEPT_LICENCE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tables_of_two_tokenizers(tiny_folder: str, capsys: Capture) -> None:
    both = [tiny_folder, f"{tiny_folder}/tokenizer.json"]
    assert main(["audit", *both, "--text", "t.txt", "--section", "text"]) == 0
    out, err = capsys.readouterr()
    assert "bytes per token" in out
    assert "t.txt" in out
    assert out.count("1.00") == 2  # a token is a byte in both
    assert err == ""


def test_files_and_json_on_standard_output(here: Path, tiny_folder: str, capsys: Capture) -> None:
    some = ["--section", "languages", "--langs", "de", "--html", "o.html", "--json"]
    assert main(["audit", tiny_folder, *some, "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = found["sections"]["languages"]["rows"][1]
    assert row["row"] == "German (deu_1996)"
    assert row["values"] == {tiny_folder: 15 / 4}
    assert "German (deu_1996)" in (here / "o.html").read_text()
    assert main(["audit", tiny_folder, *some, "o.json"]) == 0
    assert json.loads((here / "o.json").read_text()) == found


def test_lines_on_a_terminal(tiny_folder: str) -> None:
    from io import StringIO

    from rich.console import Console

    from pertoken.cli.audit import _print_tables
    from pertoken.tokenize import audit

    console = Console(file=StringIO(), width=100, force_terminal=False)
    _print_tables(audit({"[b]": tiny_folder}, sections=["controls", "numbers"]), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[b]" in shown  # a name is no markup
    assert "[INST]" in shown
    assert "note: " in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cl100"], "unknown tokenizer 'cl100' (did you mean 'cl100k'?)"),
        (["none/tokenizer.json"], "no such tokenizer file or folder"),
        (["gemma3"], "not fetched without your consent"),
        (["TINY", "--langs", "germn"], "unknown language 'germn'"),
        (["TINY", "--langs", "germn", "--section", "numbers"], "unknown language 'germn'"),
        (["TINY", "--langs", ","], "--langs names no language"),
        (["TINY", "--section", "number"], "(did you mean 'numbers'?)"),
        (["TINY", "--text", "latin.txt"], "text file latin.txt is not UTF-8 (byte 4)"),
        (["TINY", "--text", "empty.txt"], "the text 'empty.txt' is empty"),
        (["TINY", "--text", "none.txt"], "there is no text file none.txt"),
        (["t.txt"], "t.txt: not a SentencePiece model"),
        (["."], "holds no tokenizer"),
        (["slow"], "slow tokenizer"),
        (["TINY", "--html", "no/o.html"], "there is no folder no"),
        (["TINY", "--html", "o", "--json", "o"], "both want to write o"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, here: Path, tiny_folder: str, capsys: Capture
) -> None:
    (here / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (here / "empty.txt").write_text("\n")
    if arguments == ["slow"]:
        from transformers import ByT5Tokenizer

        ByT5Tokenizer().save_pretrained(here / "slow")
    given = [tiny_folder if word == "TINY" else word for word in arguments]
    assert main(["audit", *given]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert out == ""

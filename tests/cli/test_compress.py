"""`pertoken compress` as a user types it."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from pertoken.cli import main

Capture = pytest.CaptureFixture[str]
TEXT = "The cat sat on the mat, and so did 3 dogs.\r\nAnswer with one word.\r\n"
CHEAP = ["--salience", "stop-words"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "p.txt").write_bytes(TEXT.encode())
    chat = [
        {"role": "user", "content": "The cat sat on the mat."},
        {"role": "assistant", "content": "So it did and it is there."},
        {"role": "user", "content": "And the dog?"},
    ]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, chat)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_text_to_stdout_and_report_to_stderr(capsys: Capture) -> None:
    assert main(["compress", "p.txt", "--keep", "0.6", *CHEAP, "--protect", "numbers"]) == 0
    out, err = capsys.readouterr()
    assert out == "cat sat mat, 3 dogs.\r\nAnswer with one word.\r\n"
    assert re.match(r"9 of 15 words kept; \d+\.\d\d s\n", err)
    assert "words protected: numbers (1), answer format (4)" in err
    assert "note: the stop words are English ones" in err


def test_everything_is_byte_for_byte(here: Path, capsys: Capture) -> None:
    (here / "p.txt").write_bytes(("\ufeff" + TEXT).encode())
    assert main(["compress", "p.txt", "--keep", "1"]) == 0  # and no model is asked for
    assert capsys.readouterr().out == "\ufeff" + TEXT


def test_from_a_pipe_into_files(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode()), "utf-8"))
    files = ["--html", "o.html", "--json", "o.json"]
    assert main(["compress", "-", *CHEAP, *files, "--no-protect-defaults", "--lowest"]) == 0
    found = json.loads((here / "o.json").read_text())
    assert found["text"] == capsys.readouterr().out
    assert found["prompt"] == TEXT
    assert "<del " in (here / "o.html").read_text()


def test_a_chat(capsys: Capture) -> None:
    assert main(["compress", "talk.jsonl", "--chat", "--keep", "0.5", *CHEAP]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["role"] for row in rows] == ["user", "assistant", "user"]
    assert rows[0]["content"] == "cat sat mat."
    assert rows[2]["content"] == "And the dog?"
    assert "last message of the user (3)" in err


def test_a_decoder_rates_and_counts(tiny_folder: str, capsys: Capture) -> None:
    model = ["--model", tiny_folder, "--target-tokenizer", tiny_folder]
    assert main(["compress", "p.txt", "--salience", "self-information", *model]) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"{len(out)} of {len(TEXT)} tokens, 12 of 15 words kept; ")
    assert re.search(r", [\d,]+ tokens/s\n", err)
    assert main(["compress", "p.txt", "--salience", "random", "--seed", "3"]) == 0
    assert "tokens" not in capsys.readouterr().err


@pytest.mark.parametrize("salience", ["globenc", "decompx"])
def test_a_decoder_rates_in_the_place_of_an_encoder(
    salience: str, tiny_folder: str, capsys: Capture
) -> None:
    assert main(["compress", "p.txt", "--salience", salience, "--model", tiny_folder]) == 0
    out, err = capsys.readouterr()
    assert "Answer with one word." in out
    assert "12 of 15 words kept" in err
    assert "note: the salience model is a decoder" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.txt"], "there is no prompt file missing.txt"),
        (["."], "is a folder"),
        (["p.txt", "--keep", "0"], "above 0 and at most 1, got 0"),
        (["p.txt", "--keep", "1.5"], "got 1.5"),
        (["p.txt", "--salience", "globec"], "(did you mean 'globenc'?)"),
        (["p.txt", "--protect", "(", *CHEAP], "the pattern '(' does not compile"),
        (["p.txt", "--salience", "self-information", "--model", "minilm"], "minilm is an encoder"),
        (
            ["p.txt", *CHEAP, "--model", "nonesuch"],
            "stop-words rates without a model: leave 'nonesuch' out",
        ),
        (["p.txt", "--salience", "random", "--model", "minilm"], "random rates without a model"),
        (["latin.txt"], "prompt file latin.txt is not UTF-8 (byte 4)"),
        (["empty.txt"], "the prompt is empty"),
        (["p.txt", "--chat"], "p.txt, line 1: not JSON"),
        (["odd.jsonl", "--chat"], "odd.jsonl, line 1: the role is one of"),
        (["p.txt", "--html", "none/o.html"], "there is no folder none"),
        (["p.txt", "--html", "o", "--json", "o"], "both want to write o"),
        (["p.txt", "--target-tokenizer", "smolm2"], "(did you mean 'smollm2'?)"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, here: Path, capsys: Capture
) -> None:
    (here / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (here / "empty.txt").write_text("\n")
    (here / "odd.jsonl").write_text('{"role": "me", "content": "x"}')
    assert main(["compress", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_pipe_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), "utf-8"))
    assert main(["compress", "-"]) == 2
    assert "the prompt on standard input is not UTF-8 (byte 3)" in capsys.readouterr().err

"""`pertoken style` and `generate --style` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pertoken.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def bard(tmp_path: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A style in the folder where the command is given."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("to be or not to be")
    Path("b.jsonl").write_text('{"text": "be"}\n{"text": "not"}\n')
    run = ["--model", tiny_folder, "--json", "found.json"]
    assert main(["style", "train", "a.txt", "b.jsonl", "--out", "bard.style", *run]) == 0
    return tmp_path / "bard.style"


def test_train_counts_texts_and_lines(bard: Path, tiny_folder: str, capsys: Capture) -> None:
    found = json.loads(Path("found.json").read_text())
    assert (found["texts"], found["tokens"]) == (3, 23)
    assert found["bytes"] == bard.stat().st_size
    capsys.readouterr()
    assert main(["style", "train", "a.txt", "--out", "o.style", "--model", tiny_folder]) == 0
    assert capsys.readouterr().out.startswith("o.style: 18 tokens of 1 texts")


def test_sweep_prints_and_writes(bard: Path, tiny_folder: str, capsys: Capture) -> None:
    run = ["--model", tiny_folder, "--max-new-tokens", "6", "--limit", "2", "--html", "page.html"]
    assert main(["style", "sweep", "bard.style", "--strengths", "0,1", *run]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["0", "1"]
    assert "2 prompts, 6 new tokens each" in lines[3]
    assert "<svg" in Path("page.html").read_text()


def test_generate_follows_the_style(bard: Path, tiny_folder: str, capsys: Capture) -> None:
    texts = {}
    for name, extra in (
        ("plain", []),
        ("zero", ["--style", "bard.style", "--strength", "0"]),
        ("full", ["--style", "bard.style", "--strength", "1"]),
    ):
        run = ["--model", tiny_folder, "--max-new-tokens", "12", "--no-chat", *extra]
        assert main(["generate", "to", *run]) == 0
        texts[name] = capsys.readouterr().out
    assert texts["zero"] == texts["plain"] != texts["full"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["style", "train", "no.txt", "--out", "o.style"], "there is no text file no.txt"),
        (["style", "train", "empty.txt", "--out", "o.style"], "the corpus is empty"),
        (["style", "train", "a.txt", "--out", "no/o.style"], "there is no folder no"),
        (["style", "sweep", "no.style"], "there is no style file no.style"),
        (["style", "sweep", "bard.style", "--strengths", "0,2"], "between 0 and 1, got 2"),
        (["style", "sweep", "bard.style", "--strengths", "much"], "--strengths takes numbers"),
        (["style", "sweep", "bard.style", "--normalize", "max"], "--normalize takes gap"),
        (["generate", "a", "--strength", "0.1"], "--strength goes with --style"),
        (["generate", "a", "--style", "no.style"], "there is no style file no.style"),
        (["generate", "a", "--style", "bard.style", "--strength", "9"], "between 0 and 1, got 9"),
        (["generate", "a", "--style", "a.txt", "--model", "TINY"], "a.txt is no style file"),
    ],
)
def test_a_mistake_is_one_line(
    bard: Path, tiny_folder: str, words: list[str], line: str, capsys: Capture
) -> None:
    Path("empty.txt").write_text("")
    assert main([tiny_folder if word == "TINY" else word for word in words]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said

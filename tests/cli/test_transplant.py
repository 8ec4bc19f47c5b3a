"""`pertoken transplant` as a user types it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pertoken.cli import main
from pertoken.errors import PertokenError

Capture = pytest.CaptureFixture[str]
LINES = [f"as soon as it can, line {number} of the text\n" for number in range(60)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "corpus.txt").write_text("".join(LINES), encoding="utf-8")
    (tmp_path / "text.txt").write_text("as it is", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_supertokens_from_a_corpus_into_a_new_folder(
    tiny_folder: str, here: Path, capsys: Capture
) -> None:
    argv = ["transplant", tiny_folder, "out", "--supertokens", "300", "--corpus", "corpus.txt"]
    assert main([*argv, "--json", "o.json"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^300 tokens in \d+\.\d s: 257 copied, 43 composed, ", out)
    assert re.search(
        r"^perplexity per byte: [\d.]+ before, .* bytes of the end of corpus", out, re.M
    )
    assert "checked: logits are equal after reloading" in out
    found = json.loads((here / "o.json").read_text())
    figures = found["perplexity_per_byte"]
    assert figures["ratio"] == pytest.approx(figures["after"] / figures["before"])
    assert sum(found["counts"].values()) == found["tokens"] == 300
    assert sorted(path.name for path in here.iterdir()) == [
        "corpus.txt",
        "o.json",
        "out",
        "text.txt",
    ]

    from pertoken.loading import load

    _, tokenizer = load(here / "out")
    assert tokenizer.decode(tokenizer("as soon as it can")["input_ids"]) == "as soon as it can"


def test_its_own_tokenizer_costs_nothing(tiny_folder: str, capsys: Capture) -> None:
    assert main(["transplant", tiny_folder, tiny_folder, "same", "--text", "text.txt"]) == 0
    assert re.search(r"ratio 1\.000 \(8 bytes of text.txt\)", capsys.readouterr().out)


def test_an_interrupted_transplant_leaves_no_folder(
    tiny_folder: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pertoken.tokenize.check.check_transplant", interrupted)
    assert main(["transplant", tiny_folder, tiny_folder, "out", "--text", "text.txt"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert sorted(path.name for path in here.iterdir()) == ["corpus.txt", "text.txt"]


def test_the_tokenizer_is_opened_before_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the tokenizer is missing")

    monkeypatch.setattr("pertoken.cli.options.load", loaded)
    assert main(["transplant", "smollm2", "./none", "out", "--text", "text.txt"]) == 2
    assert "none" in capsys.readouterr().err


def test_nothing_is_measured_of_tokenizers_that_do_not_fit(
    tiny_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PertokenError("they do not fit")

    def measured(*_: Any, **__: Any) -> None:
        raise AssertionError("it is measured")

    monkeypatch.setattr("pertoken.tokenize.tokenadapt.Transplant", refused)
    monkeypatch.setattr("pertoken.tokenize.per_byte.nats_per_text", measured)
    assert main(["transplant", tiny_folder, tiny_folder, "out", "--text", "text.txt"]) == 2
    assert capsys.readouterr().err == "error: they do not fit\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["out"], "give MODEL NEW_TOKENIZER OUT"),
        (["new", "out", "--supertokens", "300", "--corpus", "corpus.txt"], "without a tokenizer"),
        (["out", "--supertokens", "300"], "--supertokens needs --corpus FILE"),
        (["new", "out", "--corpus", "corpus.txt"], "--corpus is for --supertokens"),
        (["out", "--supertokens", "300", "--corpus", "gone.txt"], "there is no corpus gone.txt"),
        (["out", "--supertokens", "300", "--corpus", "empty.txt"], "empty.txt is empty"),
        (["out", "--supertokens", "300", "--corpus", "latin.txt"], "not UTF-8 (byte 1)"),
        (["out", "--supertokens", "300", "--corpus", "one.txt"], "is one line"),
        (["out", "--supertokens", "99", "--corpus", "corpus.txt"], "smaller than the alphabet"),
        (["new", "full", "--text", "text.txt"], "full is there already"),
        (["new", "gone/out", "--text", "text.txt"], "there is no folder"),
        (["new", "out", "--text", "empty.txt"], "empty.txt is empty"),
        (["new", "out", "--text", "text.txt", "--method", "tokenadpt"], "unknown method"),
        (["new", "out", "--text", "text.txt", "--temperature", "0"], "must be above 0"),
        (["new", "out", "--text", "text.txt", "--embedder", "nomic"], "unknown embedder 'nomic'"),
        (["no-such", "out", "--text", "text.txt"], "no-such"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: list[str], line: str, tiny_folder: str, here: Path, capsys: Capture
) -> None:
    (here / "empty.txt").write_text(" \n")
    (here / "one.txt").write_text("a line")
    (here / "latin.txt").write_bytes("é".encode("latin-1"))
    (here / "full").mkdir()
    (here / "full" / "file").write_text("x")
    before = sorted(here.iterdir())
    assert main(["transplant", tiny_folder, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert line in err
    assert sorted(here.iterdir()) == before

"""`pertoken explain` and `pertoken evaluate-attribution` as a user types them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from pertoken.attribute import METHODS
from pertoken.cli import main
from pertoken.signal import TokenSignal

Capture = pytest.CaptureFixture[str]
QUICK = ["--max-steps", "2", "--draws", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [{"prompt": "abc abc"}, {"prompt": "so so so"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))


def test_the_text_and_its_top_tokens(tiny_folder: str, capsys: Capture) -> None:
    arguments = ["--target", "x", "--top", "3", "--model", tiny_folder, "--max-steps", "2"]
    assert main(["explain", "two words", *arguments]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "two words"
    assert lines[1].startswith("reagent of probability of 'x': ")
    assert len(lines[2:]) >= 3
    assert all("'" in line for line in lines[-3:])
    assert "--compare says how faithful this is" in err


@pytest.mark.parametrize("method", METHODS)
def test_every_method_as_json(method: str, tiny_folder: str, capsys: Capture) -> None:
    arguments = ["--method", method, "--max-new-tokens", "2", "--json", "-", "--model", tiny_folder]
    quick = ["--max-steps", "2"] if method == "reagent" else []
    assert main(["explain", "abc", *arguments, *quick]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == method
    signal = TokenSignal.from_json(json.dumps(found["signal"]))
    assert signal.values.shape == (3, 2)
    assert signal.text == "abc"


def test_pages_and_files(tiny_folder: str, here: Path, capsys: Capture) -> None:
    arguments = ["--method", "gradient-norm", "--target", "x", "--model", tiny_folder]
    assert main(["explain", "abc", *arguments, "--html", "o.html", "--json", "o.json"]) == 0
    assert "<title>gradient-norm of probability of" in (here / "o.html").read_text()
    assert json.loads((here / "o.json").read_text())["method"] == "gradient-norm"
    assert capsys.readouterr().out.startswith("abc")


def test_compare_shows_all_with_their_faithfulness(
    tiny_folder: str, here: Path, capsys: Capture
) -> None:
    arguments = ["--compare", "--target", "x", "--model", tiny_folder, *QUICK]
    assert main(["explain", "abcdefgh", *arguments, "--html", "o.html", "--json", "o.json"]) == 0
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines()[-len(METHODS) - 2 :]]
    assert table[0][:2] == ["method", "sufficiency"]
    assert [line[0] for line in table[1:]] == [*METHODS, "random"]
    assert out.count("most: ") == len(METHODS)
    found = json.loads((here / "o.json").read_text())
    assert found["signals"].keys() == METHODS.keys()
    assert found["settings"]["intervals_over"] == "draws"
    page = (here / "o.html").read_text()
    assert all(f"{name} of probability" in page for name in METHODS)
    assert "http" not in page.replace("http-equiv", "")


def test_evaluate_over_a_file(tiny_folder: str, capsys: Capture) -> None:
    arguments = ["--methods", "reagent, gradient-norm", "--model", tiny_folder, *QUICK]
    assert main(["evaluate-attribution", "p.jsonl", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["method", "reagent", "gradient-norm", "random"]
    assert main(["evaluate-attribution", "p.jsonl", *arguments, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["prompts"] == 2
    assert len(found["values"]["reagent"]["sufficiency"]) == 2


def test_a_contrast(tiny_folder: str, capsys: Capture) -> None:
    arguments = ["--quantity", "contrast", "--foil", "y", "--target", "x", "--model", tiny_folder]
    assert main(["explain", "abc", "--method", "occlusion", *arguments]) == 0
    assert "occlusion of contrast with token" in capsys.readouterr().out
    assert main(["explain", "abc", "--model", tiny_folder, *arguments[:2], "--foil", "yz"]) == 2
    assert "the foil 'yz' is 2 tokens" in capsys.readouterr().err


def test_methods_are_compared_on_a_contrast(tiny_folder: str, capsys: Capture) -> None:
    arguments = ["--methods", "gradient-norm", "--model", tiny_folder, "--json", "-"]
    contrast = ["--quantity", "contrast", "--foil", "y"]
    assert main(["evaluate-attribution", "p.jsonl", *contrast, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["quantity"].startswith("contrast with token")


def test_a_prompt_from_a_pipe(
    tiny_folder: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "çay".encode())
    assert main(["explain", "-", "--method", "gradient-norm", "--model", tiny_folder]) == 0
    assert capsys.readouterr().out.startswith("çay")
    for content, message in ((b"", "the prompt is empty"), (b"ok \xff", "not UTF-8 (byte 4)")):
        piped(monkeypatch, content)
        assert main(["explain"]) == 2
        assert message in capsys.readouterr().err


def test_the_price_is_told_before_a_run_that_may_last(
    tiny_folder: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pertoken.cli.explain.LONG", 0.0)
    arguments = ["--method", "lime", "--target", "x", "--model", tiny_folder]
    assert main(["explain", "abc", *arguments]) == 0
    assert "lime: 200 texts through the model, about " in capsys.readouterr().err
    # Of two prompts: each method's texts, and the 2 x 2 draws of both and of random with two ends.
    arguments = ["--methods", "lime,gradient-norm", "--draws", "2", "--model", tiny_folder]
    assert main(["evaluate-attribution", "p.jsonl", *arguments]) == 0
    rows = 2 * (200 + 1 + 2 * 2 * 3 + 2)
    assert f"2 methods, 2 prompts: {rows} texts through the model" in capsys.readouterr().err
    arguments = ["--compare", "--target", "xy", "--model", tiny_folder, *QUICK]
    assert main(["explain", "abc", *arguments]) == 0
    err = capsys.readouterr().err
    assert f"{len(METHODS)} methods, 1 prompt: " in err
    assert " texts through the model, about " in err
    monkeypatch.setattr("pertoken.cli.explain.LONG", 1e9)
    assert main(["explain", "abc", *arguments]) == 0
    assert "texts through the model" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", ""], "the prompt is empty"),
        (["explain", "a", "--target", ""], "the target is empty"),
        (["explain", "a", "--method", "reagents"], "unknown attribution method 'reagents' (did"),
        (["explain", "a", "--method", "lime", "--compare"], "leave --method out"),
        (
            ["explain", "a", "--target", "b", "--max-new-tokens", "2"],
            "--target and --max-new-tokens",
        ),
        (["explain", "a", "--top", "-1"], "--top must be 0 or more"),
        (["explain", "a", "--quantity", "odds"], "unknown quantity 'odds'"),
        (["explain", "a", "--quantity", "contrast"], "--foil"),
        (["explain", "a", "--foil", "b"], "--foil goes with --quantity contrast"),
        (["explain", "a", "--draws", "20"], "--draws goes with --compare"),
        (
            ["explain", "a", "--method", "lime", "--max-steps", "100"],
            "--max-steps goes with the method reagent",
        ),
        (
            ["evaluate-attribution", "p.jsonl", "--methods", "lime,decompx", "--max-steps", "9"],
            "--max-steps goes with the method reagent",
        ),
        (["explain", "a", "--html", "no/o.html"], "can't write no/o.html"),
        (["explain", "a", "--html", "o", "--json", "o"], "both want to write o"),
        (
            ["explain", "a", "--max-new-tokens", "0", "--model", "TINY"],
            "--max-new-tokens must be 1 or more",
        ),
        (["explain", "a", "--max-steps", "0", "--model", "TINY"], "--max-steps must be 1 or more"),
        (
            ["explain", "a", "--compare", "--max-steps", "0", "--model", "TINY"],
            "--max-steps must be 1 or more",
        ),
        (
            ["evaluate-attribution", "p.jsonl", "--max-steps", "0", "--model", "TINY"],
            "--max-steps must be 1 or more",
        ),
        (["explain", "a" * 600, "--model", "TINY"], "shorten the prompt"),
        (["evaluate-attribution", "none.txt"], "there is no prompt file none.txt"),
        (["evaluate-attribution", "latin.txt"], "latin.txt is not UTF-8"),
        (
            ["evaluate-attribution", "p.jsonl", "--quantity", "contrast"],
            'a contrast needs a token to compare with: --foil " Lyon"',
        ),
        (["evaluate-attribution", "p.jsonl", "--foil", "b"], "--foil goes with --quantity"),
        (["evaluate-attribution", "p.jsonl", "--methods", "lim"], "unknown attribution method"),
        (["evaluate-attribution", "p.jsonl", "--limit", "0"], "--limit must be 1 or more"),
        (["evaluate-attribution", "p.jsonl", "--methods", ",", "--model", "TINY"], "one method"),
        (
            ["evaluate-attribution", "p.jsonl", "--draws", "0", "--model", "TINY"],
            "--draws must be 1",
        ),
        (
            ["evaluate-attribution", "p.jsonl", "--distance", "x", "--model", "TINY", *QUICK],
            "unknown distance 'x'",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, tiny_folder: str, here: Path, capsys: Capture
) -> None:
    (here / "latin.txt").write_bytes(b"caf\xe9")
    given = [tiny_folder if argument == "TINY" else argument for argument in arguments]
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1

"""`pertoken pairs`, then `pertoken train cdpo` and `pertoken tokens --method cdpo`, as typed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import pertoken.train
from pertoken.cli import main
from pertoken.train import Sampled

Capture = pytest.CaptureFixture[str]
OUT = ("--out", "o", "--model", "no-such-model")  # found out only when it is loaded
COPIES = ("--method", "cdpo", "--positive", "m", "--negative", "n")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{n}+1=", "answer": f"It is {n + 1}."} for n in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "samples.jsonl").write_text("[1]\n")
    return tmp_path


def test_pairs_are_made_and_an_interrupted_run_goes_on(
    tiny_folder: str, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def sample(model: Any, tokenizer: Any, lessons: Any, **options: Any) -> list[list[Sampled]]:
        asked.append(lessons[0].prompt)
        if len(asked) == 3:
            raise KeyboardInterrupt
        right, wrong = (str(int(lessons[0].prompt[0]) + more) for more in (1, 2))
        return [
            [Sampled(right, right, True), Sampled(wrong, wrong, False), Sampled("?", "", False)]
        ]

    monkeypatch.setattr(pertoken.train, "sample_answers", sample, raising=False)
    line = ["pairs", "a.jsonl", "--model", tiny_folder, "--out", "out", "--samples", "3"]
    assert main(line) == 130
    assert main(line) == 0
    assert asked == ["0+1=", "1+1=", "2+1=", "2+1=", "3+1="]
    told = capsys.readouterr().out
    assert told.startswith("4 pairs, 4 right and 4 wrong answers to learn, of 12 sampled (4 could")
    names = ["negative.jsonl", "pairs.jsonl", "positive.jsonl", "samples.jsonl"]
    assert sorted(path.name for path in (here / "out").iterdir()) == names
    row = json.loads((here / "out" / "pairs.jsonl").read_text().splitlines()[0])
    assert row == {"prompt": "0+1=", "chosen": "1", "rejected": "2"}
    assert main([*line, "--seed", "1"]) == 2
    assert "holds answers of other settings" in capsys.readouterr().err
    with (here / "out" / "samples.jsonl").open("a") as file:
        file.write('{"settings": {"mod')  # a line that was cut off
    assert main(line) == 0
    content = (here / "a.jsonl").read_text()
    (here / "a.jsonl").write_text(content.replace("It is 1.", "It is 2."))  # mended by its owner
    assert main(line) == 0
    row = json.loads((here / "out" / "pairs.jsonl").read_text().splitlines()[0])
    assert row == {"prompt": "0+1=", "chosen": "2", "rejected": "1"}
    assert len(asked) == 5


def test_samples_of_a_model_that_was_trained_in_place_are_not_gone_on_with(
    tiny_folder: str, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(model: Any, tokenizer: Any, lessons: Any, **options: Any) -> list[list[Sampled]]:
        return [[Sampled("1", "1", True), Sampled("2", "2", False)]]

    monkeypatch.setattr(pertoken.train, "sample_answers", sample, raising=False)
    own = here / "model"
    shutil.copytree(tiny_folder, own)
    line = ["pairs", "a.jsonl", "--model", str(own), "--out", "out", "--samples", "2"]
    assert main([*line, "--limit", "1"]) == 0
    (own / "README.md").write_text("a note")
    samples = here / "out" / "samples.jsonl"
    before = samples.read_text()
    capsys.readouterr()
    assert main([*line, "--limit", "1"]) == 0
    assert "other settings" not in capsys.readouterr().err
    assert samples.read_text() == before
    (weights,) = own.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(weights, ns=(1, 1))
    assert main(line) == 2
    assert "holds answers of other settings" in capsys.readouterr().err
    assert samples.read_text() == before


def test_a_model_without_an_answer(tiny_folder: str, capsys: Capture) -> None:
    line = ["pairs", "a.jsonl", "--model", tiny_folder, "--out", "out", "--samples", "2"]
    assert main([*line, "--max-new-tokens", "2", "--limit", "1"]) == 2
    assert "sampled answers is " in capsys.readouterr().err


def test_tokens_of_wrong_answers(tiny_folder: str, here: Path, capsys: Capture) -> None:
    line = ["tokens", "pairs.jsonl", "--method", "cdpo"]
    models = ["--positive", tiny_folder, "--negative", tiny_folder]
    assert main([*line, *models, "--html", "o.html"]) == 0
    assert "counts most" in capsys.readouterr().out
    assert "log_ratio 0" in (here / "o.html").read_text()


def test_copies_of_other_tokens_are_refused(
    tiny_folder: str, other_folder: str, capsys: Capture
) -> None:
    line = ["tokens", "pairs.jsonl", "--method", "cdpo", "--positive", tiny_folder]
    assert main([*line, "--negative", other_folder]) == 2
    assert capsys.readouterr().err == (
        "error: the negative model has another tokenizer: it must be a copy of the positive one\n"
    )


def test_training(tiny_folder: str, capsys: Capture) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    line = ["train", "cdpo", "pairs.jsonl", "--model", tiny_folder, "--out", "out", "--steps", "1"]
    assert main([*line, "--positive", tiny_folder, "--negative", tiny_folder]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1] == f"1 pairs; the model is in {Path('out') / 'model'}"
    assert "weight" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pairs", "no.jsonl", "--out", "o"], "there is no data file no.jsonl"),
        (["pairs", "a.jsonl", "--out", "pairs.jsonl"], "it is a file"),
        (["pairs", "talk.jsonl", "--out", "o"], "talk.jsonl, line 1: pairs are made of"),
        (["pairs", "a.jsonl", "--out", "other"], "samples.jsonl, line 1: no sampled answers"),
        (["pairs", "a.jsonl", *OUT, "--samples", "0"], "--samples must be 1 or more"),
        (["pairs", "a.jsonl", *OUT, "--top-p", "2"], "top_p"),
        (["train", "dpo", "pairs.jsonl", "--out", "o", "--contrast", "2"], "dpo has no contrast"),
        (["train", "cdpo", "pairs.jsonl", "--out", "o"], "cdpo needs the positive model"),
        (["train", "dpo", "a.jsonl", "--out", "o"], 'a.jsonl, line 1: no "chosen" in it'),
        (["tokens", "pairs.jsonl", "--method", "cdpo"], "cdpo needs --positive"),
        (
            ["tokens", "pairs.jsonl", *COPIES, "--model", "m"],
            "cdpo reads --positive and --negative: leave --model out",
        ),
        (
            ["tokens", "pairs.jsonl", *COPIES, "--keep", "0.5"],
            "--keep belongs to sstoken, not to cdpo",
        ),
        (["tokens", "a.jsonl", "--negative", "m"], "--negative belongs to cdpo"),
        (["tokens", "a.jsonl", "--method", "mft", "--history", "m"], "belongs to sstoken"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err

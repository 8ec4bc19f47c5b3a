"""`pertoken select-data`, with a scorer and with models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pertoken.cli import main
from pertoken.testing import ByteTokenizer, tiny_model
from pertoken.train import NgramScorer

SUMS = [f"{n} {n + 3} {2 * n + 3}" for n in range(30)]
WORDS = [f"so it goes on, {'again and ' * (n % 4)}again" for n in range(30)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [json.dumps({"text": text}) for pair in zip(SUMS, WORDS, strict=True) for text in pair]
    (tmp_path / "in.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path / "in.jsonl"


def load(name: str, **_: Any) -> Any:
    """A model that likes digits as much as its name says, and its tokenizer."""
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), scale=0.0)
    head = torch.nn.Linear(model.config.hidden_size, len(tokenizer)).to(model.dtype)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    with torch.no_grad():
        for digit in "0123456789":
            head.bias[tokenizer.encode(digit)] += float(name)
    model.lm_head = head
    return model, tokenizer


def test_a_scorer_selects(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scorer = NgramScorer.fit(SUMS + WORDS, [1] * 30 + [0] * 30, epochs=30)
    scorer.save(source.parent / "scorer")
    out = source.parent / "out.jsonl"
    given = ["--scorer", str(source.parent / "scorer"), "--keep", "0.1"]
    assert main(["select-data", str(source), str(out), *given]) == 0
    assert "kept" in capsys.readouterr().out
    kept = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert kept
    assert set(kept) <= set(SUMS)
    assert main(["select-data", str(source), str(out), *given, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"][1]["documents"] == len(kept)


def test_models_teach_a_scorer(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pertoken.load", load)
    out, saved = source.parent / "out.jsonl", source.parent / "scorer"
    given = ["--models", "0=0.1,1=0.2,2=0.3", "--sample", "40", "--save-scorer", str(saved)]
    page = source.parent / "page.html"
    command = ["select-data", str(source), str(out), "--keep", "0.2", *given, "--html", str(page)]
    assert main(command) == 0
    assert "Documents by strength" in capsys.readouterr().out
    assert "Documents by strength" in page.read_text()
    assert len(NgramScorer.load(saved).top_features()[0]) > 3


def interrupted_after(calls: int, done: Any) -> Any:
    """`done`, until Ctrl-C at a later call."""
    left = [None] * calls

    def call(*given: Any, **more: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return done(*given, **more)

    return call


def test_ctrl_c_while_models_read_says_where_the_losses_are(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = source.parent / "out.jsonl"
    command = ["select-data", str(source), str(out), "--models", "0=0.1,2=0.3", "--sample", "10"]
    monkeypatch.setattr("pertoken.load", interrupted_after(0, load))
    assert main(command) == 130
    assert capsys.readouterr().err == "interrupted\n"  # nothing is there yet
    monkeypatch.setattr("pertoken.load", interrupted_after(1, load))
    assert main(command) == 130
    told = f"losses so far are in {out}.losses; run it again to go on\ninterrupted\n"
    assert capsys.readouterr().err == told
    assert list((source.parent / "out.jsonl.losses").iterdir())


def test_ctrl_c_while_a_scorer_reads_says_where_the_scores_are(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    NgramScorer.fit(SUMS + WORDS, [1] * 30 + [0] * 30).save(source.parent / "scorer")
    out = source.parent / "out.jsonl"
    command = ["select-data", str(source), str(out), "--scorer", str(source.parent / "scorer")]
    score = NgramScorer.score
    monkeypatch.setattr(NgramScorer, "score", interrupted_after(0, score))
    assert main(command) == 130
    told = f"scores so far are in {out}.scores; run it again to go on\ninterrupted\n"
    assert capsys.readouterr().err == told
    monkeypatch.setattr(NgramScorer, "score", score)
    assert main(command) == 0
    assert out.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give either --scorer FILE or --models"),
        (["--models", "a=1", "--scorer", "b"], "give either"),
        (["--models", "a=1,b"], "'b' is not NAME=ABILITY"),
        (["--models", "a=1,b=nan"], "'b=nan' is not NAME=ABILITY"),
        (["--models", "a=1,a=2"], "a is there twice"),
        (["--models", "a=1"], "one model has no order"),
        (["--models", "a=1,b=1"], "no two of the 2 models differ"),
        (["--scorer", "none"], "there is no file none"),
        (["--scorer", "none", "--save-scorer", "x"], "--save-scorer is for a scorer"),
    ],
)
def test_one_line_says_what_is_wrong(
    given: list[str], message: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["select-data", str(source), str(source.parent / "out.jsonl"), *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("out", "given", "message"),
    [
        ("out.jsonl", ["--keep", "10"], "share to keep must be above 0 and at most 1, got 10"),
        ("out.parquet", [], "give a target of the same kind"),
        ("in.jsonl", [], "is what is read"),
        ("none/out.jsonl", [], "none"),
    ],
)
def test_a_target_that_does_not_fit_is_refused_before_a_model_reads(
    out: str,
    given: list[str],
    message: str,
    source: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = ["--models", "no-such-model=1,another=2"]
    assert main(["select-data", str(source), str(source.parent / out), *models, *given]) == 2
    assert message in capsys.readouterr().err

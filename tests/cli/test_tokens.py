"""`pertoken tokens` and `pertoken train sft|mft|sstoken` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pertoken.cli import main

NO_MODEL = ("--model", "no-such-model")  # found out only when it is loaded
OUT = ("--out", "o", *NO_MODEL)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{n}+1=", "answer": f"It is {n + 1}."} for n in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bad.jsonl").write_text('{"question": "1+1="}\n')
    return tmp_path


def test_tokens_are_shown(tiny_folder: str, here: Path, capsys: Capture) -> None:
    shared = ["tokens", "a.jsonl", "--model", tiny_folder, "--limit", "2"]
    assert main([*shared, "--html", "o.html", "--history", tiny_folder]) == 0
    out = capsys.readouterr().out
    assert "12 of 18 answer tokens are kept (66.7%)" in out
    assert "no history model" not in out
    page = (here / "o.html").read_text()
    assert page.count("<h2>lesson ") == 2
    assert 'title="value ' in page
    assert main([*shared, "--method", "mft", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["rate"] == 0.4
    assert len(found["tokens"]) == 18


def test_a_fine_tuning(tiny_folder: str, here: Path, capsys: Capture) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    line = ["train", "mft", "a.jsonl", "--model", tiny_folder, "--out", "out", "--batch", "2"]
    more = ["--steps", "2", "--noise", "random", "--rate", "0.3", "--json", "o.json"]
    assert main([*line, *more]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1] == f"4 lessons; the model is in {Path('out') / 'model'}"
    assert err.splitlines()[0].startswith("step 1  loss ")
    found = json.loads((here / "o.json").read_text())
    assert [row["step"] for row in found["rows"]] == [1, 2]
    assert main([*line, *more]) == 2
    assert "out holds a run at step 2: go on with --resume" in capsys.readouterr().err


def test_an_earlier_state_of_other_tokens_is_refused(
    tiny_folder: str, other_folder: str, capsys: Capture
) -> None:
    line = ["tokens", "a.jsonl", "--model", tiny_folder]
    assert main([*line, "--history", other_folder]) == 2
    assert capsys.readouterr().err == (
        "error: the history model has another tokenizer: it must be an earlier state of the model\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokens", "bad.jsonl"], 'bad.jsonl, line 1: no "completion" or "answer" in it'),
        (["tokens", "no.jsonl"], "there is no data file no.jsonl"),
        (["tokens", "a.jsonl", "--method", "mf"], "no tokens can be shown of 'mf' (did you mean"),
        (["tokens", "a.jsonl", "--method", "mft", "--history", "m"], "belongs to sstoken"),
        (["tokens", "a.jsonl", "--rate", "0.4"], "--rate belongs to mft, not to sstoken"),
        (["tokens", "a.jsonl", "--method", "mft", "--keep", "0.6"], "--keep belongs to sstoken"),
        (["tokens", "a.jsonl", "--method", "mft", "--gamma", "1"], "--gamma belongs to sstoken"),
        (["tokens", "a.jsonl", "--method", "mft", "--normalize", "rank"], "belongs to sstoken"),
        (["tokens", "a.jsonl", "--method", "mft", "--exclude-sink"], "belongs to sstoken"),
        (["tokens", "a.jsonl", "--gamma", "2", *NO_MODEL], "gamma is a share, 0 to 1, got 2.0"),
        (["tokens", "a.jsonl", "--keep", "2", *NO_MODEL], "keep must be above 0 and at most 1"),
        (["tokens", "a.jsonl", "--normalize", "max", *NO_MODEL], "unknown normalize 'max'"),
        (
            ["tokens", "a.jsonl", "--method", "mft", "--rate", "2", *NO_MODEL],
            "rate is a share of the answer's tokens, 0 to 1, got 2.0",
        ),
        (["train", "mft", "a.jsonl", *OUT, "--rate", "2"], "rate is a share of the answer's"),
        (["train", "mft", "a.jsonl", *OUT, "--noise", "x"], 'noise must be "mask" or "random"'),
        (["train", "sstoken", "a.jsonl", *OUT, "--keep", "0"], "keep must be above 0 and at most"),
        (["train", "sstoken", "a.jsonl", *OUT, "--gamma", "2"], "gamma is a share, 0 to 1"),
        (["train", "sstoken", "a.jsonl"], "Missing option '--out'"),
        (["train", "sft", "bad.jsonl", "--out", "o"], 'line 1: no "completion" or "answer"'),
        (["train", "sft", "a.jsonl", "--out", "o", "--keep", "0.5"], "sft has no keep"),
        (
            ["train", "sstoken", "a.jsonl", "--out", "o", "--history", "bas"],
            "history must be one of base",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: Capture
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1

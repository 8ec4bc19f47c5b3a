"""`pertoken train` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pertoken.cli import main
from pertoken.cli._training import PolicyRows, cells

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("tensorboard", reason="TensorBoard is not installed")

Capture = pytest.CaptureFixture[str]
QUICK = ["--group", "2", "--batch", "4", "--max-new-tokens", "4", "--iterations", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(method: str, tiny_folder: str, *more: str) -> int:
    return main(["train", method, "--model", tiny_folder, "--out", "out", *QUICK, *more])


def test_a_run_its_page_and_its_results(tiny_folder: str, here: Path, capsys: Capture) -> None:
    arguments = ["--steps", "2", "--html", "o.html", "--json", "o.json", "--trajectory", "0.8,1.2"]
    assert train("fiberpo", tiny_folder, *arguments) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("reward 0.000 in the first quarter")
    assert out.splitlines()[1].endswith(f"the model is in {Path('out') / 'model'}")
    lines = err.splitlines()
    assert lines[0].startswith("step 1  reward 0.000  KL old to new 0  token low 0.0%")
    assert lines[1].startswith("step 2  KL old to new 0  ")
    assert len(lines) == 2
    found = json.loads((here / "o.json").read_text())
    assert found == json.loads((here / "out" / "run.json").read_text())
    assert found["settings"]["trajectory"] == [0.8, 1.2]
    assert found["settings"]["token"] == [0.8, 1.25]
    page = (here / "o.html").read_text()
    assert "<title>fiberpo on arithmetic, step 2</title>" in page
    assert "What is" in page


def test_interrupted_and_resumed(
    tiny_folder: str, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = PolicyRows.add
    stop_at = 1

    def add(self: PolicyRows, row: dict[str, Any]) -> None:
        plain(self, row)
        if row["step"] == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(PolicyRows, "add", add)
    arguments = ["--steps", "3", "--save-every", "1"]
    assert train("grpo", tiny_folder, *arguments) == 130
    assert capsys.readouterr().err.splitlines() == [
        "there is no checkpoint in out yet: the same command starts anew",
        "interrupted",
    ]
    stop_at = 2
    assert train("grpo", tiny_folder, *arguments) == 130
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "the checkpoint of step 1 is whole: the same command with --resume goes on",
        "interrupted",
    ]
    stop_at = 0
    assert train("grpo", tiny_folder, *arguments) == 2
    assert "out holds a run at step 1: go on with --resume" in capsys.readouterr().err
    assert train("grpo", tiny_folder, *arguments, "--resume", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in found["rows"]] == [1, 2, 3]


def test_the_table_shows_level_and_side() -> None:
    rows = PolicyRows("fiberpo", "arithmetic", 8, beta=0.0)
    row: dict[str, Any] = {
        "step": 1,
        "reward": 0.25,
        "kl": 0.0,
        "closed": {"token": [0.5, 0.0], "trajectory": [0.0, 0.125]},
        "tokens": 99,
        "seconds": 2.0,
    }
    rows.add(row)
    assert [column.header for column in rows.table().columns] == [
        "step",
        "reward",
        "KL old to new",
        "token low",
        "token high",
        "trajectory low",
        "trajectory high",
        "tokens",
        "s",
    ]
    assert cells(row) == ["1", "0.250", "0", "50.0%", "0.0%", "0.0%", "12.5%", "99", "2.0"]
    assert "step 1 of 8, about " in str(rows.table().title)
    assert PolicyRows("grpo", "gsm8k", 8, beta=0.1).kl == "KL to the start"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "fibrepo", "--out", "o"], "unknown method 'fibrepo' (did you mean 'fiberpo'"),
        (["train", "grpo", "--out", "o", "--task", "gsm8"], "no task named 'gsm8' (did you mean"),
        (["train", "grpo", "--out", "o", "--steps", "0"], "steps must be 1 or more, got 0"),
        (["train", "grpo", "--out", "o", "--batch", "9"], "no multiple of group 8"),
        (["train", "grpo", "--out", "o", "--token", "0.8"], "--token takes LOW,HIGH such as"),
        (["train", "grpo", "--out", "o", "--token", "a,b"], "--token takes LOW,HIGH such as"),
        (["train", "gspo", "--out", "o", "--token", "0.8,1.2"], "gspo has no token gate"),
        (["train", "cispo", "--out", "o", "--token", "0.8,1.2"], "cispo has no lower bound"),
        (["train", "grpo", "--out", "o", "--resume"], "there is no whole checkpoint in o"),
        (["train", "grpo", "--out", "mine"], "mine is not empty and holds no run"),
        (["train", "grpo", "--out", "o", "--html", "no/o.html"], "can't write no/o.html"),
        (["train", "grpo", "--out", "o", "--html", "p", "--json", "p"], "both want to write p"),
        (["train", "grpo", "--out", "o", "--model", "smollm"], "unknown model 'smollm'"),
        (["train", "grpo"], "Missing option '--out'"),
        (["train", "--out", "o"], "No such option: --out"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, here: Path, capsys: Capture
) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("mine")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1

"""`pertoken sift` as a user types it: files, going on, and what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pertoken.cli import main
from pertoken.cli import sift as command
from pertoken.errors import PertokenError

Capture = pytest.CaptureFixture[str]
URL = "http://localhost:1/v1#small"


class Server:
    """Stands in for an endpoint: every answer is 2; down after so many rounds."""

    def __init__(self) -> None:
        self.rounds, self.down_after, self.asked = 0, 99, 0

    def replies(self, conversations: Any, **_: Any) -> list[Any]:
        if self.rounds >= self.down_after:
            raise PertokenError("the endpoint http://localhost:1/v1 can't be reached")
        self.rounds += 1
        self.asked += len(conversations)
        return [SimpleNamespace(text=r"\boxed{2}", tokens=None) for _ in conversations]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.chdir(tmp_path)
    lines = [{"question": "1 + 1?", "answer": "so\n#### 2"}, {"question": "1 + 2?", "answer": "3"}]
    Path("q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Path("q.txt").write_text("One?\n\nTwo?\nThree?\n")
    found = Server()
    monkeypatch.setattr(command, "_chat", lambda *_: (found, {}))
    return found


def test_what_is_right_is_counted(server: Server, capsys: Capture) -> None:
    run = ["sift", "q.jsonl", "--model", URL]
    assert main([*run, "--json", "o.json", "--html", "o.html"]) == 0
    shown = capsys.readouterr().out
    assert "consensus at stage 1: 2" in shown
    assert "answers without a number: 0 of 2" in shown
    assert "right: 50.0%" in shown
    assert json.loads(Path("o.json").read_text())["accuracy"] == 0.5
    assert "1 + 2?" in Path("o.html").read_text()
    assert main([*run, "--json", "-"]) == 0  # nothing is asked again
    assert server.asked == 6
    assert json.loads(capsys.readouterr().out)["ended"] == {"consensus at stage 1": 2}


def test_an_endpoint_that_goes_down_loses_nothing(server: Server, capsys: Capture) -> None:
    run = ["sift", "q.txt", "--model", URL, "--batch", "1", "--out", "o.jsonl"]
    server.down_after = 3  # rounds: sticker and predictions of a question are two
    assert main(run) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "1 questions are in o.jsonl; run it again to go on"
    assert "can't be reached" in second
    with Path("o.jsonl").open("a") as file:
        file.write('{"model": "http:')  # a kill in the middle of a line
    server.rounds, server.asked = 0, 0
    server.down_after = 99
    assert main(run) == 0
    assert server.asked == 6
    kept = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert [one["question"] for one in kept] == ["One?", "Two?", "Three?"]


def test_only_a_line_break_ends_a_line(server: Server, capsys: Capture) -> None:
    """JSON may hold other separators of lines as they are."""
    odd = "1 +\u2028 1?\x85"
    Path("odd.jsonl").write_text(json.dumps({"question": odd}, ensure_ascii=False))
    for _ in range(2):
        assert main(["sift", "odd.jsonl", "--model", URL]) == 0
    assert server.asked == 3
    (line,) = Path("odd.jsonl.sifted.jsonl").read_text().split("\n")[:-1]
    assert json.loads(line)["question"] == odd


def test_a_local_model_answers(
    tmp_path: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("q.txt").write_text("One?\n")
    code = main(["sift", "q.txt", "--model", tiny_folder, "--max-new-tokens", "4"])
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "positions" in one]
    assert code == 2  # the wording is longer than the tiny model
    assert "does not fit the model's 512 positions" in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["no.txt"], "there is no question file no.txt"),
        (["empty.txt"], "question file empty.txt is empty"),
        (["bad.jsonl"], "bad.jsonl, line 1: not JSON"),
        (["none.jsonl"], 'none.jsonl, line 1: {"question": "…"} with some text is wanted'),
        (["q.txt", "--out", "q.txt"], "q.txt, line 1: not a question that was sifted"),
        (["q.txt", "--out", "old.jsonl"], "was written with other and 1024 new tokens"),
    ],
)
def test_a_mistake_is_one_line(
    server: Server, words: list[str], line: str, capsys: Capture
) -> None:
    Path("empty.txt").write_text("\n")
    Path("bad.jsonl").write_text("{")
    Path("none.jsonl").write_text('{"question": " "}')
    old = {"question": "a", "answer": "1", "ended": "", "steps": []}
    Path("old.jsonl").write_text(
        json.dumps({**old, "model": "other", "max_new_tokens": 1024}) + "\n"
    )
    assert main(["sift", *words, "--model", URL]) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert server.asked == 0


def test_an_endpoint_needs_a_model_name() -> None:
    with pytest.raises(PertokenError, match="name the endpoint's model behind it"):
        command._chat("http://localhost:1/v1", None, None)

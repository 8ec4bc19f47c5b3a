"""`pertoken cascade` as a user types it: fitted, drawn, and answering, against an endpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pertoken.cli import main
from pertoken.endpoint import Endpoint, Reply
from pertoken.errors import PertokenError

SMALL, LARGE = "http://localhost:1/v1#small", "http://localhost:1/v1#large"
Capture = pytest.CaptureFixture[str]


def reply(self: Endpoint, messages: Any, **options: Any) -> Reply:
    """The question "N" is answered by both with N mod 7; the small model is right when N is even,
    and then sure of it."""
    number = int(messages[0]["content"])
    if self.model == "down":
        raise PertokenError("the endpoint can't be reached")
    if self.model == "large" or number % 2 == 0:
        return Reply(str(number % 7), ("x",), (-0.01 * number,) if options["logprobs"] else None)
    return Reply("no", ("x",), (-5.0 - number,))


def unasked(*_: Any, **__: Any) -> Reply:
    pytest.fail("asked")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Endpoint, "reply", reply)
    monkeypatch.chdir(tmp_path)
    for name, numbers in (("fit", range(40)), ("draw", range(40, 60))):
        rows = [{"prompt": str(number), "answer": f"{number % 7}."} for number in numbers]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("ask.txt").write_text("1\n2\n3\n4\n")
    return tmp_path


def test_fit_curve_and_generate(capsys: Capture) -> None:
    assert main(["cascade", "fit", SMALL, LARGE, "fit.jsonl", "--out", "rule.json"]) == 0
    assert capsys.readouterr().out == (
        "post-hoc-quantile fitted on 40 questions, written to rule.json\n"
        "quality of small 0.5, of large 1\n"
    )
    rule = ["--rule", "rule.json"]
    pages = ["--json", "curve.json", "--html", "curve.html"]
    assert main(["cascade", "curve", SMALL, LARGE, "draw.jsonl", *rule, *pages]) == 0
    assert "post-hoc-quantile  0.875" in capsys.readouterr().out
    areas = {
        row["rule"]: row["area"] for row in json.loads(Path("curve.json").read_text())["rules"]
    }
    assert areas["post-hoc-quantile"] == areas["oracle"] == 0.875
    assert "oracle" in Path("curve.html").read_text()
    run = ["cascade", "generate", SMALL, LARGE, *rule, "--rate", "0.5", "--prompts", "ask.txt"]
    assert main([*run, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["answered_by"] for each in found["answers"]] == ["large", "small"] * 2
    assert [each["answer"] for each in found["answers"]] == ["1", "2", "3", "4"]


def test_answers_are_kept_for_another_rule(capsys: Capture, monkeypatch: Any) -> None:
    kept = ["--answers", "kept.jsonl", "--json", "-"]
    fit = ["cascade", "fit", SMALL, LARGE, "fit.jsonl", "--out", "rule.json", *kept]
    assert main(fit) == 0
    monkeypatch.setattr(Endpoint, "reply", unasked)
    assert main([*fit, "--rule", "chow-quantile"]) == 0
    found = json.loads(capsys.readouterr().out.split("\n}\n")[1] + "\n}")
    assert found == {
        "rule": "chow-quantile",
        "alpha": 0.0,
        "questions": 40,
        "quality": {"small": 0.5, "large": 1.0},
    }


def test_a_model_of_transformers_is_a_member_too(tiny_folder: str, capsys: Capture) -> None:
    short = ["--rule", "chow-sum", "--max-new-tokens", "3", "--limit", "4", "--out", "rule.json"]
    assert main(["cascade", "fit", tiny_folder, LARGE, "fit.jsonl", *short, "--stop", "\\n"]) == 0
    assert json.loads(Path("rule.json").read_text())["settings"]["stop"] == ["\n"]
    run = ["--rule", "rule.json", "--rate", "1", "--prompts", "ask.txt"]
    assert main(["cascade", "generate", tiny_folder, LARGE, *run]) == 0
    assert "4 of 4 deferred; asked for 100.0%" in capsys.readouterr().out


def test_nothing_that_was_answered_is_lost(capsys: Capture, monkeypatch: Any) -> None:
    """Without --answers too: of one class, with a model that goes down, while it generates."""
    asked: list[str] = []

    def counted(self: Endpoint, messages: Any, **options: Any) -> Reply:
        number = messages[0]["content"]
        asked.append(f"{self.model} {number}")
        if self.model == "large" and number in down:
            raise PertokenError("the endpoint can't be reached")
        return reply(self, messages, **options)

    monkeypatch.setattr(Endpoint, "reply", counted)
    down = {"39"}
    assert main(FIT) == 2
    assert capsys.readouterr().err == (
        "error: the endpoint can't be reached; 40 questions are in fit.jsonl.answered.jsonl: "
        "run it again to go on\n"
    )
    down = set()
    asked.clear()
    assert main(FIT) == 0
    assert sorted(asked) == [f"large {number}" for number in range(32, 40)]

    run = ["cascade", "generate", SMALL, LARGE, "--rule", "rule.json", "--rate", "0.5"]
    run += ["--prompts", "ask.txt"]
    down = {"3"}
    assert main(run) == 2
    assert "4 questions are in ask.txt.answered.jsonl" in capsys.readouterr().err
    down = set()
    asked.clear()
    assert main([*run, "--json", "-"]) == 0
    assert sorted(asked) == ["large 1", "large 3"]
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [each["answer"] for each in answers] == ["1", "2", "3", "4"]

    one_class = [*FIT[:2], SMALL, SMALL, *FIT[4:-1], "none.json", "--answers", "one.jsonl"]
    assert main(one_class) == 2
    assert "calibration data of one class" in capsys.readouterr().err
    assert Path("one.jsonl").read_text().count("\n") == 1 + 2 * 40
    assert not Path("none.json").exists()


def test_stopped_by_ctrl_c_it_says_where_the_answers_are(capsys: Capture, monkeypatch: Any) -> None:
    def stopped(self: Endpoint, talks: Any, **options: Any) -> list[Reply]:
        if self.model == "large":
            raise KeyboardInterrupt
        return [reply(self, messages, **options) for messages in talks]

    monkeypatch.setattr(Endpoint, "replies", stopped)
    assert main(FIT) == 130
    error = capsys.readouterr().err
    assert "answers so far are in fit.jsonl.answered.jsonl; run it again to go on" in error


def test_what_can_be_known_is_refused_before_a_model_is_asked(
    capsys: Capture, monkeypatch: Any
) -> None:
    assert main(FIT) == 0
    monkeypatch.setattr(Endpoint, "reply", unasked)
    Path("fit.jsonl.answered.jsonl").unlink()
    curve = ["cascade", "curve", SMALL, LARGE, "fit.jsonl", "--rule", "rule.json"]
    for line, message in (
        ([*FIT, "--limit", "19"], "post-hoc-quantile takes 20 questions or more, got 19"),
        ([*FIT, "--rule", "chow-quantile", "--limit", "1"], "takes 2 questions or more, got 1"),
        (curve, "40 of 40 questions were used to fit the rule"),
    ):
        assert main(line) == 2
        assert message in capsys.readouterr().err
    assert not Path("fit.jsonl.answered.jsonl").exists()


FIT = ["cascade", "fit", SMALL, LARGE, "fit.jsonl", "--out", "rule.json"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([*FIT, "--rule", "chow-mean"], "unknown rule 'chow-mean'"),
        ([*FIT, "--quality", "exakt"], "--quality is exact or contains, not 'exakt'"),
        ([*FIT, "--rule", "post-hoc-embed-1"], "an endpoint shows none"),
        ([*FIT[:2], "http://x/v1", *FIT[3:]], "name the endpoint's model behind it, as in"),
        ([*FIT[:2], SMALL[:-5] + "down", *FIT[3:]], "can't be reached"),
        ([*FIT[:4], "ask.txt", *FIT[5:]], 'ask.txt, line 1: {"prompt"'),
        ([*FIT[:4], "none.jsonl", *FIT[5:]], "there is no data file none.jsonl"),
        ([*FIT, "--json", "rule.json"], "--out and --json both want to write rule.json"),
        (
            ["cascade", "generate", SMALL, LARGE, "--rule", "fit.jsonl", "--rate", "0.5"],
            "fit.jsonl holds no rule of this version",
        ),
        (
            ["cascade", "generate", SMALL, LARGE, "--rule", "rule.json", "--rate", "30"],
            "--rate is a share from 0 to 1, got 30",
        ),
    ],
)
def test_what_is_wrong_is_one_line(line: list[str], message: str, capsys: Capture) -> None:
    assert main(line) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("rule.json").exists()

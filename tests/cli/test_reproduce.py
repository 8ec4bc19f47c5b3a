"""`pertoken reproduce`: exit codes, one line per mistake, only the result on stdout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from pertoken.cli import main
from pertoken.errors import PertokenError
from pertoken.reproduce import Context, Reproduction, Row
from pertoken.reproduce import _harness as harness

Capture = pytest.CaptureFixture[str]


def module(figure: float, **names: object) -> SimpleNamespace:
    def run(context: Context) -> Reproduction:
        if names.get("stops"):
            context.remember("unit", lambda: 1)
            raise KeyboardInterrupt
        if names.get("breaks"):
            raise PertokenError("no data anywhere; name it with --data")
        return context.reproduction([Row("speed-up", figure, unit="x", paper=2.0)])

    return SimpleNamespace(**{"BARS": {"speed-up": ">= 2"}, "run": run, **names})


@pytest.fixture(autouse=True)
def _papers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = {
        "good": module(3),
        "bad": module(1),
        "bad-with-reason": module(1, REASONS={"speed-up": "two cores"}),
        "broken": module(1, breaks=True),
        "stopped": module(1, stops=True),
    }
    real = harness.find
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(harness, "available", lambda: sorted(known))
    monkeypatch.setattr(harness, "reports_folder", lambda: tmp_path / "reports")
    monkeypatch.setattr(harness, "find", lambda s: (s, known[s]) if s in known else real(s))


def run(*arguments: str) -> int:
    return main(["reproduce", *arguments])


def test_a_bar_that_holds_exits_0_and_writes(tmp_path: Path, capsys: Capture) -> None:
    assert run("good") == 0
    assert json.loads((tmp_path / "reports" / "good.json").read_text())["slug"] == "good"
    out = capsys.readouterr().out
    assert ">= 2" in out
    assert "holds" in out


def test_a_failing_bar_needs_its_reason(tmp_path: Path, capsys: Capture) -> None:
    assert run("bad-with-reason") == 0
    assert "two cores" in capsys.readouterr().out
    assert run("bad") == 1
    captured = capsys.readouterr()
    assert "no reason given yet" in captured.out
    assert "bad: 'speed-up' does not hold and no reason is given" in captured.err
    assert (tmp_path / "reports" / "bad.json").exists()


def test_json_alone_on_stdout(capsys: Capture) -> None:
    assert run("good", "bad", "--json", "-") == 1
    reports = json.loads(capsys.readouterr().out)
    assert [(r["slug"], r["rows"][0]["holds"]) for r in reports] == [("good", True), ("bad", False)]


def test_smoke_writes_nothing(tmp_path: Path, capsys: Capture) -> None:
    assert run("bad", "--smoke") == 0
    assert not (tmp_path / "reports").exists()
    assert "not judged" in capsys.readouterr().out


def test_a_broken_paper_does_not_stop_the_others(tmp_path: Path, capsys: Capture) -> None:
    assert run("broken", "good") == 2
    assert "error: broken: no data anywhere" in capsys.readouterr().err
    assert (tmp_path / "reports" / "good.json").exists()


def test_all_runs_every_paper(tmp_path: Path, capsys: Capture) -> None:
    assert run("--all", "--smoke") == 130  # one of them stops
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["goos"], r"no reproduction named 'goos' \(did you mean 'goose' or 'good'"),
        (["no-such-thing", "good"], "no reproduction named 'no-such-thing'"),
        (["prefix-lm-x9"], "there is: bad, bad-with-reason"),
        ([], "name a paper"),
        (["good", "--all"], "not both"),
        (["good", "--data", "nowhere"], "no data at nowhere"),
        (["good", "--smoke", "--out", "REPORTS"], "smoke run never"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: Capture, tmp_path: Path
) -> None:
    reports = str(tmp_path / "reports")
    assert run(*[reports if word == "REPORTS" else word for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)


def test_a_wrong_name_is_said_before_anything_runs(tmp_path: Path, capsys: Capture) -> None:
    assert run("good", "goos") == 2
    assert not (tmp_path / "reports").exists()
    capsys.readouterr()


def test_interrupt_keeps_units_and_leaves_no_report(tmp_path: Path, capsys: Capture) -> None:
    assert run("stopped") == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "reports").exists()
    assert len(list((tmp_path / "home").rglob("*.jsonl"))) == 1
    assert run("stopped", "--resume") == 130
    assert "1 finished units found" in capsys.readouterr().err


def test_reasons_alone(tmp_path: Path, capsys: Capture) -> None:
    assert run("bad") == 1
    assert run("good", "--reasons") == 2
    assert "no report at" in capsys.readouterr().err
    assert run("bad", "--reasons") == 1

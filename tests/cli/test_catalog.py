"""`pertoken list` and `pertoken show`."""

import json
from pathlib import Path

import pytest

from pertoken import catalog
from pertoken.catalog import FAMILIES, baselines, card, methods
from pertoken.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file a report of goose would have, in an empty folder."""
    monkeypatch.setattr(catalog, "reports_dir", lambda: tmp_path)
    return tmp_path / "goose.json"


def test_list_has_every_paper(capsys: Capture) -> None:
    assert main(["list"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for one in methods():
        bars = one.bars if one.status == "ready" else None
        start = f"{one.slug} {one.status if bars is None else f'{bars[0]} of {bars[1]}'} "
        assert any(line.startswith(start) for line in lines)
    heads = [f"{family} {what}" for family, what in FAMILIES.items()]
    assert [line for line in lines if line in heads] == heads
    assert not any("Use it" in line for line in lines)


def test_list_of_a_family(capsys: Capture) -> None:
    assert main(["list", "--family", "cache", "--json", "-"]) == 0
    assert [row["slug"] for row in json.loads(capsys.readouterr().out)] == ["kv-direct", "plt-kv"]


def test_list_of_baselines(capsys: Capture) -> None:
    assert main(["list", "--baselines", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["slug"] for row in rows] == [one.slug for one in baselines()]
    assert main(["list", "--baselines"]) == 0
    assert "prompt-lookup" in capsys.readouterr().out


def test_list_as_json_is_the_cards(capsys: Capture) -> None:
    assert main(["list", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == [one.to_dict() for one in methods()]


def test_wrong_family(capsys: Capture) -> None:
    assert main(["list", "--family", "decoed"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "'decoed' (did you mean 'decode'?)" in err
    assert all(family in err for family in FAMILIES)


@pytest.mark.parametrize("one", [*methods(), *baselines()], ids=lambda one: one.slug)
def test_show_says_what_it_is(one: catalog.Card, capsys: Capture) -> None:
    assert main(["show", one.slug]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in (one.title, one.does, one.use_when, one.avoid_when, one.cost, one.headline):
        assert text in out
    assert (one.arxiv or "") in out


@pytest.mark.parametrize("command", [["show"], ["show", "--json", "-"]])
def test_show_of_a_wrong_slug(command: list[str], capsys: Capture) -> None:
    assert main([*command, "tokenrecycling"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "'tokenrecycling' (did you mean 'token-recycling'" in err


def test_show_the_rows_of_the_report(report: Path, capsys: Capture) -> None:
    rows = [
        {
            "metric": "accepted per forward [goose]",
            "unit": "x",
            "paper": 1.25,
            "here": 1.1375,
            "baseline": None,
            "bar": ">= 1.12",
            "holds": True,
        },
        {
            "metric": "speed",
            "unit": "x",
            "paper": "1.9 to 4.3",
            "here": None,
            "bar": ">= 1.5",
            "holds": False,
            "why": "one thread",
        },
        {"metric": "ties", "here": 0, "bar": "== 0", "holds": True, "caveat": "a law"},
        {"metric": "for information", "here": 3.0},
    ]
    data = {"model": "smollm2", "version": 3, "rows": rows}
    report.write_text(json.dumps(data))
    assert main(["show", "goose"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "model smollm2, version 3" in lines
    assert "accepted per forward [goose] 1.25 1.137 x >= 1.12 yes" in lines
    assert "speed 1.9 to 4.3 >= 1.5 no" in lines
    assert "- speed: no: one thread" in lines
    assert "ties 0 == 0 yes, but" in lines
    assert "- ties: yes, but: a law" in lines
    assert "1 more rows: `pertoken show goose --json -`" in lines
    assert main(["show", "goose", "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {**card("goose").to_dict(), "report": data}


def test_show_without_a_report(report: Path, capsys: Capture) -> None:
    assert main(["show", "goose", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] is None


def test_broken_report_is_one_line(report: Path, capsys: Capture) -> None:
    report.write_text("{")
    assert main(["show", "goose"]) == 2
    err = capsys.readouterr().err
    assert "goose.json is not a report" in err
    assert err.count("\n") == 1

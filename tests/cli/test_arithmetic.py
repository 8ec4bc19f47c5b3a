"""`pertoken arithmetic` as a user types it, with a tiny model in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pertoken.cli import main

Capture = pytest.CaptureFixture[str]
QUICK = ["--lengths", "2,2", "--lengths", "2,1", "--each", "1", "--shots", "1"]


def test_a_table_and_a_page(tiny_folder: str, tmp_path: Path, capsys: Capture) -> None:
    page = tmp_path / "page.html"
    assert main(["arithmetic", tiny_folder, *QUICK, "--html", str(page)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name in ("nosep", "comma_r2l", "comma_l2r"):
        assert name in out
        assert name in page.read_text()


def test_json_of_chosen_formats(tiny_folder: str, capsys: Capture) -> None:
    options = ["--formats", "nosep, dollar_l2r", "--limit", "1", "--json", "-"]
    assert main(["arithmetic", tiny_folder, *QUICK, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["format"] for row in found["summary"]] == ["nosep", "dollar_l2r"]
    assert [row["n"] for row in found["summary"]] == [1, 1]
    assert found["settings"]["model"] == tiny_folder


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--formats", "comma-r2l"], "unknown number format 'comma-r2l' (did you mean"),
        (["--lengths", "7;8"], "--lengths '7;8': give digits"),
        (["--lengths", "7,8,10"], "no addition of 7 and 8 digits has an answer of 10"),
        (["--html", "no/such/folder.html"], "there is no folder no/such"),
        (["--shots", "-1"], "shots must be 0 or more"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], line: str, tiny_folder: str, capsys: Capture
) -> None:
    assert main(["arithmetic", tiny_folder, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert line in err
    assert err.count("\n") == 1

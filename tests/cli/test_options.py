"""Where results go: --json and --html mean the same in every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pertoken.cli import main
from pertoken.cli.options import Output
from pertoken.endpoint import Endpoint
from pertoken.errors import PertokenError
from pertoken.result import Result

Capture = pytest.CaptureFixture[str]


class One(Result):
    def to_dict(self) -> dict[str, Any]:
        return {"one": 1, "broken": "\ud800"}

    def rows(self) -> list[dict[str, Any]]:
        return [{"one": 1}]


def test_a_dash_is_standard_output_alone(capsys: Capture) -> None:
    assert Output("-").write(One())
    assert json.loads(capsys.readouterr().out)["one"] == 1
    assert Output(None, "-").write(One())
    assert capsys.readouterr().out.startswith("<!DOCTYPE html>")


def test_files_leave_standard_output_to_the_caller(tmp_path: Path, capsys: Capture) -> None:
    page, values = tmp_path / "o.html", tmp_path / "o.json"
    assert not Output(str(values), str(page)).write(One(), {"more": 2})
    assert json.loads(values.read_text()) == {"more": 2}
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (("-", "-"), "--json and --html both want to write standard output"),
        (("o", "o"), "--json and --html both want to write o"),
        (("no/o", None), "there is no folder no"),
        ((None, "."), "it is a folder"),
    ],
)
def test_places_that_cannot_be_are_refused_at_once(
    places: tuple[str | None, str | None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PertokenError, match=message):
        Output(*places)


def test_a_command_waits_for_an_endpoint_as_long_as_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    waited: list[float] = []

    def silent(self: Endpoint, *_: Any, **__: Any) -> list[Any]:
        waited.append(self.timeout)
        raise PertokenError("was silent")

    monkeypatch.setattr(Endpoint, "replies", silent)
    monkeypatch.chdir(tmp_path)
    Path("q.txt").write_text("One?\n")
    rows = [json.dumps({"prompt": str(number), "answer": "1"}) for number in range(20)]
    Path("q.jsonl").write_text("\n".join(rows))
    url = "http://localhost:1/v1#small"
    for command in (
        ["sift", "q.txt", "--model", url],
        ["probe", "characters", url, "--each", "1"],
        ["cascade", "fit", url, url, "q.jsonl", "--out", "rule.json"],
    ):
        assert main(command) == 2
        assert main([*command, "--timeout", "1.5"]) == 2
        assert waited[-2:] == [60.0, 1.5]
        assert main([*command, "--timeout", "0"]) == 2
        assert "timeout must be above 0" in capsys.readouterr().err


def test_a_text_is_written_as_json_too(tiny_folder: str, capsys: Capture) -> None:
    run = ["generate", "abc", "--no-chat", "--max-new-tokens", "3", "--model", tiny_folder]
    assert main([*run, "--method", "plain"]) == 0
    text = capsys.readouterr().out
    assert main([*run, "--method", "plain", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == text.removesuffix("\n")
    assert len(found["ids"]) == 3

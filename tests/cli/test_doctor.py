"""`pertoken doctor` and `pertoken fetch` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pertoken import doctor, loading
from pertoken.cli import main


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PERTOKEN_DATA", "")
    monkeypatch.delenv("PERTOKEN_ACCEPT_LICENCE", raising=False)
    monkeypatch.setattr(doctor, "dtype_speeds", lambda: {"float32": {"gflops": 1, "gb_per_s": 2}})
    return tmp_path / "home"


def test_doctor(capsys: Any) -> None:
    assert main(["doctor"]) == 0
    assert "float32       1 GFLOP/s matrix product, 2 GB/s weights read" in capsys.readouterr().out


def test_doctor_short(capsys: Any) -> None:
    assert main(["doctor", "--short"]) == 0
    assert 3 <= len(capsys.readouterr().out.splitlines()) <= 6


def test_doctor_json(capsys: Any) -> None:
    assert main(["doctor", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == []


def test_fetch_shows_place_and_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(loading, "model_folder", lambda name, **options: tmp_path / name)
    assert main(["fetch", "smollm2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'smollm2'}\nlicence: Apache-2.0\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fetch", "smollm"], "did you mean 'smollm2'"),
        (["fetch", "brown"], "--accept-licence"),
        (["fetch", "gemma3-270m"], "--accept-licence"),
        (["fetch", "llama3"], "--accept-licence"),
        (["fetch", "spec-bench"], "PERTOKEN_DATA"),
    ],
)
def test_fetch_refuses_in_one_line(arguments: list[str], words: str, capsys: Any) -> None:
    assert main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert words in line

"""A checkpoint survives a kill in the middle of a line and never mixes settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from pertoken.errors import PertokenError
from pertoken.reproduce._checkpoint import Checkpoint, code_digest


def test_a_cut_last_line_is_measured_again(tmp_path: Path) -> None:
    first = Checkpoint(tmp_path, "goose", {"seed": 0}, resume=False)
    first.remember("a", lambda: 1)
    first.remember("b", lambda: 2)
    first.path.write_bytes(first.path.read_bytes()[:-5])
    again = Checkpoint(tmp_path, "goose", {"seed": 0}, resume=True)
    assert again.resumed == 1
    assert again.remember("a", pytest.fail) == 1
    assert again.remember("b", lambda: 3) == 3
    third = Checkpoint(tmp_path, "goose", {"seed": 0}, resume=True)
    assert [third.remember(key, pytest.fail) for key in "ab"] == [1, 3]


def test_keys_are_json_values_not_their_order(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "goose", {}, resume=False)
    checkpoint.remember({"a": 1, "b": 2}, lambda: "x")
    assert checkpoint.remember({"b": 2, "a": 1}, pytest.fail) == "x"


def test_a_value_that_is_not_json_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "goose", {}, resume=False)
    with pytest.raises(PertokenError, match='unit "a" cannot be kept'):
        checkpoint.remember("a", lambda: object())


def test_discard_deletes_the_file_and_leaves_others(tmp_path: Path) -> None:
    folder = tmp_path / "reproduce"
    one = Checkpoint(folder, "goose", {}, resume=False)
    two = Checkpoint(folder, "other", {}, resume=False)
    one.remember("a", lambda: 1)
    two.remember("a", lambda: 1)
    one.discard()
    assert [path.name for path in folder.iterdir()] == [two.path.name]
    two.discard()
    assert not folder.exists()


def test_the_code_digest_sees_what_a_figure_depends_on(tmp_path: Path) -> None:
    for name in ("decode/goose.py", "cli/main.py", "reproduce/goose.py", "reproduce/other.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("1")
    own = tmp_path / "reproduce/goose.py"
    digest = code_digest(tmp_path, own)
    (tmp_path / "cli/main.py").write_text("2")
    (tmp_path / "reproduce/other.py").write_text("2")
    assert code_digest(tmp_path, own) == digest
    (tmp_path / "decode/goose.py").write_text("2")
    assert code_digest(tmp_path, own) != digest

"""Result files: whole or not at all, and refused early."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pertoken._files import check_target, drop_cut_line, whole_lines, write_whole
from pertoken.errors import PertokenError


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("old")
    check_target(target)
    write_whole(target, "neu\n")
    assert target.read_bytes() == b"neu\n"
    assert os.listdir(tmp_path) == ["out.json"]


def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "out.json"
    target.write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_whole(target, "new")
    assert caught.value.filename == str(target)
    assert os.listdir(tmp_path) == ["out.json"]
    assert target.read_text() == "old"


def test_targets_are_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(PertokenError, match="it is a folder"):
        check_target(tmp_path)
    with pytest.raises(PertokenError, match="there is no folder"):
        check_target(tmp_path / "none" / "out.json")


def test_a_folder_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(PertokenError, match=r"can't write .*out\.json: Permission denied"):
        check_target(tmp_path / "out.json")


def test_text_that_is_no_text_is_written_all_the_same(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "half a pair: \ud800")
    assert (tmp_path / "a").read_text(encoding="utf-8").startswith("half a pair: ")


@pytest.mark.parametrize("rest", ["", "l", "line ", "line café"])
def test_a_line_that_was_cut_off_is_not_read_and_goes_when_it_is_told_to(
    tmp_path: Path, rest: str
) -> None:
    path = tmp_path / "kept.jsonl"
    assert whole_lines(path) == []
    drop_cut_line(path, "line ")
    assert not path.exists()
    whole = "line one\u2028still one\nline two\n".encode()
    written = whole + rest.encode()[: len(rest)]  # of the é one byte of two
    path.write_bytes(written)
    assert whole_lines(path) == ["line one\u2028still one", "line two"]
    assert path.read_bytes() == written  # reading changes nothing: the file may not be ours
    drop_cut_line(path, "line ")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("whole", [b"", b"line one\n"])
def test_a_last_line_of_something_else_is_left_and_refused(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "foreign.json"
    for rest in (b"[1, 2]", b"li ne", b"linen"):
        path.write_bytes(whole + rest)
        with pytest.raises(PertokenError, match=r"foreign\.json ends .*; give another file"):
            drop_cut_line(path, "line ")
        assert path.read_bytes() == whole + rest

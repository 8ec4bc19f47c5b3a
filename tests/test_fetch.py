"""Kept folders are whole or absent, made once, and packages are what their sha256 says."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pertoken import _fetch
from pertoken._fetch import (
    Package,
    accepted,
    add_member,
    fetch_package,
    keep,
    read_members,
    read_stamp,
    refuse_unaccepted,
)
from pertoken.errors import PertokenError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PERTOKEN_ACCEPT_LICENCE", raising=False)
    return tmp_path / "home"


def write(text: str) -> Any:
    def make(work: Path) -> dict[str, Any]:
        (work / "inner").mkdir()
        (work / "inner" / "file.txt").write_text(text)
        return {"name": "thing"}

    return make


def left_over(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_kept_once_and_readable_by_all(home: Path) -> None:
    target = home / "models" / "thing"
    assert keep(target, write("first")) == target
    keep(target, write("second"))
    assert (target / "inner" / "file.txt").read_text() == "first"
    assert (target / "inner" / "file.txt").stat().st_mode & 0o777 == 0o644
    assert target.stat().st_mode & 0o777 == 0o755
    assert read_stamp(target) == {"name": "thing", "sizes": {"inner/file.txt": 5}}


def test_a_cut_file_is_made_anew(home: Path) -> None:
    target = keep(home / "models" / "thing", write("first"))
    (target / "inner" / "file.txt").write_text("fir")
    assert read_stamp(target) is None
    keep(target, write("second"))
    assert (target / "inner" / "file.txt").read_text() == "second"


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_nothing_half_written_after_an_error(home: Path, error: BaseException) -> None:
    def make(work: Path) -> dict[str, Any]:
        (work / "file.txt").write_text("half")
        raise error

    with pytest.raises(type(error)):
        keep(home / "models" / "thing", make)
    assert left_over(home) == []
    assert list((home / "models").iterdir()) == []
    keep(home / "models" / "thing", write("whole"))  # and the lock is free again


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission")]
)
def test_disk_errors_are_one_line(home: Path, number: int, words: str) -> None:
    def make(work: Path) -> dict[str, Any]:
        (work / "file.txt").write_text("half")
        raise OSError(number, "simulated")

    with pytest.raises(PertokenError, match=words) as caught:
        keep(home / "models" / "thing", make)
    assert "PERTOKEN_HOME" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left_over(home) == []


def test_home_that_is_a_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "file"))
    with pytest.raises(PertokenError, match="a file is in the way"):
        keep(tmp_path / "file" / "models" / "thing", write(""))


def test_leavings_of_a_killed_process_go(home: Path) -> None:
    left = home / "models" / ".thing.999999.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    keep(home / "models" / "thing", write("whole"))
    assert not left.exists()


def test_two_at_once_do_the_work_once(home: Path) -> None:
    made = []

    def make(work: Path) -> dict[str, Any]:
        made.append(work)
        time.sleep(0.2)
        return write("x")(work)

    threads = [
        threading.Thread(target=keep, args=(home / "models" / "thing", make)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


GOOD = b"the archive"
PACKAGE = Package("PyPI", "some-package", "1.2", hashlib.sha256(GOOD).hexdigest(), 1)


def serve(monkeypatch: pytest.MonkeyPatch, *answers: bytes | str) -> list[list[str]]:
    """Stand in for pip and npm: each call writes the next bytes, or fails with the next text."""
    commands: list[list[str]] = []

    def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        answer = answers[len(commands)]
        commands.append(command)
        if isinstance(answer, str):
            return subprocess.CompletedProcess(command, 1, "", answer)
        (folder / "some_package-1.2-py3-none-any.whl").write_bytes(answer)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(_fetch, "_run", run)
    return commands


def test_fetch_checks_and_installs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = serve(monkeypatch, GOOD)
    assert fetch_package(PACKAGE, tmp_path).read_bytes() == GOOD
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "some-package==1.2"} <= set(commands[0])


def test_altered_archive_is_fetched_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = serve(monkeypatch, b"cut", GOOD)
    assert fetch_package(PACKAGE, tmp_path).read_bytes() == GOOD
    assert "--no-cache-dir" not in commands[0]
    assert "--no-cache-dir" in commands[1]  # pip's own cache may hold the altered one


def test_altered_twice_is_one_line_and_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = serve(monkeypatch, b"cut", b"cut again")
    with pytest.raises(PertokenError, match="altered or cut short twice") as caught:
        fetch_package(PACKAGE, tmp_path)
    assert len(commands) == 2
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_silent_registry_is_a_connection_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, "WARNING: retrying\nERROR: No matching distribution found\n")
    with pytest.raises(ConnectionError, match="ERROR: No matching distribution found"):
        fetch_package(PACKAGE, tmp_path)


def test_full_disk_of_the_download_is_no_network_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, "ERROR: Could not install: [Errno 28] No space left on device")
    with pytest.raises(OSError, match="No space left") as caught:
        fetch_package(PACKAGE, tmp_path)
    assert caught.value.errno == errno.ENOSPC


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, "/usr/bin/python: No module named pip")
    with pytest.raises(PertokenError, match="ensurepip"):
        fetch_package(PACKAGE, tmp_path)
    monkeypatch.setattr(_fetch.shutil, "which", lambda name: None)
    (tmp_path / "npm").mkdir()
    with pytest.raises(PertokenError, match="needs npm"):
        fetch_package(Package("npm", "thing", "1", "0" * 64, 1), tmp_path / "npm")


def test_members_of_archives(tmp_path: Path) -> None:
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("p/one.txt", "1")
        file.writestr("p/two.txt", "2")
    assert read_members(archive, r"p/o\w+\.txt") == {"p/one.txt": b"1"}
    joined = tmp_path / "joined"
    for member in ("p/one.txt", "p/two.txt"):
        add_member(archive, member, joined)
    assert joined.read_bytes() == b"12"
    with pytest.raises(PertokenError, match="holds no file p/three"):
        add_member(archive, "p/three", joined)
    archive.write_bytes(b"nonsense")
    with pytest.raises(PertokenError, match="not a whole zip or tar"):
        read_members(archive, ".*")


def test_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PertokenError, match="--accept-licence"):
        refuse_unaccepted("thing", "odd terms", False)
    refuse_unaccepted("thing", "odd terms", True)
    monkeypatch.setenv("PERTOKEN_ACCEPT_LICENCE", "other, thing")
    assert accepted("thing")
    assert not accepted("third")
    monkeypatch.setenv("PERTOKEN_ACCEPT_LICENCE", "1")
    assert accepted("third")

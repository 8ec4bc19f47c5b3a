"""Finished units of a long sweep, so that an interrupted run need not start anew."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pertoken.errors import PertokenError


class Checkpoint:
    """A JSONL file of finished units, one ``{"key": …, "value": …}`` a line.

    The file is named by a hash of everything the figures depend on, so units measured with other
    settings or other code are never mixed in. `discard` deletes it: call it once the whole run is
    done. Values come back as JSON gives them (tuples as lists), also on the first run, so that a
    resumed run and a straight one see the same.

    Several processes may add units to one file: each claims a unit before it computes it.
    helper: True in a process that joins a run of another one, whose file it leaves as it is.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        helper: bool = False,
    ) -> None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        self.path = folder / f"{name}-{digest.hexdigest()[:16]}.jsonl"
        self._claims = self.path.with_suffix(".claims")
        self._done: dict[str, Any] = {}
        self._read = 0  # bytes of the file whose units are known
        if not helper:
            self._drop_claims()
            if resume:
                _cut_unfinished(self.path)
            else:
                self.discard()
        self._catch_up()
        self.resumed = len(self._done)

    def __len__(self) -> int:
        return len(self._done)

    def remember(self, key: object, compute: Callable[[], Any]) -> Any:
        """The stored value of `key` (any JSON value), else ``compute()``, which is stored."""
        name = json.dumps(key, sort_keys=True)
        if name not in self._done:
            try:
                value = json.loads(json.dumps(compute()))
            except TypeError as error:
                raise PertokenError(
                    f"unit {name} cannot be kept: {error}; return numbers, strings, lists, dicts"
                ) from None
            self._append(json.dumps({"key": key, "value": value}) + "\n")
            self._done[name] = value
        return self._done[name]

    def claim(self, key: object) -> bool:
        """Whether this process is to compute the unit: nobody has it, and nobody is at it."""
        self._catch_up()
        if json.dumps(key, sort_keys=True) in self._done:
            return False
        place = self._claim_of(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with place.open("x", encoding="ascii") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return self._take_over(place)
        return True

    def wait(self, key: object, compute: Callable[[], Any], pause: float = 0.2) -> Any:
        """The value of a unit that another process is at; computed here if that one died."""
        name = json.dumps(key, sort_keys=True)
        while name not in self._done:
            if self.claim(key):
                return self.remember(key, compute)
            if name not in self._done:
                time.sleep(pause)
        return self._done[name]

    def _claim_of(self, key: object) -> Path:
        name = json.dumps(key, sort_keys=True)
        return self._claims / hashlib.sha256(name.encode()).hexdigest()[:24]

    def _take_over(self, place: Path) -> bool:
        """Whether the claim was of a process that is gone; then it is ours now."""
        try:
            owner = int(place.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return False  # it is being written or was dropped just now
        if owner == os.getpid() or _alive(owner):
            return False
        place.write_text(str(os.getpid()), encoding="ascii")
        return True

    def _append(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write at the end of the file: lines of several processes do not mix.
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def _catch_up(self) -> None:
        """Take in the whole lines that have come to the file since it was last read."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            return
        whole, units = _units(content)
        self._read += whole
        self._done.update(units)

    def _drop_claims(self) -> None:
        shutil.rmtree(self._claims, ignore_errors=True)

    def discard(self) -> None:
        """Forget every unit and delete the file."""
        self._done = {}
        self._read = 0
        self._drop_claims()
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other sweeps' files are in there, or it never was
            self.path.parent.rmdir()


def _cut_unfinished(path: Path) -> None:
    """Cut off a last line that a kill left unfinished, and whatever stands behind a broken one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    whole, _ = _units(content)
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def _units(content: bytes) -> tuple[int, dict[str, Any]]:
    """(bytes of the whole lines at the beginning, their units by name)."""
    units: dict[str, Any] = {}
    whole = 0
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            unit = json.loads(line)
            units[json.dumps(unit["key"], sort_keys=True)] = unit["value"]
        except (ValueError, KeyError, TypeError):
            break
        whole += len(line)
    return whole, units


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def code_digest(package: Path, reproduction: Path) -> str:
    """Hash of the source that a reproduction's figures may depend on.

    Everything of the package but the command line and the other reproductions: a fix in a decoder
    between two halves of a sweep would otherwise be mixed into one report.
    """
    digest = hashlib.sha256()
    proof = reproduction.parent
    for path in sorted(package.rglob("*.py")):
        other = path.parent == proof and not path.name.startswith("_") and path != reproduction
        if not other and package / "cli" not in path.parents:
            digest.update(path.relative_to(package).as_posix().encode() + b"\0")
            digest.update(path.read_bytes())
    return digest.hexdigest()

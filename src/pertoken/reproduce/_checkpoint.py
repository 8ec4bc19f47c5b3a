"""Finished units of a long sweep, so that an interrupted run need not start anew."""

from __future__ import annotations

import contextlib
import hashlib
import json
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
    """

    def __init__(
        self, folder: Path, name: str, settings: Mapping[str, Any], *, resume: bool
    ) -> None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        self.path = folder / f"{name}-{digest.hexdigest()[:16]}.jsonl"
        self._done: dict[str, Any] = {}
        if resume:
            self._done = _read(self.path)
        else:
            self.discard()
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
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
            self._done[name] = value
        return self._done[name]

    def discard(self) -> None:
        """Forget every unit and delete the file."""
        self._done = {}
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other sweeps' files are in there, or it never was
            self.path.parent.rmdir()


def _read(path: Path) -> dict[str, Any]:
    """The whole lines of `path`; a last line cut off by a kill is cut from the file too."""
    done: dict[str, Any] = {}
    whole = 0
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return done
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            unit = json.loads(line)
            done[json.dumps(unit["key"], sort_keys=True)] = unit["value"]
        except (ValueError, KeyError, TypeError):
            break
        whole += len(line)
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return done


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

"""Result files that are there whole or not at all or grow by lines; targets refused before work."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pertoken.errors import PertokenError

__all__ = ["check_target", "drop_cut_line", "whole_file", "whole_lines", "write_whole"]


def check_target(path: Path) -> None:
    """Refuse, before any work is done, a path that could not be written afterwards."""
    if path.is_dir():
        raise PertokenError(f"can't write {path}: it is a folder")
    folder = path.parent
    if not folder.is_dir():
        raise PertokenError(f"can't write {path}: there is no folder {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _refusal(path, error) from None


def write_whole(path: Path, text: str) -> None:
    """Write text in UTF-8 beside `path` and move it there, so that nothing is left half-written."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8", "replace"))  # half a surrogate pair becomes "?"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` to write bytes to, on the disk and in its place when the block ends.

    Whatever stops the block, a full disk or Ctrl-C, leaves what was at `path`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a crash could leave the name without its bytes
        os.replace(partial, path)
    except OSError as error:
        raise _refusal(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def whole_lines(path: Path) -> list[str]:
    """The lines of a file to which lines are added, but for one that a kill cut off; none if there
    is no file."""
    content = path.read_bytes() if path.is_file() else b""
    return content[: content.rfind(b"\n") + 1].decode("utf-8", "replace").split("\n")[:-1]


def drop_cut_line(path: Path, begins: str) -> None:
    """Take a last line that a kill cut off away, so that the next one stands by itself.

    begins: how each of our lines begins. PertokenError for a rest that does not: it is not ours.
    To be called once the whole lines are known to be ours.
    """
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    rest, known = content[whole:], begins.encode()
    if not rest:
        return
    if rest[: len(known)] != known[: len(rest)]:
        raise PertokenError(f"{path} ends with a line of something else; give another file")
    os.truncate(path, whole)


def _refusal(path: Path, error: OSError) -> Exception:
    if error.errno == errno.ENOSPC:  # the command line has its own line for a full disk
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return PertokenError(f"can't write {path}: {error.strerror or error}")

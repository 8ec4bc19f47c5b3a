"""Fetching and keeping files: the cache folder, its locks, and packages pinned by sha256.

Models and data sets share this. Whatever is written appears under its final name only when it is
complete: it is made in a temporary folder beside it, which goes away on any error and on Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pertoken.errors import PertokenError

__all__ = [
    "STAMP",
    "Package",
    "accepted",
    "add_member",
    "cache_root",
    "fetch_package",
    "installed_file",
    "keep",
    "progress",
    "read_members",
    "read_stamp",
    "refuse_unaccepted",
    "say",
    "sha256_of",
]

STAMP = "pertoken.json"
"""The file in each kept folder that says what lies there, whence, and under which licence."""


@dataclass(frozen=True)
class Package:
    """One archive of a package registry, pinned to its bytes."""

    registry: Literal["PyPI", "npm"]
    name: str
    version: str
    sha256: str
    megabytes: float

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.registry}, {self.megabytes:g} MB)"


def cache_root() -> Path:
    """The folder where models and data are kept: `PERTOKEN_HOME` or the platform's cache."""
    home = os.environ.get("PERTOKEN_HOME")
    if home:
        return Path(home).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("pertoken", appauthor=False)


def say(line: str) -> None:
    """Print one line on stderr: stdout belongs to results."""
    print(line, file=sys.stderr, flush=True)


def accepted(name: str, accept_licence: bool = False) -> bool:
    """Whether the terms of `name` are accepted, by argument or by `PERTOKEN_ACCEPT_LICENCE`.

    The variable holds `1` (all) or the names, separated by commas.
    """
    listed = os.environ.get("PERTOKEN_ACCEPT_LICENCE", "").replace(" ", "").split(",")
    return accept_licence or name in listed or "1" in listed


def refuse_unaccepted(name: str, licence: str, accept_licence: bool) -> None:
    """Raise unless the terms of `name` were accepted."""
    if not accepted(name, accept_licence):
        raise PertokenError(
            f"{name} is not fetched without your consent to its terms ({licence}): pass "
            f"--accept-licence (accept_licence=True) or set PERTOKEN_ACCEPT_LICENCE={name}"
        )


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_stamp(folder: Path) -> dict[str, Any] | None:
    """What `keep` wrote about `folder`, or None if nothing complete lies there."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        sizes = stamp["sizes"]
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return stamp if whole else None


def keep(target: Path, make: Callable[[Path], dict[str, Any]]) -> Path:
    """Return `target`, made once by `make(temporary folder)`, which returns what the stamp says.

    A lock makes a second process wait for the first instead of doing the work again. A kept
    folder with a file that is missing or of another length is made anew.
    """
    if read_stamp(target) is not None:
        return target
    with _disk_errors(target), _locked(target):
        if read_stamp(target) is not None:  # another process made it while this one waited
            return target
        for left in target.parent.glob(f".{target.name}.*.tmp"):
            shutil.rmtree(left)  # of a process that was killed: the lock says nobody uses it
        work = target.parent / f".{target.name}.{os.getpid()}.tmp"
        work.mkdir()
        try:
            stamp = make(work)
            files = [path for path in work.rglob("*") if path.is_file()]
            stamp["sizes"] = {str(path.relative_to(work)): path.stat().st_size for path in files}
            text = json.dumps(stamp, indent=1, ensure_ascii=False)
            (work / STAMP).write_text(text + "\n", encoding="utf-8")
            for path in work.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            work.chmod(0o755)
            if target.exists():
                shutil.rmtree(target)
            work.replace(target)
        except BaseException:  # Ctrl-C too must not leave a half-written folder
            shutil.rmtree(work, ignore_errors=True)
            raise
    return target


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    locks = cache_root() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{target.name}.lock")
    try:
        lock.acquire(timeout=2)
    except Timeout:
        say(f"waiting for another process that is preparing {target.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into one line that names the folder and the mend."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            what = "no permission to write"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR):
            what = "a file is in the way"
        else:
            raise
        raise PertokenError(
            f"could not keep {target.name} in {target.parent}: {what}; nothing half-written was "
            "left (free some space or point PERTOKEN_HOME at another folder)"
        ) from error


@contextlib.contextmanager
def progress(label: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr; yields the function that advances it. None: length unknown."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:  # a log wants no bar
        yield lambda step: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda step: bar.advance(task, step)


def installed_file(distribution: str, member: str) -> Path | None:
    """A file of an installed distribution, found without importing it; None if there is none."""
    try:
        path = Path(str(metadata.distribution(distribution).locate_file(member)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def fetch_package(package: Package, folder: Path) -> Path:
    """Download the archive of `package` below `folder` and return its path, sha256 checked.

    An archive with other bytes is deleted and fetched once more; the second time it is an error.
    Nothing is installed and no code of the package runs. Raises ConnectionError if the registry
    gives nothing, and PertokenError for altered bytes or a missing tool.
    """
    got = ""
    for attempt in (1, 2):
        place = folder / f"{package.name.replace('/', '-')}-{attempt}"
        place.mkdir()
        with progress(f"fetching {package}"):
            _download(package, place, fresh=attempt == 2)
        for archive in place.iterdir():
            got = sha256_of(archive)
            if got == package.sha256:
                return archive
        shutil.rmtree(place)
    raise PertokenError(
        f"{package} arrived altered or cut short twice: sha256 {got[:16] or 'of nothing'}… instead "
        f"of {package.sha256[:16]}…; it was deleted, try again later"
    )


def _download(package: Package, folder: Path, *, fresh: bool) -> None:
    if package.registry == "PyPI":
        # Wheels alone: building a source archive would run its code.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--quiet", "--retries=2", "--dest", str(folder)]
        command += ["--no-cache-dir"] * fresh + [f"{package.name}=={package.version}"]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise PertokenError(
                f"{package} needs npm, which is not on the PATH: install Node.js, or pass a path "
                "to the archive"
            )
        command = [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts"]
        command += ["--silent", "--fetch-retries=1"] + ["--prefer-online"] * fresh
    result = _run(command, folder)
    if result.returncode:
        if "No space left" in result.stderr or "ENOSPC" in result.stderr:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        if "No module named pip" in result.stderr:
            raise PertokenError(
                f"{package} is fetched with pip, which this Python lacks: run "
                f"`{Path(sys.executable).name} -m ensurepip` first"
            )
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "ERR" in line] or lines or ["no message"]
        raise ConnectionError(errors[-1][:160])


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")


def read_members(archive: Path, wanted: str) -> dict[str, bytes]:
    """The members of a wheel, zip or tar archive whose whole name matches the pattern `wanted`."""
    match = re.compile(wanted).fullmatch
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                return {name: opened.read(name) for name in opened.namelist() if match(name)}
        with tarfile.open(archive) as tar:
            files = [(item.name, tar.extractfile(item)) for item in tar if match(item.name)]
            return {name: file.read() for name, file in files if file is not None}
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise PertokenError(f"{archive} is not a whole zip or tar archive") from error


def add_member(archive: Path, member: str, target: Path) -> None:
    """Append one member of a wheel, zip or tar archive to the file `target`."""
    with contextlib.ExitStack() as stack:
        try:
            if zipfile.is_zipfile(archive):
                source = stack.enter_context(zipfile.ZipFile(archive)).open(member)
            else:
                opened = stack.enter_context(tarfile.open(archive)).extractfile(member)
                if opened is None:
                    raise KeyError(member)
                source = opened
        except (KeyError, tarfile.TarError) as error:
            raise PertokenError(f"{archive.name} holds no file {member}") from error
        with source, target.open("ab") as file:
            shutil.copyfileobj(source, file, 1 << 20)

"""A grid of cells in a file of JSON lines: filled in processes or on Ray, gone on with at any time.

The main process alone writes. A run that is stopped in any way goes on behind its last whole line;
a worker that is killed costs its own cell, which the next run makes.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pertoken._files import drop_cut_line, whole_lines
from pertoken._pool import LOST, in_processes, on_ray
from pertoken.errors import PertokenError

__all__ = ["fill", "read_cells", "read_toml"]

Row = dict[str, Any]
Key = tuple[Any, ...]


def fill(
    path: Path,
    wanted: Mapping[Key, tuple[Any, ...]],
    work: Callable[..., Row],
    names: Sequence[str],
    *,
    jobs: int = 1,
    ray: bool = False,
    finish: Callable[[Row], Row] = dict,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[Row], list[Key]]:
    """The rows of the wanted cells, those made that `path` does not have, and the lost cells.

    wanted: by key the arguments of `work`, which returns the row less its key. names: of the fields
    of a key. finish: makes of what `work` returned the row, in this process.
    """
    # Of the lines that are not wanted now, those of other settings may be of use later.
    finished = {_key(row, names): row for row in read_cells(path, names)}
    left = [key for key in wanted if key not in finished]
    calls = [wanted[key] for key in left]
    lost = []
    done = len(wanted) - len(left)
    tell = progress or (lambda what, now, total: None)
    tell("cells", done, len(wanted))
    run: Callable[..., Any] = on_ray if ray else in_processes if jobs > 1 else _here
    for place, value in run(work, calls, jobs) if calls else ():
        if value is LOST:
            lost.append(left[place])
            continue
        row = {**dict(zip(names, left[place], strict=True)), **finish(value)}
        _append(path, row)
        finished[left[place]] = row
        done += 1
        tell("cells", done, len(wanted))
    return [finished[key] for key in wanted if key in finished], lost


def read_cells(
    path: Path, names: Sequence[str], more: Sequence[str] = (), *, cut: bool = True
) -> list[Row]:
    """The rows of a file; a last line that was cut off is taken away where `cut`.

    names, more: fields that each row has. Raises PertokenError for a file that is none of cells.
    """
    try:
        rows = [json.loads(line) for line in whole_lines(path)]
        for row in rows:
            [row[name] for name in (*names, *more)]
        if cut:
            drop_cut_line(path, "{" + json.dumps(names[0], ensure_ascii=False) + ": ")
    except OSError as error:
        raise PertokenError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise PertokenError(f"{path} is no file of a sweep: name another --out") from None
    return rows


def read_toml(config: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], Path]:
    """The settings of a sweep, from a TOML file or a dict, and the folder its files are named from.

    Raises PertokenError for a file that cannot be read or is not TOML.
    """
    if isinstance(config, Mapping):
        return config, Path()
    file = Path(config).expanduser()
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")), file.parent
    except OSError as error:
        raise PertokenError(f"cannot read {config}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PertokenError(f"{config} is not TOML ({error})") from None


def _here(
    work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[tuple[int, Any]]:
    yield from ((place, work(*call)) for place, call in enumerate(calls))


def _key(row: Row, names: Sequence[str]) -> Key:
    return tuple(row[name] for name in names)


def _append(path: Path, row: Row) -> None:
    """One line, on the disk before the next cell is counted as done."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        with path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise PertokenError(f"can't write {path}: {error.strerror}") from None

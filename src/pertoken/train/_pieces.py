"""Pieces of a pool of documents: some megabytes of JSON lines, or a row group of Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pertoken._extras import need
from pertoken.errors import PertokenError

__all__ = ["PIECE", "Lines", "Piece", "RowGroup", "pieces_of"]

PIECE = 16 << 20  # bytes of JSON lines


@dataclass(frozen=True)
class Lines:
    """The JSON lines of a file that begin at a byte from `start` up to `stop`."""

    path: Path
    start: int
    stop: int

    def texts(self, field: str) -> list[str]:
        """The documents; raises PertokenError, with the line, where there is none."""
        return [self._text(line, at, field) for line, at in self._raw()]

    def copy(self, kept: npt.NDArray[np.bool_], out: Any) -> None:
        """Write the chosen lines."""
        for (line, _), wanted in zip(self._raw(), kept, strict=True):
            if wanted:
                out.write(line if line.endswith(b"\n") else line + b"\n")

    def _raw(self) -> Iterator[tuple[bytes, int]]:
        with self.path.open("rb") as file:
            if self.start:
                file.seek(self.start - 1)
                file.readline()  # the line that began before belongs to the piece before
            at = file.tell()
            while at < self.stop and (line := file.readline()):
                if line.strip():
                    yield line, at
                at += len(line)

    def _text(self, line: bytes, at: int, field: str) -> str:
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            raise PertokenError(f"{self._place(at)}: not UTF-8") from None
        except json.JSONDecodeError as error:
            raise PertokenError(
                f"{self._place(at)}: not JSON ({error.msg}, column {error.colno})"
            ) from None
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise PertokenError(f'{self._place(at)}: {{"{field}": "…"}} is wanted')
        return text.encode("utf-8", "replace").decode()  # half a surrogate pair becomes "?"

    def _place(self, at: int) -> str:
        with self.path.open("rb") as file:
            line = file.read(at).count(b"\n") + 1
        return f"{self.path}, line {line}"


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file."""

    path: Path
    number: int

    def texts(self, field: str) -> list[str]:
        """The documents; raises PertokenError, with the row, where there is none."""
        table = self.open()
        if field not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise PertokenError(f"{self.path} has no column {field}, but {names}")
        texts = table.read_row_group(self.number, columns=[field]).column(0).to_pylist()
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise PertokenError(
                    f"{self.path}, row group {self.number}, row {place + 1}: {field} is no text"
                )
        return texts

    def copy(self, kept: npt.NDArray[np.bool_], out: Any) -> None:
        """Write the chosen rows."""
        out.write_table(self.open().read_row_group(self.number).filter(kept))

    def open(self) -> Any:
        """The file (extra `parquet`)."""
        return need("pyarrow.parquet", "parquet").ParquetFile(self.path)


Piece = Lines | RowGroup


def pieces_of(source: Path) -> list[Piece]:
    """All pieces of a file, or of the files of a folder in order; of one kind."""
    if not source.exists():
        raise PertokenError(f"there is no file or folder {source}")
    files = [source]
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix in (".jsonl", ".parquet"))
        if not files:
            raise PertokenError(f"{source} holds no .jsonl and no .parquet file")
    kinds = {path.suffix.lower() for path in files}
    if len(kinds) > 1:
        raise PertokenError(f"{source} holds both .jsonl and .parquet files: keep them apart")
    if kinds == {".jsonl"}:
        pieces: list[Piece] = [
            Lines(path, start, min(start + PIECE, size))
            for path in files
            for size in [path.stat().st_size]
            for start in range(0, size, PIECE)
        ]
    elif kinds == {".parquet"}:
        pieces = [RowGroup(path, n) for path in files for n in range(_row_groups(path))]
    else:
        raise PertokenError(f"{source} is no .jsonl and no .parquet file")
    if not pieces:
        raise PertokenError(f"{source} is empty")
    return pieces


def _row_groups(path: Path) -> int:
    parquet = need("pyarrow.parquet", "parquet")
    try:
        return int(parquet.ParquetFile(path).num_row_groups)
    except need("pyarrow", "parquet").ArrowInvalid as error:
        raise PertokenError(f"{path} can't be read as Parquet ({error})") from None

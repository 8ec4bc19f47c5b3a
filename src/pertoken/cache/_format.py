"""The file format `.ptkv`: one conversation's ids, and at two of three levels its keys and values.

    magic 8 · header's length u32 · CRC32 u32 of both and the header · header (JSON, UTF-8)
    records of ids, one per chunk of tokens
    records of keys and values, one per chunk of tokens      (levels "raw" and "int8")

A record is kind u8 · length u64 · CRC32 u32 · payload; the CRC covers the kind, the length, the
record's place in the file and the payload. All numbers are little-endian. Ids stand first, so that
a file cut short keeps what the rest can be computed from. Nothing in a file is executed.

The prefix (magic, length, CRC) stays as it is in all versions, so that damage and another version
are told apart.

| kind | payload |
|---|---|
| 1 | ids in ceil(log2 vocab) bits each |
| 2 | ids coded by the model's law: checksum 8 · CRC32 of the ids u32 · the range coder's bytes |
| 3 | keys and values, layer by layer, keys first: elements of the dtype, [heads, rows, dim] |
| 4 | the same as int8: scales float32 (keys [heads, 1, dim], values [heads, rows, 1]), then codes |

A layer's share of a chunk is the rows that the layer holds: sliding layers hold their last ones.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pertoken.errors import PertokenError

__all__ = ["CODED", "INT8", "LEVELS", "PACKED", "RAW", "Damaged", "Header", "LayerShape", "Reader"]

MAGIC = b"\x89PTKV\r\n\x1a"  # as PNG's: text transfers that mangle line ends are noticed
VERSION = 1
LEVELS = ("raw", "int8", "tokens")
PACKED, CODED, RAW, INT8 = 1, 2, 3, 4

_PREFIX = struct.Struct("<8sII")
_RECORD = struct.Struct("<BQI")
_CODED = struct.Struct("<8sI")
CODED_HEAD = _CODED.size


class Damaged(PertokenError):
    """A part of a file that is not what was written."""


@dataclass(frozen=True)
class LayerShape:
    """What one layer holds: rows of the tokens [start, rows of the cache); window 0: all."""

    heads: int
    key_dim: int
    value_dim: int
    start: int = 0
    window: int = 0


@dataclass(frozen=True)
class Header:
    """What a file says of itself. tokens: ids; rows: tokens that the cache holds; dtype: of K/V.

    numerics: what the last bits of a forward pass depend on, to name where a law differs.
    """

    level: str
    model: str
    fingerprint: str
    dtype: str
    vocab: int
    tokens: int
    rows: int
    chunk: int
    layers: tuple[LayerShape, ...]
    numerics: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def spans(self, count: int) -> list[tuple[int, int]]:
        """The chunks [start, end) of `count` tokens."""
        return [(at, min(at + self.chunk, count)) for at in range(0, count, self.chunk)]

    def to_bytes(self) -> bytes:
        """The file up to its first record."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["layers"] = _shorten(self.layers)
        text = json.dumps(fields, separators=(",", ":")).encode()
        return _PREFIX.pack(MAGIC, len(text), _crc(MAGIC, len(text), text)) + text


def record(kind: int, place: int, payload: bytes) -> bytes:
    """A record's bytes; place: its number in the file, from 0."""
    return _RECORD.pack(kind, len(payload), _record_crc(kind, place, payload)) + payload


def coded_payload(checksum: bytes, crc: int, code: bytes) -> bytes:
    """Payload of a record of coded ids."""
    return _CODED.pack(checksum, crc) + code


def split_coded(payload: bytes) -> tuple[bytes, int, bytes]:
    """Checksum of the frequencies, CRC32 of the ids and the coder's words of a payload."""
    checksum, crc = _CODED.unpack_from(payload)
    return checksum, crc, payload[_CODED.size :]


class Reader:
    """Reads a file from its beginning: the header at once, then record by record.

    Raises PertokenError for what is no such file, of another version, or damaged in its header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = 0
        try:
            self._file: BinaryIO = path.open("rb")
        except FileNotFoundError:
            raise PertokenError(f"there is no file {path}") from None
        except IsADirectoryError:
            raise PertokenError(f"{path} is a folder, not a .ptkv file") from None
        except OSError as error:
            raise PertokenError(f"can't read {path}: {error.strerror or error}") from None
        try:
            self.size = path.stat().st_size
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def record(self, what: str) -> tuple[int, bytes]:
        """Kind and payload of the next record; Damaged, saying `what` it should be, where not."""
        head = self._file.read(_RECORD.size)
        if len(head) < _RECORD.size:
            raise Damaged(f"{self.path} is cut short before {what}")
        kind, size, crc = _RECORD.unpack(head)
        if size > self.size - self._file.tell():
            raise Damaged(f"{self.path} is damaged or cut short in {what}")
        payload = self._file.read(size)
        if crc != _record_crc(kind, self._place, payload):
            raise Damaged(f"{self.path} is damaged in {what}")
        self._place += 1
        return kind, payload

    def finished(self) -> None:
        """Damaged, where something stands behind the last record."""
        if rest := self.size - self._file.tell():
            raise Damaged(f"{self.path} has {rest:,} bytes of something else behind its last part")

    def _read_header(self) -> Header:
        prefix = self._file.read(_PREFIX.size)
        if prefix[: len(MAGIC)] != MAGIC:
            raise PertokenError(
                f"{self.path} is not a .ptkv file (or its first {len(MAGIC)} bytes are damaged)"
            )
        damaged = Damaged(f"{self.path} is damaged or cut short in its header")
        if len(prefix) < _PREFIX.size:
            raise damaged
        _, size, crc = _PREFIX.unpack(prefix)
        text = self._file.read(min(size, self.size))
        if crc != _crc(MAGIC, size, text):
            raise damaged
        fields = json.loads(text)
        if fields["version"] != VERSION:
            raise PertokenError(
                f"{self.path} has format version {fields['version']}; this pertoken reads version "
                f"{VERSION}: update it"
            )
        fields["layers"] = _lengthen(fields["layers"])
        return Header(**fields)


def _crc(magic: bytes, size: int, text: bytes) -> int:
    return zlib.crc32(text, zlib.crc32(magic + struct.pack("<I", size)))


def _record_crc(kind: int, place: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<BQQ", kind, len(payload), place)))


def _shorten(layers: Sequence[LayerShape]) -> list[list[int]]:
    """Layers as [how many in a row, fields…]: most are alike."""
    runs: list[list[int]] = []
    for layer in layers:
        shape = list(dataclasses.astuple(layer))
        if runs and runs[-1][1:] == shape:
            runs[-1][0] += 1
        else:
            runs.append([1, *shape])
    return runs


def _lengthen(runs: list[list[int]]) -> tuple[LayerShape, ...]:
    return tuple(LayerShape(*shape) for count, *shape in runs for _ in range(count))

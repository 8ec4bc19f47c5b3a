"""A conversation's KV cache on disk, and back, verified.

The cache is a function of the token ids, so a file may hold as little as the ids: at a model's own
law they cost log2 of its perplexity per token, the bound of the paper (Sequential KV cache
compression via probabilistic language tries, arXiv 2604.15356: 3.3 to 4.3 bits per token). The
paper counts the time to compute the rest as nothing; here it is the price between three levels:

- "raw" holds ids, keys and values as they are. Back by reading; keys and values are bit-equal.
- "int8" holds ids, and keys and values in 8 bits. Back by reading; a key is off by at most 1/254 of
  the largest of its channel in its chunk, a value by 1/254 of the largest of its vector (and by the
  dtype's own rounding).
- "tokens" holds the ids, coded by the model (`_coder`). Back by one forward pass per token to
  decode them, then a prefill in chunks, to which keys and values are bit-equal.

Every level holds the ids, and every part is checked before it is used. Of a file that is damaged or
cut short the longest prefix of keys and values that is whole is taken, and the rest is computed by
a prefill of the ids. A file with damaged ids, of another model, or whose law does not come out as
it was (see below) is refused: ids that are not what was saved are never returned.

Level "tokens" needs the law to the last bit. Files are restored with the number of threads they
were written with; another processor, library version, device or attention back end can change the
last bits, and then the error names the chunk and the difference. Writing decodes all of it once
more, and keeps a chunk that does not come out right as plain ids; so it takes two forward passes
per token. Use "raw" for speed, "tokens" to keep many conversations.

Differs from the paper, which is theory without a format: its cache is one sequence per trie, here a
file is one conversation; shared prefixes are the business of `PrefixTrie`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from pertoken._extras import need
from pertoken._files import check_target, whole_file
from pertoken._forward import text_logits
from pertoken.cache import _format
from pertoken.cache._coder import pack_ids
from pertoken.cache._format import CODED, INT8, LEVELS, PACKED, RAW, Damaged, Header, Reader
from pertoken.cache._ids import check_room, code_ids, numerics, read_ids, with_threads
from pertoken.cache._tensors import Rows, empty_cache, layer_shapes, pack_rows
from pertoken.cache.fingerprint import model_fingerprint, model_name
from pertoken.errors import PertokenError, nearest
from pertoken.result import Result, plain

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = [
    "Inspection",
    "Restored",
    "Saved",
    "check_level",
    "inspect_cache",
    "prefill",
    "restore_cache",
    "save_cache",
]


@dataclass(frozen=True)
class Saved(Result):
    """What was written. held: tokens that the cache holds; bytes: of the file.

    payload_bits: without header and records' frames.
    cross_entropy: the model's own bits per token on these ids, log2 of the vocabulary for the first
    of them; raw_chunks: how many chunks had to be kept as plain ids. Both of level "tokens" only.
    """

    path: Path
    level: str
    tokens: int
    held: int
    bytes: int
    payload_bits: int
    seconds: float
    cross_entropy: float | None = None
    raw_chunks: int = 0

    _title = "A conversation saved"

    @property
    def bits_per_token(self) -> float:
        """Payload bits per token."""
        return self.payload_bits / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """The fields, and `bits_per_token`."""
        found: dict[str, Any] = plain(asdict(self) | {"bits_per_token": self.bits_per_token})
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One record: `to_dict`."""
        return [self.to_dict()]


@dataclass(frozen=True)
class Restored:
    """A conversation again. input_ids: [1, time]; cache: what to hand to `generate` with them.

    Of the cache's tokens `verified` came from the file, checked, and `prefilled` were computed.
    damage: what was wrong with the file, empty where nothing was.
    """

    input_ids: torch.Tensor
    cache: Cache
    verified: int
    prefilled: int
    seconds: float
    damage: str = ""


@dataclass(frozen=True)
class Inspection(Result):
    """What a file says of itself, and whether all its parts are whole (`damage` is empty then)."""

    path: Path
    bytes: int
    header: Header
    coded_chunks: int
    payload_bytes: int
    damage: str

    _title = "A saved conversation"

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON; layers are counted."""
        said = asdict(self.header) | {"layers": len(self.header.layers)}
        own = {"path": str(self.path), "bytes": self.bytes, "payload_bytes": self.payload_bytes}
        return own | said | {"coded_chunks": self.coded_chunks, "damage": self.damage}

    def rows(self) -> list[dict[str, Any]]:
        """One record: `to_dict`, without the libraries' versions."""
        return [{key: value for key, value in self.to_dict().items() if key != "numerics"}]


def save_cache(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    input_ids: torch.Tensor | Sequence[int],
    *,
    cache: Cache | None = None,
    level: str = "raw",
    chunk: int = 256,
) -> Saved:
    """Write one conversation's ids [time] or [1, time], and its keys and values, to a file.

    cache: a DynamicCache that has seen the ids, or all but the last as after `generate`; without
    one, all but the last are prefilled (`prefill`), so that `generate` can go on from either.
    level: "raw", "int8" or "tokens", see above. chunk: tokens that are checked together, and
    prefilled together. An older file at `path` stays until the new one is whole. That the cache
    has seen these very ids can't be told from it and is taken on trust.

    Raises PertokenError for a cache or model whose state is more or less than keys and values.

    >>> import tempfile
    >>> from pertoken.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saved = save_cache(f"{folder}/talk.ptkv", model, [5, 6, 7], level="tokens")
    ...     restored = restore_cache(f"{folder}/talk.ptkv", model)
    >>> restored.input_ids.tolist(), restored.cache.get_seq_length()
    ([[5, 6, 7]], 2)
    """
    began = time.perf_counter()
    target = Path(path)
    check_level(level)
    if chunk < 1:
        raise PertokenError(f"chunk must be 1 token or more, got {chunk}")
    _check_model(model)
    vocab = _vocabulary(model)
    ids = _check_ids(input_ids, vocab)
    check_target(target)
    rows = len(ids) - 1
    if cache is None and level != "tokens":
        cache = prefill(model, ids[:-1], chunk=chunk)
    layers: tuple[_format.LayerShape, ...] = ()
    if cache is not None:
        layers = layer_shapes(cache, model, len(ids))
        rows = int(cache.get_seq_length())
    stored = layers if level != "tokens" else ()
    header = Header(
        level=level,
        model=model_name(model),
        fingerprint=model_fingerprint(model),
        dtype=str(cache.layers[0].keys.dtype if cache is not None and stored else model.dtype)[6:],
        vocab=vocab,
        tokens=len(ids),
        rows=rows,
        chunk=chunk,
        layers=stored,
        numerics=numerics(model),
    )
    entropy: float | None = None
    records = [(PACKED, pack_ids(ids[a:b], vocab)) for a, b in header.spans(len(ids))]
    if level == "tokens":
        records, entropy = code_ids(model, ids, header)
    with whole_file(target) as file:
        payload = _write(file, header, chain(records, _row_records(cache, header)))
        size = file.tell()
    return Saved(
        path=target,
        level=level,
        tokens=len(ids),
        held=rows,
        bytes=size,
        payload_bits=8 * payload,
        seconds=time.perf_counter() - began,
        cross_entropy=None if entropy is None else entropy / len(ids),
        raw_chunks=0 if entropy is None else sum(kind == PACKED for kind, _ in records),
    )


def check_level(level: str) -> None:
    """PertokenError for a level that is not known, or whose package is not installed."""
    if level not in LEVELS:
        raise PertokenError(
            f"unknown level {level!r}{nearest(level, LEVELS)}: use {', '.join(LEVELS)}"
        )
    if level == "tokens":
        need("constriction", "archive")


def restore_cache(path: str | os.PathLike[str], model: PreTrainedModel) -> Restored:
    """Read a file of `save_cache` with the model it was made by.

    Raises PertokenError for a file that is no such file, of another version or model, whose ids
    are damaged, or whose law does not come out as it was. Keys and values that are damaged are
    computed again: bit-equal to those saved where these were prefilled in the same chunks.
    """
    began = time.perf_counter()
    _check_model(model)
    with Reader(Path(path)) as reader:
        header = reader.header
        _check_same(reader, model)
        with with_threads(int(header.numerics["threads"])):
            ids = read_ids(reader, model)
            cache = empty_cache(model)
            verified, damage = 0, ""
            if header.layers:
                rows = Rows(header.layers, header.rows, header.dtype)
                found, damage = _read_rows(reader, rows)
                verified = rows.usable(found, header.rows)
                rows.fill(cache, verified, model.device)
            prefill(model, ids[: header.rows], chunk=header.chunk, cache=cache)
    return Restored(
        input_ids=torch.tensor([ids], device=model.device),
        cache=cache,
        verified=verified,
        prefilled=header.rows - verified,
        seconds=time.perf_counter() - began,
        damage=damage,
    )


def inspect_cache(path: str | os.PathLike[str]) -> Inspection:
    """What a file holds, and whether every part of it is whole; needs no model.

    Raises PertokenError for what is no such file, of another version, or damaged in its header.
    """
    with Reader(Path(path)) as reader:
        header, damage, coded, payload = reader.header, "", 0, 0
        try:
            for what in _parts(header):
                kind, part = reader.record(what)
                coded += kind == CODED
                payload += len(part)
            reader.finished()
        except Damaged as error:
            damage = str(error)
    return Inspection(Path(path), reader.size, header, coded, payload, damage)


@torch.no_grad()
def prefill(
    model: PreTrainedModel, ids: Sequence[int], *, chunk: int = 256, cache: Cache | None = None
) -> Cache:
    """A cache that has seen `ids`, in forward passes of `chunk` tokens; returned.

    cache: holds a beginning of them already, cut at a multiple of `chunk`; then the result is
    bit-equal to that of one go, because every pass has the same shape.
    """
    cache = empty_cache(model) if cache is None else cache
    seen = int(cache.get_seq_length())
    if seen < len(ids):
        check_room(model, len(ids))
    whole = torch.tensor([list(ids)], dtype=torch.long, device=model.device)
    for start in range(seen, len(ids), chunk):
        end = min(start + chunk, len(ids))
        text_logits(model, whole[:, start:end], whole.new_ones(1, end), cache)
    return cache


def _write(file: BinaryIO, header: Header, records: Iterable[tuple[int, bytes]]) -> int:
    """Write header and records; bytes of their payloads, a code's checks not counted."""
    file.write(header.to_bytes())
    total = 0
    for place, (kind, payload) in enumerate(records):
        file.write(_format.record(kind, place, payload))
        total += len(payload) - (_format.CODED_HEAD if kind == CODED else 0)
    return total


def _row_records(cache: Cache | None, header: Header) -> Iterator[tuple[int, bytes]]:
    """Records of keys and values, one at a time: together they are as large as the cache."""
    int8 = header.level == "int8"
    for span in header.spans(header.rows) if cache is not None and header.layers else ():
        yield INT8 if int8 else RAW, pack_rows(cache, header.layers, span, int8)


def _read_rows(reader: Reader, rows: Rows) -> tuple[int, str]:
    """Tokens whose keys and values are whole, from the first on; what stopped it, else empty."""
    header = reader.header
    found = 0
    try:
        for span, what in zip(header.spans(header.rows), _row_parts(header), strict=True):
            kind, payload = reader.record(what)
            if not rows.put(span, payload, kind == INT8):
                raise Damaged(f"{reader.path} is damaged in {what}")
            found = span[1]
    except Damaged as error:
        return found, str(error)
    return found, ""


def _parts(header: Header) -> list[str]:
    """Names of all records of a file, in order."""
    count = len(header.spans(header.tokens))
    named = [f"ids, chunk {number} of {count}" for number in range(1, count + 1)]
    return named + _row_parts(header)


def _row_parts(header: Header) -> list[str]:
    count = len(header.spans(header.rows)) if header.layers else 0
    return [f"keys and values, chunk {number} of {count}" for number in range(1, count + 1)]


def _check_same(reader: Reader, model: PreTrainedModel) -> None:
    header = reader.header
    here = model_fingerprint(model)
    if header.fingerprint == here:
        return
    name = model_name(model)
    own = str(model.dtype)[6:]
    hint = f"; it held {header.dtype}, this one is {own}" if own != header.dtype else ""
    raise PertokenError(
        f"{reader.path} was made with another model: {header.model} (fingerprint "
        f"{header.fingerprint[:12]}), this is {name} ({here[:12]}){hint}"
    )


def _check_model(model: PreTrainedModel) -> None:
    empty_cache(model)
    if model.training:
        raise PertokenError(
            f"{type(model).__name__} is in training mode, whose dropout changes keys and values: "
            "call model.eval() first"
        )


def _vocabulary(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return int(model.config.get_text_config().vocab_size if weight is None else weight.shape[0])


def _check_ids(input_ids: torch.Tensor | Sequence[int], vocab: int) -> list[int]:
    given = torch.as_tensor(input_ids)
    if given.dim() == 2 and given.shape[0] != 1:
        raise PertokenError(f"an archive holds one conversation, got {given.shape[0]} rows of ids")
    ids: list[int] = given.reshape(-1).tolist()
    if not ids:
        raise PertokenError("the conversation is empty: there is no token to save")
    if given.is_floating_point() or given.dtype == torch.bool:
        raise PertokenError(f"token ids must be integers, got {given.dtype}")
    wrong = next((token for token in ids if not 0 <= token < vocab), None)
    if wrong is not None:
        raise PertokenError(f"token id {wrong} is outside the model's vocabulary of {vocab}")
    return ids

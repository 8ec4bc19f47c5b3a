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

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pertoken._extras import need
from pertoken._files import check_target, whole_file
from pertoken.cache import _format
from pertoken.cache._coder import (
    Chunk,
    Law,
    decode_chunk,
    encode_chunk,
    pack_ids,
    packed_size,
    unpack_ids,
)
from pertoken.cache._format import CODED, INT8, LEVELS, PACKED, RAW, Damaged, Header, Reader
from pertoken.cache._tensors import Rows, empty_cache, layer_shapes, pack_rows
from pertoken.cache.fingerprint import model_fingerprint, model_name
from pertoken.decode.forward import text_logits
from pertoken.errors import PertokenError, nearest

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
class Saved:
    """What was written. bytes: of the file; payload_bits: without header and records' frames.

    cross_entropy: bits per token of the model on these ids, float64 from float32 logits, log2 of
    the vocabulary for the first; with raw_chunks, the chunks that had to be kept as plain ids,
    known at level "tokens" only.
    """

    path: Path
    level: str
    tokens: int
    rows: int
    bytes: int
    payload_bits: int
    seconds: float
    cross_entropy: float | None = None
    raw_chunks: int = 0

    @property
    def bits_per_token(self) -> float:
        """Payload bits per token."""
        return self.payload_bits / self.tokens


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
class Inspection:
    """What a file says of itself, and whether all its parts are whole (`damage` is empty then)."""

    path: Path
    bytes: int
    header: Header
    coded_chunks: int
    payload_bytes: int
    damage: str

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON; layers are counted."""
        said = asdict(self.header) | {"layers": len(self.header.layers)}
        own = {"path": str(self.path), "bytes": self.bytes, "payload_bytes": self.payload_bytes}
        return own | said | {"coded_chunks": self.coded_chunks, "damage": self.damage}


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
    prefilled together. An older file at `path` stays until the new one is whole.

    Raises PertokenError for a cache or model whose state is more or less than keys and values.
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
    if cache is not None:
        layers = layer_shapes(cache, model, len(ids))
        rows = int(cache.get_seq_length())
    elif level == "tokens":
        layers, rows = (), len(ids) - 1
    else:
        cache, rows = prefill(model, ids[:-1], chunk=chunk), len(ids) - 1
        layers = layer_shapes(cache, model, len(ids))
    if level == "tokens":
        layers = ()
    header = Header(
        level=level,
        model=model_name(model),
        fingerprint=model_fingerprint(model),
        dtype=str((cache.layers[0].keys if layers and cache else model).dtype)[6:],
        vocab=vocab,
        tokens=len(ids),
        rows=rows,
        chunk=chunk,
        layers=layers,
        numerics=_numerics(model),
    )
    payload = 0
    place = 0
    entropy: list[float] = []
    raw_chunks = 0
    if level == "tokens":
        records, entropy = _code_ids(model, ids, header)
        raw_chunks = sum(kind == PACKED for kind, _ in records)
    else:
        records = [(PACKED, pack_ids(ids[a:b], vocab)) for a, b in header.spans(len(ids))]
    with whole_file(target) as file:
        file.write(header.to_bytes())
        for kind, part in records:
            file.write(_format.record(kind, place, part))
            place += 1
            payload += len(part) - (_format.CODED_HEAD if kind == CODED else 0)
        for span in header.spans(rows) if layers and cache is not None else []:
            part = pack_rows(cache, layers, span, level == "int8")
            file.write(_format.record(INT8 if level == "int8" else RAW, place, part))
            place += 1
            payload += len(part)
        size = file.tell()
    return Saved(
        path=target,
        level=level,
        tokens=len(ids),
        rows=rows,
        bytes=size,
        payload_bits=8 * payload,
        seconds=time.perf_counter() - began,
        cross_entropy=sum(entropy) / len(ids) if entropy else None,
        raw_chunks=raw_chunks,
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
        with _threads(int(header.numerics["threads"])):
            ids = _read_ids(reader, model)
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
        _check_room(model, len(ids))
    whole = torch.tensor([list(ids)], dtype=torch.long, device=model.device)
    for start in range(seen, len(ids), chunk):
        end = min(start + chunk, len(ids))
        text_logits(model, whole[:, start:end], whole.new_ones(1, end), cache)
    return cache


def _code_ids(
    model: PreTrainedModel, ids: list[int], header: Header
) -> tuple[list[tuple[int, bytes]], list[float]]:
    """Records of coded ids, each decoded once to see that it comes out right; bits per chunk."""
    _check_room(model, len(ids))
    spans = header.spans(len(ids))
    law = Law(model, header.vocab)
    chunks = [encode_chunk(law, ids[a:b]) for a, b in spans]
    law = Law(model, header.vocab)
    records: list[tuple[int, bytes]] = []
    for (a, b), chunk in zip(spans, chunks, strict=True):
        if decode_chunk(law, chunk, b - a) == ids[a:b]:
            payload = _format.coded_payload(chunk.checksum, chunk.crc, chunk.code)
            records.append((CODED, payload))
            continue
        records.append((PACKED, pack_ids(ids[a:b], header.vocab)))
        law = Law(model, header.vocab)  # the old one has read wrong tokens
        for token in ids[:b]:
            law.add(token)
    return records, [chunk.entropy for chunk in chunks]


def _read_ids(reader: Reader, model: PreTrainedModel) -> list[int]:
    header = reader.header
    spans = header.spans(header.tokens)
    law = Law(model, header.vocab)
    ids: list[int] = []
    for number, (a, b) in enumerate(spans):
        name = f"chunk {number + 1} of {len(spans)}"
        kind, payload = reader.record(f"ids, {name}: {a} of {header.tokens} tokens are whole")
        if kind == PACKED and len(payload) == packed_size(b - a, header.vocab):
            new = unpack_ids(payload, b - a, header.vocab)
            for token in new:
                law.add(token)
        else:
            _check_room(model, header.tokens)
            checksum, crc, code = _format.split_coded(payload)
            decoded = decode_chunk(law, Chunk(code, checksum, crc), b - a)
            if decoded is None:
                raise PertokenError(f"{reader.path}: {name} {_not_reproduced(header, model)}")
            new = decoded
        ids += new
    return ids


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


def _numerics(model: PreTrainedModel) -> dict[str, Any]:
    """What the last bits of a forward pass depend on beside the model."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": model.device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "attention": str(model.config.get_text_config(decoder=True)._attn_implementation),
    }


def _not_reproduced(header: Header, model: PreTrainedModel) -> str:
    here = _numerics(model)
    then = {name: value for name, value in header.numerics.items() if here.get(name) != value}
    if then:
        written = ", ".join(f"{name} {value}" for name, value in then.items())
        now = ", ".join(f"{name} {here.get(name)}" for name in then)
        known = f"written with {written}; here {now}"
    else:
        known = f"written with {header.numerics['threads']} threads, the same libraries as here"
    return (
        f"does not reproduce: {known}. Its ids need the machine and libraries it was written "
        'with; level="raw" does not'
    )


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with this number of threads: sums come out otherwise with another."""
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


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


def _check_room(model: PreTrainedModel, tokens: int) -> None:
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and tokens > room:
        raise PertokenError(f"{tokens} tokens do not fit the model's {room} positions")


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

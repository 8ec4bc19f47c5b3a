"""A file's ids: coded by the model, each chunk decoded once before it is trusted, or packed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from pertoken._takeover import implementation
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
from pertoken.cache._format import CODED, PACKED, Header, Reader
from pertoken.errors import PertokenError
from pertoken.prompts import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_room", "code_ids", "numerics", "read_ids", "with_threads"]


def code_ids(
    model: PreTrainedModel, ids: list[int], header: Header
) -> tuple[list[tuple[int, bytes]], float]:
    """Records of coded ids, each decoded once to see that it comes out right; entropy in bits."""
    check_room(model, len(ids))
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
    return records, sum(chunk.entropy for chunk in chunks)


def read_ids(reader: Reader, model: PreTrainedModel) -> list[int]:
    """The ids of a file; PertokenError for a chunk that is damaged or whose law is another."""
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
            check_room(model, header.tokens)
            checksum, crc, code = _format.split_coded(payload)
            decoded = decode_chunk(law, Chunk(code, checksum, crc), b - a)
            if decoded is None:
                raise PertokenError(f"{reader.path}: {name} {_not_reproduced(header, model)}")
            new = decoded
        ids += new
    return ids


def numerics(model: PreTrainedModel) -> dict[str, Any]:
    """What the last bits of a forward pass depend on beside the model."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": model.device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "attention": str(implementation(model.config.get_text_config(decoder=True))),
    }


@contextlib.contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Compute with this number of threads: sums come out otherwise with another."""
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def check_room(model: PreTrainedModel, tokens: int) -> None:
    """PertokenError for more tokens than a model has positions."""
    room = positions(model)
    if room is not None and tokens > room:
        raise PertokenError(f"{tokens} tokens do not fit the model's {room} positions")


def _not_reproduced(header: Header, model: PreTrainedModel) -> str:
    here = numerics(model)
    then = {name: value for name, value in header.numerics.items() if here.get(name) != value}
    if then:
        written = ", ".join(f"{name} {value}" for name, value in then.items())
        now = ", ".join(f"{name} {here.get(name)}" for name in then)
        known = f"written with {written}; here {now}"
    else:
        known = "threads, libraries and attention are those it was written with"
    return (
        f"does not reproduce: {known}. Its ids need the machine and libraries it was written "
        'with; level="raw" does not'
    )

"""Token ids coded by the model's own next-token law, and back.

The law behind the tokens read so far, p [vocab], is a float64 softmax of float32 logits. It becomes
whole numbers that sum to 2^24:

    f_i = max(1, round(p_i · (2^24 − vocab)))        and what is left goes to the most likely token

(what is left is not negative, as f_i <= p_i · (2^24 − vocab) + 1). Every token has f_i >= 1, so no
escape is needed; the first token has no law and is coded with equal frequencies. A range coder
(constriction) spends −log2(f_i / 2^24) bits on a token: 24 at most, so a text with very unlikely
tokens may cost less than the model's cross-entropy.

Why both sides agree. Encoder and decoder compute the law by the same sequence of one-token forward
passes, because the decoder knows only one token more each time; another shape gives other last
bits. Both hand the same whole numbers to constriction: its `Categorical(weights, perfect=False)`
gives entry i of a table of weights the cumulative frequency i + floor(sum of the weights before i ·
(2^24 − vocab) / total), and as weights f_i − 1 are whole, sum to 2^24 − vocab and stay exact in
float32, the frequencies it codes with are the f_i. A checksum of the frequencies of each chunk says
whether the law came out the same; where it did not (another thread count, another library), ids
decoded from it are not to be trusted.

A chunk's code ends by itself, so a chunk decodes given the ids before it. constriction ends it
with whole words of 32 bits; here the shortest bytes that still name a number in the coder's last
interval are kept: 3 bits a chunk too many on average and 8 at most (measured; 19 and 33 with whole
words).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pertoken._extras import need
from pertoken._forward import text_logits
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Chunk", "Law", "decode_chunk", "encode_chunk", "frequencies", "pack_ids", "unpack_ids"]

TOTAL = 1 << 24  # constriction's precision


def frequencies(logits: np.ndarray) -> np.ndarray:
    """Whole frequencies [vocab] (int32, each >= 1, sum 2^24) of the law of logits [vocab].

    >>> frequencies(np.array([0.0, 0.0, -100.0])).tolist()
    [8388609, 8388606, 1]
    """
    exact = logits.astype(np.float64)
    exact -= exact.max()
    p = np.exp(exact)
    p /= p.sum()
    whole = np.maximum(np.rint(p * (TOTAL - p.size)), 1).astype(np.int32)
    whole[whole.argmax()] += TOTAL - whole.sum(dtype=np.int64)  # argmax: the first of equal ones
    return whole


class Law:
    """The next-token law of one growing text, in one-token forward passes.

    vocab: the number of logits. A token is read when the next law is asked for, so none is read
    in vain.
    """

    def __init__(self, model: PreTrainedModel, vocab: int) -> None:
        from transformers import DynamicCache

        self.model = model
        self.vocab = vocab
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.read = 0
        self._pending: list[int] = []

    def add(self, token: int) -> None:
        """Append a token to the text."""
        self._pending.append(token)

    @torch.no_grad()
    def logits(self) -> np.ndarray:
        """Next-token logits [vocab] in float32; equal ones while the text is empty."""
        found = torch.zeros(self.vocab)
        for token in self._pending:
            ids = torch.tensor([[token]], device=self.model.device)
            self.read += 1
            mask = ids.new_ones(1, self.read)
            found = text_logits(self.model, ids, mask, self.cache)[0, -1].float()
        self._pending.clear()
        values: np.ndarray = found.cpu().numpy()
        if not np.isfinite(values.max()):
            raise PertokenError(
                f"the model's logits behind {self.read} tokens are not finite; its law cannot "
                'code the ids (level="raw" stores them as they are)'
            )
        return values


@dataclass(frozen=True)
class Chunk:
    """Coded ids, and what must come out again.

    code: the range coder's words as big-endian bytes, without those that are not needed; checksum:
    64 bits of sha256 over the frequencies; crc: CRC32 of the ids; entropy: sum of −log2 p over the
    tokens, in bits (log2 of the vocabulary for the first).
    """

    code: bytes
    checksum: bytes
    crc: int
    entropy: float = math.nan


def ids_crc(ids: list[int]) -> int:
    """CRC32 of ids as 32-bit words."""
    return zlib.crc32(np.asarray(ids, dtype="<u4").tobytes())


def encode_chunk(law: Law, ids: list[int]) -> Chunk:
    """Code some ids behind the text that a law has read; it has read them afterwards."""
    stream = need("constriction", "archive").stream
    coder = stream.queue.RangeEncoder()
    checksum = hashlib.sha256()
    entropy = 0.0
    for token in ids:
        logits = law.logits()
        table = frequencies(logits)
        checksum.update(table.astype("<i4").tobytes())
        coder.encode(token, _model(stream, table))
        exact = logits.astype(np.float64)
        top = exact.max()
        entropy += (top + math.log(np.exp(exact - top).sum()) - exact[token]) / math.log(2)
        law.add(token)
    return Chunk(_finish(coder), checksum.digest()[:8], ids_crc(ids), float(entropy))


def decode_chunk(law: Law, chunk: Chunk, count: int) -> list[int] | None:
    """The ids of a chunk, None where the law does not come out as it was; then the law is spoilt.

    law: has read what stands before the chunk.
    """
    stream = need("constriction", "archive").stream
    words = np.frombuffer(chunk.code + bytes(-len(chunk.code) % 4), dtype=">u4")
    coder = stream.queue.RangeDecoder(words.astype(np.uint32))
    checksum = hashlib.sha256()
    ids: list[int] = []
    for _ in range(count):
        table = frequencies(law.logits())
        checksum.update(table.astype("<i4").tobytes())
        try:
            token = int(coder.decode(_model(stream, table)))
        except AssertionError:  # no state that an encoder with this law could have left
            return None
        ids.append(token)
        law.add(token)
    if checksum.digest()[:8] != chunk.checksum or ids_crc(ids) != chunk.crc:
        return None
    return ids


def _finish(coder: Any) -> bytes:
    """The bytes of a range encoder, as few as name its last interval; zeros are to follow them.

    The words before the coder's state are final; the state is the interval [lower, lower + width)
    of the next 64 bits.
    """
    code: bytes = np.asarray(coder.get_compressed()).astype(">u4").tobytes()
    final, (lower, width) = coder.pos()
    carried = lower + (1 << 32) - 1 >= 1 << 64  # into the final words, when the coder ended itself
    for zeros in range(64, 31, -8):
        point = -(-lower >> zeros) << zeros
        if point < lower + width and (point >= 1 << 64) == carried:
            return code[: 4 * final] + (point % (1 << 64)).to_bytes(8, "big")[: 8 - zeros // 8]
    return code


def _model(stream: Any, table: np.ndarray) -> Any:
    weights = (table - 1).astype(np.float32)
    return stream.model.Categorical(weights, perfect=False, lazy=True)


def pack_ids(ids: list[int], vocab: int) -> bytes:
    """Ids in ceil(log2 vocab) bits each.

    >>> pack_ids([1, 2, 3], vocab=4).hex()
    '6c'
    """
    width = _width(vocab)
    bits = np.asarray(ids, dtype=np.uint32)[:, None] >> np.arange(width - 1, -1, -1) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def unpack_ids(packed: bytes, count: int, vocab: int) -> list[int]:
    """The first `count` ids of `pack_ids`.

    >>> unpack_ids(bytes.fromhex("6c"), 3, vocab=4)
    [1, 2, 3]
    """
    width = _width(vocab)
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count * width)
    places = np.int64(1) << np.arange(width - 1, -1, -1)
    found: list[int] = (bits.reshape(count, width) @ places).tolist()
    return found


def packed_size(count: int, vocab: int) -> int:
    """Bytes that `pack_ids` makes of `count` ids."""
    return (count * _width(vocab) + 7) // 8


def _width(vocab: int) -> int:
    return max(1, (vocab - 1).bit_length())

"""Vocabulary files of other libraries, read into a `tokenizers.Tokenizer`.

**Ranks** (tiktoken, Mistral's tekken, Anthropic's): a regex cuts the text; inside a part, bytes are
joined pair by pair, the pair first whose bytes together have the lowest rank. Byte-level BPE does
the same with a list of merges, so each token gives one merge for every way to cut it into two
tokens, in the order of ranks; a part that is a token as it stands is taken whole.

**SentencePiece**: the protobuf is read by its wire format, with no library. Spaces become `▁`; BPE
joins the pair whose piece has the highest score, Unigram takes the best segmentation. Differences
that are known: the control symbols are added tokens, so they are found in text (the library finds
them only when asked); pieces marked as unused are not cut again.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from pertoken.byte_vocab import LETTERS, SPACE
from pertoken.errors import PertokenError

__all__ = [
    "PATTERNS",
    "from_claude",
    "from_ranks",
    "from_sentencepiece",
    "from_tekken",
    "is_ranks",
    "read_ranks",
]

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

PATTERNS = {
    "r50k": _GPT2,
    "p50k": _GPT2,
    "cl100k": _CL100K,
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen": _CL100K.replace("{1,3}", ""),
    "qwen3_": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""The regex that cuts the text, by the beginning of a .tiktoken file's name (the longest wins)."""


def read_ranks(content: bytes) -> dict[bytes, int]:
    """The tokens of a .tiktoken file (a line each: base64, blank, rank) and their ranks.

    >>> read_ranks(b"IQ== 0\\nISE= 1\\n")
    {b'!': 0, b'!!': 1}
    """
    ranks = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:  # binascii.Error is one
            raise PertokenError(
                f"line {number} is not a token in base64 and its rank: no .tiktoken file"
            ) from None
    if not ranks:
        raise PertokenError("the .tiktoken file is empty")
    return ranks


def from_ranks(
    ranks: Mapping[bytes, int],
    pattern: str,
    specials: Mapping[str, int],
    normalizer: Any = None,
) -> Tokenizer:
    """A byte-level BPE from the rank of every token, the regex that cuts, and special tokens.

    Raises PertokenError for a regex that does not compile or a token that cannot be built.
    """
    letters = {byte: letter for letter, byte in LETTERS.items()}
    spelled = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise PertokenError(f"the vocabulary lacks {len(missing)} of the 256 bytes: no ranks")
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:place], token[place:]) for place in range(1, len(token))]
        known = [(ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
        merges += [(spelled[a], spelled[b]) for _, _, a, b in sorted(known)]
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | dict(specials)
    backend = Tokenizer(BPE(vocab, merges, ignore_merges=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    try:
        cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # tokenizers raises the bare class
        raise PertokenError(f"the pattern is no regex: {error}") from None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    return backend


# Control tokens of the tekken files that do not list theirs, as their library has them.
_TEKKEN_V3 = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
]


def from_tekken(content: Mapping[str, Any]) -> Tokenizer:
    """Mistral's tekken JSON: the special tokens come first, then the tokens by rank."""
    config = content["config"]
    first = config["default_num_special_tokens"]
    listed = content.get("special_tokens")
    names = [entry["token_str"] for entry in listed] if listed else _TEKKEN_V3
    names = [*names, *(f"<SPECIAL_{number}>" for number in range(len(names), first))]
    kept = content["vocab"][: config["default_vocab_size"] - first]
    ranks = {base64.b64decode(entry["token_bytes"]): first + entry["rank"] for entry in kept}
    return from_ranks(ranks, config["pattern"], {name: place for place, name in enumerate(names)})


def from_claude(content: Mapping[str, Any]) -> Tokenizer:
    """Anthropic's JSON of 2023: ranks in one string. Its package brings text to NFKC first."""
    ranks: dict[bytes, int] = {}
    for line in content["bpe_ranks"].splitlines():
        _, first, *tokens = line.split()
        ranks |= {base64.b64decode(token): int(first) + at for at, token in enumerate(tokens)}
    return from_ranks(ranks, content["pat_str"], content["special_tokens"], normalizers.NFKC())


_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4


def from_sentencepiece(content: bytes) -> Tokenizer:
    """A SentencePiece model file, BPE or Unigram; PertokenError for another kind or other bytes."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normal: dict[int, Any] = {}
    try:
        for number, value in _fields(content):
            if number == 1:
                entry = dict(_fields(value))
                score = struct.unpack("<f", entry.get(2, bytes(4)))[0]
                pieces.append((entry[1].decode(), score, entry.get(3, _NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normal = dict(_fields(value))
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, struct.error):
        raise PertokenError("not a SentencePiece model: its bytes are no such protobuf") from None
    if not pieces:
        raise PertokenError("not a SentencePiece model: it holds no pieces")
    kind = trainer.get(3, 1)
    if kind not in (1, 2) or trainer.get(24):
        what = "with spaces behind words" if trainer.get(24) else "of words or characters"
        raise PertokenError(f"a SentencePiece model {what} is not read: only BPE and Unigram are")
    fallback = bool(trainer.get(35))
    unknown = next((at for at, piece in enumerate(pieces) if piece[2] == _UNKNOWN), None)
    model: Any
    if kind == 1:
        model = Unigram([piece[:2] for piece in pieces], unknown, byte_fallback=fallback)
    else:
        vocab = {piece: place for place, (piece, _, _) in enumerate(pieces)}
        name = None if unknown is None else pieces[unknown][0]
        model = BPE(
            vocab, _merges(pieces, vocab), unk_token=name, fuse_unk=True, byte_fallback=fallback
        )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(_normalizers(normal))
    ends = [decoders.ByteFallback(), decoders.Fuse()]
    if normal.get(3, 1):
        ends.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), *ends])
    backend.add_tokens(
        [
            AddedToken(piece, normalized=False, special=kind != _USER)
            for piece, _, kind in pieces
            if kind in (_UNKNOWN, _CONTROL, _USER)
        ]
    )
    return backend


def _merges(pieces: list[tuple[str, float, int]], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to cut a piece into two, best piece first."""
    whole = {piece: score for piece, score, kind in pieces if kind == _NORMAL}
    merges = []
    for piece in sorted(whole, key=whole.__getitem__, reverse=True):
        cuts = [(piece[:place], piece[place:]) for place in range(1, len(piece))]
        known = [(vocab[a], vocab[b], a, b) for a, b in cuts if a in whole and b in whole]
        merges += [(a, b) for _, _, a, b in sorted(known)]
    return merges


def _normalizers(normal: dict[int, Any]) -> list[Any]:
    """The steps before the pieces: the table of characters, fewer spaces, and `▁` for a space."""
    steps: list[Any] = [normalizers.Precompiled(normal[2])] if normal.get(2) else []
    if normal.get(4, 1):
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if normal.get(3, 1):
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: a whole number or bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        wire = key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if wire == 2:
            length, place = _varint(data, place)
        else:
            length = {1: 8, 5: 4}[wire]
        if place + length > len(data):
            raise ValueError("the message ends early")
        yield key >> 3, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7


def is_ranks(content: bytes) -> bool:
    """Whether a file begins as a .tiktoken file does."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content) is not None

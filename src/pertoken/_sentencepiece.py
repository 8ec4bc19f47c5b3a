"""How a tokenizer made from SentencePiece goes on behind a path.

The whole text is one piece, or each word with the space before it. Inside a piece a token must
stay apart from the token before under the merges (BPE), or be what the best segmentation ends with
(Unigram). A character that is in no piece is written as its bytes, which nothing is merged with.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pertoken._byte_level import _pairs
from pertoken._merges import MergeTable
from pertoken._path import Path
from pertoken._pieces_of_text import completions, dangling
from pertoken.byte_vocab import SPACE, ByteVocab, steps_of

__all__ = ["SentencePieceRules"]

Bools = npt.NDArray[np.bool_]


class SentencePieceRules:
    """SentencePiece with byte fallback; see `pertoken.canonical` for the methods."""

    def __init__(self, vocab: ByteVocab, backend: Any) -> None:
        model = vocab.parts["model"]
        self._vocab = vocab
        self._borders: _MergeBorders | _UnigramBorders
        if vocab.kind == "unigram":
            self._borders = _UnigramBorders(vocab, backend.model)
            pieces: Iterable[str] = (piece for piece, _ in model["vocab"])
        else:
            bytes_ = vocab.fallback.values()
            table = MergeTable(model["vocab"], _pairs(model["merges"]), bytes_, vocab.size)
            self._borders = _MergeBorders(table)
            pieces = model["vocab"]
        # A space is written as the sign for it, which itself cannot be written then.
        covered = {piece for piece in pieces if len(piece) == 1} | {" ", SPACE}
        self._covered = sorted(sign.encode(errors="ignore") for sign in covered)
        self._uncovered = lru_cache(maxsize=4096)(self._is_uncovered)
        splits = steps_of(vocab.parts["pre_tokenizer"], "pretokenizers")
        self._words = any(
            step["type"] == "Metaspace" and step.get("split", True) for step in splits
        )
        self._bytes = np.zeros(vocab.size, dtype=bool)
        self._bytes[list(vocab.fallback.values())] = True
        spelled = [part or b"" for part in vocab.token_bytes]
        self._inner_space = np.array([b" " in part[1:] for part in spelled])
        self._spaced = np.array([part[:1] == b" " for part in spelled])

    def row(self, path: Path, text: bytes) -> Bools:
        text = text[: path.end]
        count = dangling(text[path.segment :])
        rest = text[len(text) - count :] if count else b""
        allowed = np.zeros(self._vocab.size, dtype=bool)
        if not rest:
            first = self._borders.first()
            piece = text[path.starts[0][1] :]
            allowed |= self._borders.after(path, piece) if piece else first
            if self._words:
                allowed = np.where(self._spaced, first, allowed) & ~self._inner_space
            allowed &= ~self._bytes
        for byte, token in self._vocab.fallback.items():
            allowed[token] = self._uncovered(rest + bytes([byte]))
        return allowed

    def starts(self, path: Path, token: int, text: bytes) -> tuple[tuple[int, int], ...]:
        if self._words and text[path.end : path.end + 1] == b" ":
            return ((path.end, path.end),)
        return path.starts

    def complete(self, path: Path, text: bytes) -> bool:
        return True

    def _is_uncovered(self, start: bytes) -> bool:
        """Whether a character that begins with these bytes is in no piece."""
        points = completions(start)
        surrogates = max(0, min(points.stop, 0xE000) - max(points.start, 0xD800))
        low = bisect_left(self._covered, start)
        high = low
        while high < len(self._covered) and self._covered[high].startswith(start):
            high += 1
        return len(points) - surrogates > high - low


class _MergeBorders:
    def __init__(self, table: MergeTable) -> None:
        self._table = table

    def first(self) -> Bools:
        """The tokens that may begin a piece."""
        return self._table.reachable

    def after(self, path: Path, piece: bytes) -> Bools:
        """The tokens that may stand behind a path whose last piece is not empty."""
        return self._table.row(path.token)


class _UnigramBorders:
    """By encoding: Unigram weighs the whole piece. Each answer costs a pass over the vocabulary.

    The best segmentation of a text is, up to any place where it cuts, the best one up to there, so
    a token can follow iff encoding the piece with it adds just that token.
    """

    def __init__(self, vocab: ByteVocab, model: Any) -> None:
        self._vocab, self._model = vocab, model
        fallback = set(vocab.fallback.values())
        self._texts = [
            (token, (vocab.token_bytes[token] or b"").decode().replace(" ", SPACE))
            for token in vocab.order.tolist()
            if token not in vocab.added and token not in fallback
        ]
        self._behind = lru_cache(maxsize=64)(self._encode_all)

    def first(self) -> Bools:
        return self._behind("", ())

    def after(self, path: Path, piece: bytes) -> Bools:
        start = path.end - len(piece)
        ids = tuple(part.token for part in path.chain if part.end > start)
        return self._behind(piece.decode().replace(" ", SPACE), ids)

    def _encode_all(self, piece: str, ids: tuple[int, ...]) -> Bools:
        found = np.zeros(self._vocab.size, dtype=bool)
        for token, text in self._texts:
            encoded = [part.id for part in self._model.tokenize(piece + text)]
            found[token] = encoded == [*ids, token]
        return found

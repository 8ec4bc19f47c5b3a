"""How byte-level BPE goes on behind a path: the pre-tokenizer's cuts, and the merges between them.

A path can go on with a token iff some continuation makes the pre-tokenizer leave the token uncut,
and either cut before it, or leave it in the last piece, where it must stay apart from the token
before under the merges. A token that ends inside a character needs a character that both agree on,
and a token that needs a certain continuation a next token that gives it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from unicodedata import category

import numpy as np
import numpy.typing as npt

from pertoken._merges import MergeTable
from pertoken._path import Path
from pertoken._pieces_of_text import INSIDE, Cutter, dangling
from pertoken.byte_vocab import ByteVocab

__all__ = ["ByteLevelRules"]

Bools = npt.NDArray[np.bool_]

_KEPT = 512  # rows
_WIDTH = {0xC: 2, 0xD: 2, 0xE: 3, 0xF: 4}  # of a character, by the high half of its first byte


class ByteLevelRules:
    """Byte-level BPE; see `pertoken.canonical` for the methods."""

    def __init__(self, vocab: ByteVocab, backend: Any) -> None:
        model = vocab.parts["model"]
        self._vocab = vocab
        self._spelled = [spelled or b"" for spelled in vocab.token_bytes]
        self._merges = MergeTable(model["vocab"], _pairs(model["merges"]), size=vocab.size)
        self._cutter = Cutter(vocab, backend.pre_tokenizer)
        # With ignore_merges a piece that is a token is that token, whatever the merges make of it.
        self._whole = (
            frozenset(self._spelled) - {b""} if model.get("ignore_merges") else frozenset()
        )
        every = np.ones(vocab.size, dtype=bool)
        self._first = every if self._whole else self._merges.reachable
        self._never = ~every
        self._cut_off = [token for token, part in enumerate(self._spelled) if dangling(part)]
        self._inner = [t for t in vocab.order.tolist() if self._spelled[t][0] in INSIDE]
        self._signs = lru_cache(maxsize=65536)(self._finishing)
        self._rows: dict[Any, Bools] = {}

    def row(self, path: Path, text: bytes) -> Bools:
        text = text[: path.end]
        pieces = [(text[before:start], text[start:]) for before, start in path.starts]
        keys = [self._cutter.key(before, piece) for before, piece in pieces]
        closes = [self._closes(path, piece) for _, piece in pieces]
        asked = path.token, tuple(keys), tuple(closes)
        if asked in self._rows:
            return self._rows[asked]
        allowed, sure = (np.zeros(self._vocab.size, dtype=bool) for _ in range(2))
        rest = keys[0][2]
        unfinished = [*self._cut_off, *self._inner] if rest else self._cut_off
        for (_, piece), key, closed in zip(pieces, keys, closes, strict=True):
            cut, going, cut_end, going_end = self._cutter.next_tokens(*key)
            first, apart = self._borders(path, piece, closed)
            allowed |= (cut & first) | (going & apart)
            sure |= (cut_end & first) | (going_end & apart)
            for token in unfinished:
                if first[token] or apart[token]:
                    cuts, goes = self._ways(key, rest, token)
                    if (cuts and first[token]) or (goes and apart[token]):
                        allowed[token] = sure[token] = True
        for token in np.flatnonzero(allowed & ~sure).tolist():
            if self._spelled[token]:
                allowed[token] = self._leads_on(path, token, text + self._spelled[token])
        if len(self._rows) >= _KEPT:
            self._rows.clear()
        self._rows[asked] = allowed
        return allowed

    def starts(self, path: Path, token: int, text: bytes) -> tuple[tuple[int, int], ...]:
        found: list[tuple[int, int]] = []
        for before, start in path.starts:
            piece = text[start : path.end]
            key = self._cutter.key(text[before:start], piece)
            first, apart = self._borders(path, piece, self._closes(path, piece))
            cuts, goes = self._ways(key, key[2], token)
            if cuts and first[token]:
                found.append((start, path.end))
            if goes and apart[token]:
                found.append((before, start))
        settled = self._cutter.settled
        return tuple(
            dict.fromkeys(
                (start, start)
                if before == start or settled(text[before:start], text[start:])
                else (before, start)
                for before, start in found
            )
        )

    def complete(self, path: Path, text: bytes) -> bool:
        text = text[: path.end]
        return any(
            self._cutter.whole(text[before:start], text[start:])
            and self._closes(path, text[start:])
            for before, start in path.starts
        )

    def _borders(self, path: Path, piece: bytes, closed: bool) -> tuple[Bools, Bools]:
        """The tokens that may stand behind a cut, and those that may go on with the piece."""
        apart = self._merges.row(path.token) if piece else self._never
        return (self._first if closed else self._never), apart

    def _ways(self, key: tuple[str, str, bytes], rest: bytes, token: int) -> tuple[bool, bool]:
        """Whether the pre-tokenizer allows a token behind a cut, and without one."""
        part = rest + self._spelled[token]
        if not dangling(part):
            cut, going, *_ = self._cutter.next_tokens(*key)
            return bool(cut[token]), bool(going[token])
        cuts = goes = False
        for text in self._signs(part, token):
            found = self._cutter.finished(*key, text)
            cuts, goes = cuts or found[0], goes or found[1]
            if cuts and goes:
                break
        return cuts, goes

    def _closes(self, path: Path, piece: bytes) -> bool:
        """Whether the tokens of a piece are what the piece is encoded as when it is cut there."""
        return piece not in self._whole or len(self._spelled[path.token]) == len(piece)

    def _leads_on(self, path: Path, token: int, text: bytes) -> bool:
        """Whether a path with one token more can go on: it must, for its text cannot end there."""
        starts = self.starts(path, token, text)
        longer = Path(path, token, len(text), starts, path.segment, path.cut)
        following = np.flatnonzero(self.row(longer, text))
        return any(self._spelled[behind] for behind in following.tolist())

    def _finishing(self, part: bytes, token: int) -> tuple[str, ...]:
        """A text that ends inside a character, with each character that may come of it.

        One of each kind; none where the merges would not leave its last token as it is.
        """
        found: dict[str, str] = {}
        count = dangling(part)
        try:
            body = part[: len(part) - count].decode()
        except UnicodeDecodeError:
            return ()
        width = _WIDTH[part[-count] >> 4]
        for behind in self._inner:
            whole = part[-count:] + self._spelled[behind]
            if not self._merges.apart(token, behind):
                continue
            signs: tuple[str, ...] = ()
            if len(whole) < width:
                signs = self._signs(whole, behind)
            else:
                sign = whole[:width].decode(errors="ignore")
                signs = (sign,) if len(sign.encode()) == width else ()
            for sign in signs:
                # Unassigned ones are alike here, for there are too many.
                kind = "new" if category(sign) == "Cn" else self._cutter.kind(sign)
                found.setdefault(kind, sign)
        return tuple(body + sign for sign in found.values())


def _pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """Merges as pairs; older files have "a b"."""
    split = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in split]

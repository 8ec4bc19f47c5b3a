"""How byte-level BPE goes on behind a path: the pre-tokenizer's cuts, and the merges between them.

A path can go on with a token iff some continuation makes the pre-tokenizer leave the token uncut,
and either cut before it, or leave it in the last piece, where it must stay apart from the token
before under the merges. A token that ends inside a character needs a character that both agree on,
and a token that needs a certain continuation a next token that gives it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, TypeVar
from unicodedata import category

import numpy as np
import numpy.typing as npt

from pertoken._merges import MergeTable
from pertoken._path import Path
from pertoken._pieces_of_text import INSIDE, Cutter, completions, dangling
from pertoken.byte_vocab import ByteVocab

__all__ = ["ByteLevelRules"]

Bools = npt.NDArray[np.bool_]
_Question = tuple[int, tuple[tuple[str, str, bytes], ...], tuple[bool, ...]]
_Row = TypeVar("_Row")

_KEPT = 512  # rows
_DEEP = 4  # tokens looked ahead for one with which a text may end
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
        self._writes = np.array([bool(part) for part in self._spelled])
        self._cut_off = [token for token, part in enumerate(self._spelled) if dangling(part)]
        self._inner = [t for t in vocab.order.tolist() if self._spelled[t][0] in INSIDE]
        self._apart = lru_cache(maxsize=65536)(self._merges.apart)
        self._might = lru_cache(maxsize=65536)(self._might_be)
        self._known: dict[tuple[bytes, int], tuple[list[str], Iterator[str]]] = {}
        self._rows: dict[_Question, tuple[Bools, Bools]] = {}
        self._answers: dict[_Question, Bools] = {}

    def row(self, path: Path, text: bytes) -> Bools:
        text = text[: path.end]
        asked = self._question(path, text)
        if asked not in self._answers:
            allowed, sure = self._row(path, text, asked)
            unsure = np.flatnonzero(allowed & ~sure).tolist()
            allowed = allowed.copy()
            for token in unsure:
                allowed[token] = self._leads_on(path, token, text, _DEEP)
            return _remember(self._answers, asked, allowed)
        return self._answers[asked]

    def _question(self, path: Path, text: bytes) -> _Question:
        """All that the answer depends on; text: that of the path."""
        pieces = [(text[before:start], text[start:]) for before, start in path.starts]
        keys = tuple(self._cutter.key(before, piece) for before, piece in pieces)
        return path.token, keys, tuple(self._closes(path, piece) for _, piece in pieces)

    def _row(self, path: Path, text: bytes, asked: _Question) -> tuple[Bools, Bools]:
        """bool [size] twice: tokens that can follow if the right text follows them, and those
        with which the text may end, or the character that they begin."""
        if asked in self._rows:
            return self._rows[asked]
        _, keys, closes = asked
        allowed, sure = (np.zeros(self._vocab.size, dtype=bool) for _ in range(2))
        unfinished = [*self._cut_off, *self._inner] if keys[0][2] else self._cut_off
        for (_, start), key, closed in zip(path.starts, keys, closes, strict=True):
            cut, going, cut_end, going_end = self._cutter.next_tokens(*key)
            first, apart = self._borders(path, text[start:], closed)
            allowed |= (cut & first) | (going & apart)
            sure |= (cut_end & first) | (going_end & apart)
            for token in unfinished:
                if any(self._ways(key, token, bool(first[token]), bool(apart[token]), 1)):
                    allowed[token] = sure[token] = True
        allowed &= self._writes
        return _remember(self._rows, asked, (allowed, sure & allowed))

    def starts(self, path: Path, token: int, text: bytes) -> tuple[tuple[int, int], ...]:
        found: list[tuple[int, int]] = []
        for before, start in path.starts:
            piece = text[start : path.end]
            key = self._cutter.key(text[before:start], piece)
            first, apart = self._borders(path, piece, self._closes(path, piece))
            cuts, goes = self._ways(key, token, bool(first[token]), bool(apart[token]))
            if cuts:
                found.append((start, path.end))
            if goes:
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

    def _ways(
        self, key: tuple[str, str, bytes], token: int, first: bool, apart: bool, enough: int = 2
    ) -> tuple[bool, bool]:
        """Whether a token may stand behind a cut, and without one, of which `enough` are sought.

        first, apart: whether the merges allow it there.
        """
        part = key[2] + self._spelled[token]
        if not dangling(part):
            cut, going, *_ = self._cutter.next_tokens(*key)
            return first and bool(cut[token]), apart and bool(going[token])
        cuts = goes = False
        enough = min(enough, first + apart)
        for text in self._signs(part, token) if enough else ():
            cut_here, goes_here = self._cutter.finished(*key, text)
            cuts, goes = cuts or (first and cut_here), goes or (apart and goes_here)
            # Mostly one character will do; where not, there may be none among very many.
            if cuts + goes >= enough:
                break
            might_cut, might_go = self._might(key, part)
            if (cuts, goes) == (first and might_cut, apart and might_go):
                break
        return cuts, goes

    def _might_be(self, key: tuple[str, str, bytes], part: bytes) -> tuple[bool, bool]:
        """`Cutter.finished` for any character that the bytes at the end may become."""
        count = dangling(part)
        body = part[: len(part) - count].decode()
        signs = _samples(part[-count:])
        found = [self._cutter.finished(*key, body + sign) for sign in signs]
        return any(cut for cut, _ in found), any(going for _, going in found)

    def _kind(self, sign: str) -> str:
        # Unassigned ones are alike here, for there are too many.
        return "new" if category(sign) == "Cn" else self._cutter.kind(sign)

    def _closes(self, path: Path, piece: bytes) -> bool:
        """Whether the tokens of a piece are what the piece is encoded as when it is cut there."""
        return piece not in self._whole or len(self._spelled[path.token]) == len(piece)

    def _leads_on(self, path: Path, token: int, text: bytes, deep: int) -> bool:
        """Whether a path with one token more, whose text cannot end there, can go on."""
        text = text + self._spelled[token]
        starts = self.starts(path, token, text)
        if not starts or not deep:
            return False
        longer = Path(path, token, len(text), starts, path.segment, path.cut)
        allowed, sure = self._row(longer, text, self._question(longer, text))
        return bool(sure.any()) or any(
            self._leads_on(longer, behind, text, deep - 1)
            for behind in np.flatnonzero(allowed).tolist()
        )

    def _signs(self, part: bytes, token: int) -> Iterator[str]:
        """What `_finishing` yields, found once and only as far as it is asked for."""
        key = part, token
        if key not in self._known:
            self._known[key] = [], self._finishing(part, token)
        found, more = self._known[key]
        place = 0
        while True:
            if place == len(found):
                sign = next(more, None)
                if sign is None:
                    return
                found.append(sign)
            yield found[place]
            place += 1

    def _finishing(self, part: bytes, token: int) -> Iterator[str]:
        """A text that ends inside a character, with each character that may come of it.

        One of each kind; none where the merges would not leave its last token as it is.
        """
        count = dangling(part)
        try:
            body = part[: len(part) - count].decode()
        except UnicodeDecodeError:
            return
        kinds: set[str] = set()
        width = _WIDTH[part[-count] >> 4]
        for behind in self._inner:
            whole = part[-count:] + self._spelled[behind]
            if not self._apart(token, behind):
                continue
            signs: Iterable[str] = ()
            if len(whole) < width:
                signs = self._signs(whole, behind) if completions(whole) else ()
            else:
                sign = whole[:width].decode(errors="ignore")
                signs = (sign,) if len(sign.encode()) == width else ()
            for sign in signs:
                kind = self._kind(sign)
                if kind not in kinds:
                    kinds.add(kind)
                    yield body + sign


def _remember(known: dict[_Question, _Row], asked: _Question, row: _Row) -> _Row:
    """Keep a row, as long as the vocabulary; all are forgotten when there are too many."""
    if len(known) >= _KEPT:
        known.clear()
    known[asked] = row
    return row


@lru_cache(maxsize=4096)
def _samples(start: bytes) -> tuple[str, ...]:
    """One character of each category, and each blank, among those that begin with these bytes."""
    signs = (chr(point) for point in completions(start) if not 0xD800 <= point < 0xE000)
    return tuple({sign if sign.isspace() else category(sign): sign for sign in signs}.values())


def _pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """Merges as pairs; older files have "a b"."""
    split = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in split]

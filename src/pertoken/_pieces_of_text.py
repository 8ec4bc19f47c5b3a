"""Where a byte-level pre-tokenizer cuts text, asked for a whole vocabulary at once.

A pre-tokenizer cuts text into pieces from left to right; merges never cross a cut. Whether it cuts
before a place may hang on what follows ("a\\n\\nb" is cut after "a" and between the line breaks,
"a\\n\\n" only after "a"), so the question here is: is there a continuation with which the last
piece of a text and a next token come out uncut, or cut exactly between them?

It is answered by the pre-tokenizer itself, on one text for all that it cannot tell apart: its rules
name classes of characters, so characters of one class are replaced by one of them and long runs are
shortened. Rules that name letters otherwise than behind an apostrophe get no such treatment.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pertoken.byte_vocab import ByteVocab

__all__ = ["INSIDE", "Cutter", "completions", "dangling"]

INSIDE = bytes(range(0x80, 0xC0))  # the bytes of a character behind its first

Bools = npt.NDArray[np.bool_]

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SYNTAX = r"\\p\{\^?\w+\}|\\P\{\w+\}|\\[sSrntdDwW]|\(\?i:|\(\?[:!=]|\{\d+(?:,\d*)?\}|\(\?<[!=]"
_FOLLOWERS = (" ", "\n", "\t", "a", "A", "1", "!", "'", "/", "$", "\N{COMBINING ACUTE ACCENT}")


def dangling(text: bytes) -> int:
    """How many bytes at the end are the beginning of a character.

    >>> dangling(b"caf"), dangling("é".encode()), dangling("é".encode()[:1])
    (0, 0, 1)
    """
    for count in range(1, min(3, len(text)) + 1):
        byte = text[-count]
        if byte >= 0xC0:
            width = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return count if count < width else 0
        if byte < 0x80:
            return 0
    return 0


def completions(start: bytes) -> range:
    """Code points whose UTF-8 begins with some bytes (surrogates included); empty if none do.

    >>> [hex(point) for point in completions(b"\\xc3")][::63]
    ['0xc0', '0xff']
    >>> len(completions(b"\\xff")), len(completions(b"a"))
    (0, 1)
    """
    first = start[0]
    if first < 0x80:
        return range(first, first + 1) if len(start) == 1 else range(0)
    width, lowest = (2, 0x80) if first < 0xE0 else (3, 0x800) if first < 0xF0 else (4, 0x10000)
    if not 0xC2 <= first <= 0xF4 or len(start) > width:
        return range(0)
    if any(byte & 0xC0 != 0x80 for byte in start[1:]):
        return range(0)
    point = first & (0xFF >> (width + 1))
    for byte in start[1:]:
        point = point << 6 | byte & 0x3F
    free = 6 * (width - len(start))
    low, high = point << free, (point + 1) << free
    return range(max(low, lowest), max(max(low, lowest), min(high, 0x110000)))


class Cutter:
    """The pre-tokenizer of a byte-level tokenizer, for questions about next tokens."""

    def __init__(self, vocab: ByteVocab, pre_tokenizer: Any) -> None:
        self._vocab = vocab
        self._pre_tokenizer = pre_tokenizer
        pattern = "|".join(_patterns(vocab.parts["pre_tokenizer"]))
        bare = re.sub(_SYNTAX, "", pattern)
        letters = {letter for letter in bare if letter.isalpha()}
        self._known = letters <= set("sdmtlverSDMTLVER") and bare.isascii()
        self._literals = {sign for sign in bare if not sign.isalnum()}
        self._fine = re.search(r"\\p\{\^?[A-Z]\w", pattern) is not None
        counts = [
            int(count)
            for pair in re.findall(r"\{(\d+),?(\d*)\}", pattern)
            for count in pair
            if count
        ]
        self._run = max([1, *counts]) + 2
        self._stand_in: dict[str, str] = {}  # a class of characters to the one shown for it
        self._groups: dict[tuple[int, bool], _Groups] = {}
        self.next_tokens = lru_cache(maxsize=1024)(self._next_tokens)
        self.finished = lru_cache(maxsize=65536)(self._finished)

    def whole(self, before: bytes, piece: bytes) -> bool:
        """Whether two pieces are cut exactly between them when the text ends; before: or none."""
        return self._cuts((before + piece).decode()) == ([len(before.decode())] if before else [])

    def settled(self, before: bytes, piece: bytes) -> bool:
        """Whether there is a cut between two pieces whatever follows."""
        if dangling(piece):
            return False
        start, text = len(before.decode()), (before + piece).decode()
        return all(start in self._cuts(text + more) for more in ("", *self._behind(text)))

    def key(self, before: bytes, piece: bytes) -> tuple[str, str, bytes]:
        """What `next_tokens` needs to know of the last pieces: their classes of characters, and
        the bytes of an unfinished one."""
        count = dangling(piece)
        text = piece[: len(piece) - count].decode()
        first = before.decode()
        shown = self._shown(text, after_apostrophe="'" in first[-2:])
        return self._shown(first, after_apostrophe=False), shown, piece[len(piece) - count :]

    def _next_tokens(self, before: str, piece: str, rest: bytes) -> Bools:
        """bool [4, size]: tokens before which the text may be cut, those that go on with the piece,
        and of each kind those with which the text may end.

        A token comes after a cut, or goes on with the piece, if some continuation leaves it so and
        itself uncut, and the cut between `before` and `piece` in place. See `key`; with an empty
        piece, the beginning of a text, tokens are said to come after a cut. Tokens that end inside
        a character are left out, see `finished`.
        """
        apostrophe = "'" in (before + piece)[-2:]
        groups = self._group(len(rest), apostrophe)
        answers = np.zeros((4, len(groups.kinds) + 1), dtype=bool)  # the last: for no group
        for place, (head, text) in enumerate(groups.kinds):
            first = _decode(rest + head)
            if first is not None:
                text = self._shown(first, after_apostrophe=apostrophe) + text
                answers[:, place] = self._uncut(before, piece, text, bool(rest))
        return answers[:, groups.of_token]

    def _finished(self, before: str, piece: str, rest: bytes, text: str) -> tuple[bool, bool]:
        """As `next_tokens` for one token that ends inside a character.

        text: what the token writes, with the character that it begins.
        """
        apostrophe = "'" in (before + piece)[-2:]
        shown = self._shown(text, after_apostrophe=apostrophe)
        cut, going, *_ = self._uncut(before, piece, shown, bool(rest))
        return cut, going

    def _uncut(
        self, before: str, piece: str, text: str, joined: bool
    ) -> tuple[bool, bool, bool, bool]:
        """Whether some continuation leaves `text` uncut behind a piece, with and without a cut
        before it, and whether none at all does; joined: its first character began in the piece."""
        cut = going = cut_end = going_end = False
        kept, start = [len(before)] if before else [], len(before + piece)
        whole = before + piece + text
        empty = start == 0 and not joined
        for more in ("", *self._behind(whole)):
            inner = [at for at in self._cuts(whole + more) if at < len(whole)]
            going |= inner == kept and not empty
            cut |= inner == (kept if empty else [*kept, start]) and not joined
            if not more:
                cut_end, going_end = cut, going
            if cut and (going or empty):
                break
        return cut, going, cut_end, going_end

    def _behind(self, text: str) -> Sequence[str]:
        """What may follow a text, one for each way in which it can matter to cuts inside it.

        The known rules look past a place only to see blanks end or a contraction complete.
        """
        if self._known and text and not text[-1].isspace() and "'" not in text[-2:]:
            return ()
        return [*_FOLLOWERS, *("sle" if "'" in text[-2:] else "")]

    def _cuts(self, text: str) -> list[int]:
        """Places of a text where it is cut, without its beginning and end."""
        found = self._pre_tokenizer.pre_tokenize_str(text)
        return [start for _, (start, _) in found[1:]]

    def kind(self, sign: str) -> str:
        """What the rules can know of a character."""
        category = unicodedata.category(sign)
        # A character that is new to Python may not be new to the pre-tokenizer.
        if sign in self._literals or sign.isspace() or category in ("Cc", "Cn", "Zs", "Zl", "Zp"):
            return sign
        # Not to be taken for the kind of a letter that is its own.
        return (
            f"{'ascii ' if sign.isascii() else 'other '}{category if self._fine else category[0]}"
        )

    def _shown(self, text: str, *, after_apostrophe: bool) -> str:
        """The text with one character for each class and no run longer than the rules can count.

        after_apostrophe: whether letters that may belong to a contraction are to stay at the start.
        """
        if not self._known:
            return text
        signs: list[str] = []
        run, last, apostrophe = 0, "", 0 if after_apostrophe else -9
        for place, sign in enumerate(text):
            kind = self.kind(sign)
            if sign in "sdmtlverSDMTLVER" and place - apostrophe <= 2:
                kind = sign
            apostrophe = place if sign == "'" else apostrophe
            run = run + 1 if kind == last else 1
            last = kind
            if run <= self._run:
                signs.append(self._stand_in.setdefault(kind, sign))
        return "".join(signs)

    def _group(self, count: int, apostrophe: bool) -> _Groups:
        key = count, apostrophe
        if key not in self._groups:
            self._groups[key] = self._make_groups(count, apostrophe)
        return self._groups[key]

    def _make_groups(self, unfinished: int, apostrophe: bool) -> _Groups:
        """Sort the tokens that end with a whole character by what a cut can depend on.

        unfinished: bytes of a character before the token. How many are to come is not known from
        that: all bytes that may be its rest are taken for it.
        """
        kinds: dict[tuple[bytes, str], int] = {}
        of_token = np.full(self._vocab.size, -1, dtype=np.int64)
        for token, spelled in enumerate(self._vocab.token_bytes):
            if not spelled or token in self._vocab.added:
                continue
            head = len(spelled) - len(spelled.lstrip(INSIDE))
            if (head > 0) != (unfinished > 0) or dangling(spelled[head:]):
                continue
            body = _decode(spelled[head:])
            if body is not None:
                shown = self._shown(body, after_apostrophe=apostrophe and not head)
                of_token[token] = kinds.setdefault((spelled[:head], shown), len(kinds))
        return _Groups(list(kinds), of_token)


class _Groups(NamedTuple):
    """Tokens by (bytes that finish a character, text); of_token: [size], -1 for other tokens."""

    kinds: list[tuple[bytes, str]]
    of_token: npt.NDArray[np.int64]


def _decode(text: bytes) -> str | None:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


def _patterns(part: dict[str, Any]) -> list[str]:
    """The rules of a pre-tokenizer as regular expressions, as far as their letters matter."""
    if part["type"] == "Sequence":
        return [rule for step in part["pretokenizers"] for rule in _patterns(step)]
    if part["type"] == "ByteLevel":
        return [GPT2] if part["use_regex"] else []
    if part["type"] == "Split":
        kind, rule = next(iter(part["pattern"].items()))
        return [rule if kind == "Regex" else re.escape(rule)]
    return [r"\p{N}"] if part["type"] == "Digits" else [r"\p{P}"]

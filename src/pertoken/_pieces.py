"""The text of each token, in order: joined, the pieces are the text of all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["Detokenizer", "pieces", "special_ids"]

_CUT = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows bytes that are no whole character
_LONGEST = 8  # tokens; a character has four bytes at most, so after these it is really broken


class Detokenizer:
    """Turns ids into text one at a time, in constant time each.

    A token that ends inside a character is empty, and the one that completes it holds it. Each
    piece is the difference of two decodings with some ids before it, because some tokenizers drop
    a blank at the very beginning of what they decode.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # some shown ones, then those not shown yet
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        return self._take(final=len(self._ids) - self._shown >= _LONGEST)

    def flush(self) -> str:
        """What is left of an unfinished character."""
        return self._take(final=True) if self._shown < len(self._ids) else ""

    def _take(self, final: bool) -> str:
        text = self._text(self._ids)
        if text.endswith(_CUT) and not final:
            return ""
        piece = text[len(self._text(self._ids[: self._shown])) :]
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return piece

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip))


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that are no text: those with a role, and all others the tokenizer marks as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = (token for token, about in added.items() if about.special)
    return {*tokenizer.all_special_ids, *marked}


def pieces(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The text of each id.

    >>> from pertoken.testing import ByteTokenizer
    >>> pieces(ByteTokenizer(), ByteTokenizer().encode("aça"))
    ['a', '', 'ç', 'a']
    """
    reader = Detokenizer(tokenizer)
    found = [reader.push(token) for token in ids]
    if found:
        found[-1] += reader.flush()
    return found

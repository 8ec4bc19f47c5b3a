"""Words cut by a tokenizer: the pieces, and where in the word each of them ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pertoken.tokenize.load import as_fast

__all__ = ["BROKEN", "Cut", "backend_of", "cuts", "unknown_id"]

_SPACES = ("▁", "Ġ")  # how vocabularies write the space in front of a word
BROKEN = "\ufffd"  # a piece that is a part of a character, or an unknown token


@dataclass(frozen=True)
class Cut:
    """One word. pieces: as they stand in it, `BROKEN` where a token holds no whole character of it.

    ends: the place behind each piece, in characters; a cut inside one is a fraction.

    ids: its tokens, of which a space in front may be one more than the pieces.
    """

    pieces: tuple[str, ...]
    ends: tuple[float, ...]
    ids: tuple[int, ...]


def backend_of(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer; PertokenError for one that has none."""
    from tokenizers import Tokenizer

    # `as_fast` would copy it, which one with a pre-tokenizer written in Python cannot be.
    return tokenizer if isinstance(tokenizer, Tokenizer) else as_fast(tokenizer).backend_tokenizer


def cuts(tokenizer: Any, words: Sequence[str]) -> list[Cut]:
    """The words as they are cut behind a space, where words stand in text (our reading).

    A WordPiece does not see that space; a byte-level tokenizer does; one that puts a space of its
    own in front, as those of SentencePiece do, gets no second one. A token that holds nothing of
    the word is no piece of it.

    Raises PertokenError for a tokenizer without offsets that cannot be converted to one with them.

    >>> from pertoken.tokenize.train import train_tokenizer
    >>> cuts(train_tokenizer(["evler"], 257), ["ev"])[0].pieces
    ('e', 'v')
    """
    backend = backend_of(tokenizer)
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        alone = backend.encode("a", add_special_tokens=False).tokens
        space = "" if alone and alone[0].startswith(_SPACES) else " "
        found = backend.encode_batch([space + word for word in words], add_special_tokens=False)
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)
    unknown = unknown_id(backend)
    return [
        _cut(word, len(space), encoded.offsets, encoded.ids, unknown)
        for word, encoded in zip(words, found, strict=True)
    ]


def unknown_id(backend: Any) -> int:
    """The id of the unknown token; -1, which no token has, where there is none."""
    number = backend.token_to_id(getattr(backend.model, "unk_token", None) or "")
    return -1 if number is None else int(number)


def _cut(
    word: str, skip: int, offsets: Sequence[tuple[int, int]], ids: Sequence[int], unknown: int
) -> Cut:
    every = [(max(start - skip, 0), end - skip) for start, end in offsets]
    spans = [(start, end) for start, end in every if start < end]
    lost = [each == unknown for each, (start, end) in zip(ids, every, strict=True) if start < end]
    pieces: list[str] = []
    ends: list[float] = []
    inside = 0  # pieces so far of one character
    for number, (start, end) in enumerate(spans):
        following = spans[number + 1][0] if number + 1 < len(spans) else end
        shared = number > 0 and start < spans[number - 1][1]
        whole = not (shared or following < end or lost[number])
        pieces.append(word[start:end] if whole else BROKEN)
        inside = inside + 1 if following < end else 0
        # A character has four bytes at most, so three cuts inside it, at fourths of it.
        ends.append(end - 1 + inside / 4 if inside else end)
    return Cut(tuple(pieces), tuple(ends), tuple(ids))

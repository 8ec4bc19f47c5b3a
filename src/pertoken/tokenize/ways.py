"""All the ways in which tokens can write a text, and whether ids are the tokenizer's own way.

`encode` gives one encoding of a text, the *canonical* one; every other sequence of tokens that
writes the same bytes decodes to the same text, and a model may write it. How many there are is
counted from the end of the text:

    ways(len) = 1,   ways(i) = sum of ways(j) over the tokens that write text[i:j]

Whole numbers of Python, so that the counts are exact; encodings are listed and drawn by their rank
among them. "Say Anything but This" (arXiv 2601.14658) calls what follows from there being more than
one `phantom edits`; see `pertoken.probe.consistency`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from pertoken._pieces import pieces
from pertoken.byte_vocab import ByteVocab
from pertoken.errors import PertokenError

__all__ = ["Ways", "count_encodings", "encodings", "is_canonical", "noncanonical_share", "spans"]

_CUT = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows a character whose end is missing


class Ways:
    """The encodings of some bytes, numbered from 0 on: longer first tokens come first.

    count: how many there are. ends: for each place, how many ways there are to write the rest.

    >>> from pertoken.testing import tiny_tokenizer
    >>> ways = Ways(ByteVocab(tiny_tokenizer()), b"sat")
    >>> ways.count, ways.at(0) == tiny_tokenizer().encode("sat")
    (3, True)
    """

    def __init__(self, vocab: ByteVocab, text: bytes) -> None:
        self._arcs = [_arcs(vocab, text, place) for place in range(len(text))]
        self.ends = [0] * len(text) + [1]
        for place in reversed(range(len(text))):
            self.ends[place] = sum(self.ends[end] for _, end in self._arcs[place])
        self.count = self.ends[0]

    def at(self, rank: int) -> list[int]:
        """The encoding with this number, 0 to `count` - 1."""
        found: list[int] = []
        place = 0
        while place < len(self._arcs):
            for token, end in self._arcs[place]:
                if rank < self.ends[end]:
                    found.append(token)
                    place = end
                    break
                rank -= self.ends[end]
        return found

    def some(self, n: int, seed: int = 0) -> list[list[int]]:
        """All encodings if there are no more than `n`, else `n` different ones, each as likely."""
        if self.count <= n:
            return [self.at(rank) for rank in range(self.count)]
        draw, ranks = random.Random(seed), dict[int, None]()
        while len(ranks) < n:
            ranks[draw.randrange(self.count)] = None
        return [self.at(rank) for rank in ranks]


def _arcs(vocab: ByteVocab, text: bytes, start: int) -> list[tuple[int, int]]:
    """(token, end) of the tokens that write the text from `start` to `end`, the longest first."""
    found: list[tuple[int, int]] = []
    low, high = 0, len(vocab.order)
    for end in range(start + 1, len(text) + 1):
        low, high = vocab.range(text[start:end], low, high)
        if low == high:
            break
        same = vocab.exact(low, high, text[start:end])
        found += [(token, end) for token in vocab.order[low:same].tolist()]
    return found[::-1]


def encodings(text: str, tokenizer: Any, n: int = 10, *, seed: int = 0) -> list[list[int]]:
    """Encodings of a text, as lists of ids: all if there are at most `n`, else `n` drawn ones.

    tokenizer: a fast tokenizer with a byte view, or its `ByteVocab` where you ask often. All
    encodings are as likely to be drawn as any other, the canonical one among them; special tokens
    are in none. A SentencePiece tokenizer's blank before the text is written too.
    Raises PertokenError for a text that cannot be written, and for a tokenizer without a byte view.

    >>> from pertoken.testing import tiny_tokenizer
    >>> tokenizer = tiny_tokenizer()
    >>> ["|".join(map(tokenizer.decode, ids)) for ids in encodings("sat", tokenizer)]
    ['sat', 's|at', 's|a|t']
    """
    if n < 1:
        raise PertokenError(f"n must be 1 or more, got {n}")
    return _ways(text, tokenizer).some(n, seed)


def count_encodings(text: str, tokenizer: Any) -> int:
    """How many encodings a text has, exactly; arguments and errors as of `encodings`.

    >>> from pertoken.testing import tiny_tokenizer
    >>> count_encodings("sat", tiny_tokenizer())
    3
    """
    return _ways(text, tokenizer).count


def _ways(text: str, tokenizer: Any) -> Ways:
    vocab = tokenizer if isinstance(tokenizer, ByteVocab) else ByteVocab(tokenizer)
    try:
        spelled = text.encode()
    except UnicodeEncodeError as error:
        raise PertokenError(f"character {error.start + 1} of the text is a broken one") from None
    ways = Ways(vocab, vocab.start + spelled)
    if not ways.count:
        raise PertokenError(f"the tokenizer has no encoding of {text[:40]!r}")
    return ways


def is_canonical(ids: Sequence[int], tokenizer: Any) -> bool:
    """Whether the tokenizer itself writes these ids: encoding what they decode to gives them back.

    ids: of a whole text. Ids that end inside a character are never canonical.

    >>> from pertoken.testing import tiny_tokenizer
    >>> tokenizer = tiny_tokenizer()
    >>> [is_canonical(ids, tokenizer) for ids in encodings("sat", tokenizer)]
    [True, False, False]
    """
    return _own(ids, tokenizer) == [int(token) for token in ids]


def noncanonical_share(ids: Sequence[int], tokenizer: Any) -> float:
    """Share of tokens that the tokenizer would not have written where they stand; 0 for no ids.

    A token counts as the tokenizer's own where the canonical encoding of the whole text has the
    same token between the same characters (our reading). A last character that is cut off, as at a
    length limit, does not count.

    >>> from pertoken.testing import tiny_tokenizer
    >>> tokenizer = tiny_tokenizer()
    >>> noncanonical_share(tokenizer.encode("the the") + encodings("sat", tokenizer)[1], tokenizer)
    0.5
    """
    kept = [int(token) for token in ids]
    while kept and tokenizer.decode(kept).endswith(_CUT):
        kept.pop()
    if not kept:
        return 0.0
    own = _own(kept, tokenizer)
    canonical = set(zip(own, spans(own, tokenizer), strict=True))
    written = zip(kept, spans(kept, tokenizer), strict=True)
    return sum(each not in canonical for each in written) / len(kept)


def spans(ids: Iterable[int], tokenizer: Any) -> list[tuple[int, int]]:
    """The characters (start, end) that each id writes in the text of all; works without offsets.

    An id that ends inside a character has none, and stands where that character begins.
    """
    ends = list(accumulate(map(len, pieces(tokenizer, ids))))
    return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []


def _own(ids: Sequence[int], tokenizer: Any) -> list[int]:
    text = tokenizer.decode([int(token) for token in ids])
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]

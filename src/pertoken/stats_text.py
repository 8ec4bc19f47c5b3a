"""Small statistics of token sequences that several parts of the library show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = [
    "LOOPING_SHARE",
    "distinct_ngram_share",
    "repeated_4gram_share",
    "repeated_ngram_share",
]

LOOPING_SHARE = 0.30
"""An output with at least this share of repeated 4-grams counts as looping.

A small model that loops flatters every drafter that copies, so speed is shown twice: over all
outputs, and over those below this share.
"""


def repeated_ngram_share(ids: Sequence[int], n: int) -> float:
    """Share of the n-grams of `ids` that occurred before in `ids`, 0 (none) to almost 1.

    0.0 where `ids` is shorter than `n`.

    >>> repeated_ngram_share([1, 2, 1, 2, 1], n=2)
    0.5
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repeated_4gram_share(ids: Sequence[int]) -> float:
    """Share of the 4-grams of an output that occurred in it before.

    >>> repeated_4gram_share([1, 2, 3, 4, 5])
    0.0
    >>> repeated_4gram_share([7] * 10) > LOOPING_SHARE
    True
    """
    return repeated_ngram_share(ids, 4)


def distinct_ngram_share(texts: Iterable[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of several texts (distinct-n), 0 to 1; NaN without any.

    >>> distinct_ngram_share([[1, 2, 3], [1, 2, 4]], n=2)
    0.75
    """
    grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")

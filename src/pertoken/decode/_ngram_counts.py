"""Counts of n-grams of token ids: made by sorting, looked up by binary search.

An n-gram is one whole number, its ids as digits in base `vocab_size`. A table holds the distinct
n-grams in order with their counts, so that what was seen behind a context is a slice of it. Three
digits fit into 63 bits for every vocabulary below two million tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_ORDER", "Ngrams", "count"]

MAX_ORDER = 3
Ints = NDArray[np.int64]


class Ngrams:
    """The n-grams of one order. keys: distinct n-grams, sorted; counts: how often each was seen."""

    def __init__(self, order: int, vocab_size: int, keys: Ints, counts: Ints) -> None:
        self.order, self.vocab_size = order, vocab_size
        self.keys, self.counts = keys, counts
        # Contexts, where each one's n-grams begin, and how often it was seen.
        self._contexts, self._starts = np.unique(keys // vocab_size, return_index=True)
        self._totals = np.add.reduceat(counts, self._starts) if len(keys) else counts
        self._ends = np.append(self._starts[1:], len(keys))

    def behind(self, ids: Sequence[int]) -> tuple[Ints, Ints, int] | None:
        """Tokens seen behind the end of a text, their counts and the sum; None for an unseen end.

        ids: at least order - 1 ids, if there are so many.
        """
        end = ids[len(ids) - self.order + 1 :] if self.order > 1 else ()
        if len(end) < self.order - 1 or any(not 0 <= one < self.vocab_size for one in end):
            return None
        context = 0
        for one in end:
            context = context * self.vocab_size + one
        place = int(np.searchsorted(self._contexts, context))
        if place == len(self._contexts) or self._contexts[place] != context:
            return None
        part = slice(self._starts[place], self._ends[place])
        return self.keys[part] % self.vocab_size, self.counts[part], int(self._totals[place])

    def of(self, ids: Ints) -> tuple[Ints, Ints]:
        """For each token of a text [time]: count of its n-gram, and of its context; 0 is unseen."""
        grams = _keys(ids, self.order, self.vocab_size)
        short = np.zeros(len(ids) - len(grams), dtype=np.int64)
        seen = _look_up(self.keys, self.counts, grams)
        totals = _look_up(self._contexts, self._totals, grams // self.vocab_size)
        return np.concatenate((short, seen)), np.concatenate((short, totals))


def _look_up(keys: Ints, values: Ints, wanted: Ints) -> Ints:
    """The value of each wanted key, 0 where it is none."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def _keys(ids: Ints, order: int, vocab_size: int) -> Ints:
    """The n-grams of a text as numbers, [time - order + 1]; below 0 where an id is foreign."""
    found = np.zeros(max(0, len(ids) - order + 1), dtype=np.int64)
    foreign = np.zeros(len(found), dtype=bool)
    for digit in range(order):
        column = ids[digit : digit + len(found)]
        found = found * vocab_size + column
        foreign |= (column < 0) | (column >= vocab_size)
    return np.where(foreign, -vocab_size, found)


def count(texts: Sequence[Sequence[int]], vocab_size: int, orders: int) -> list[Ngrams]:
    """Count the n-grams of order 1 to `orders`; none reaches from one text into the next.

    >>> one, two = count([[1, 2, 1, 2], [3]], vocab_size=5, orders=2)
    >>> [part.tolist() for part in two.behind([1])[:2]]
    [[2], [2]]
    >>> two.behind([3]) is None
    True
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    total = int(lengths.sum())
    ids = np.fromiter((one for text in texts for one in text), dtype=np.int64, count=total)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(total)  # ids to the text's end
    found = []
    for order in range(1, orders + 1):
        grams = _keys(ids, order, vocab_size)
        inside = grams[left[: len(grams)] >= order]
        keys, counts = np.unique(inside, return_counts=True)
        found.append(Ngrams(order, vocab_size, keys, counts.astype(np.int64)))
    return found


def to_tensors(tables: Sequence[Ngrams]) -> dict[str, Any]:
    """The tables as named arrays, to be saved."""
    return {
        f"{name}{table.order}": array
        for table in tables
        for name, array in (("keys", table.keys), ("counts", table.counts))
    }


def from_tensors(arrays: dict[str, Any], vocab_size: int) -> list[Ngrams]:
    """The tables of `to_tensors`; KeyError or ValueError for arrays that are none."""
    found = []
    for order in range(1, len(arrays) // 2 + 1):
        keys, counts = arrays[f"keys{order}"], arrays[f"counts{order}"]
        if keys.shape != counts.shape or keys.ndim != 1 or (order == 1 and not len(keys)):
            raise ValueError("keys without counts")
        found.append(Ngrams(order, vocab_size, keys, counts))
    return found

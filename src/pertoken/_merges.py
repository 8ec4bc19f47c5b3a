"""Which tokens of a BPE vocabulary may stand side by side: exact, for the whole vocabulary at once.

Byte-pair encoding joins the adjacent pair of lowest rank until no pair is left. Two tokens a, b
stay apart iff no merge across their border comes before both are complete. Only the right edge of a
(a, its right half, the right half of that, ...) and the left edge of b can take part, and a part u
of an edge is there from its own merge until the merge of the part above it. So each pair (u, v) of
edge parts is compared with these times. A sequence of tokens is what BPE makes of its text iff each
token is reachable by itself and each adjacent pair stays apart.

Time here is the highest rank merged so far on that side: a merge of lower rank than an earlier one
(vocabularies from SentencePiece have such) follows at once, before the other side moves. Merges of
one rank happen from left to right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["MergeTable"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NEVER = np.int64(2**40)  # later than every merge


class MergeTable:
    """The merges of a BPE vocabulary.

    vocab: text of a token to its id; merges: pairs of texts, lowest rank first; symbols: ids that
    are there before any merge (all tokens of one character are).

    `reachable`: bool [size], the tokens that BPE makes of their own text.

    >>> table = MergeTable({"a": 0, "b": 1, "ab": 2, "ba": 3}, [("a", "b"), ("b", "a")])
    >>> table.apart(0, 1), table.apart(1, 0), table.apart(0, 3), table.apart(3, 0)
    (False, False, False, True)
    >>> table.row(1).tolist()                              # behind "b"
    [False, True, True, True]
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Iterable[tuple[str, str]],
        symbols: Iterable[int] = (),
        size: int | None = None,
    ) -> None:
        self.size = max(vocab.values()) + 1 if size is None else size
        table = {
            (vocab[left], vocab[right]): (rank, vocab[left + right])
            for rank, (left, right) in enumerate(merges)
        }
        count = len(table)
        left, right = (np.fromiter((pair[i] for pair in table), np.int64, count) for i in (0, 1))
        rank, made = (
            np.fromiter((value[i] for value in table.values()), np.int64, count) for i in (0, 1)
        )
        order = np.argsort(left * self.size + right)
        self._left_of_pair, self._right_of_pair = left[order], right[order]
        self._keys = left[order] * self.size + right[order]
        self._ranks = rank[order]
        self._rank = dict(zip(self._keys.tolist(), self._ranks.tolist(), strict=True))
        self.reachable = np.zeros(self.size, dtype=bool)
        # A token's halves at its last merge (-1: none), that merge's rank, the time of it, and the
        # highest rank merged between the making of the left half and of the token.
        self._left, self._right = (np.full(self.size, -1, np.int64) for _ in range(2))
        self._made_by, self._time = (np.full(self.size, -1, np.int64) for _ in range(2))
        self._after_left = np.full(self.size, -1, np.int64)
        self._depth = np.zeros(self.size, np.int64)  # of the left edge
        length = np.zeros(self.size, np.int64)
        for text, token in vocab.items():
            length[token] = len(text)
        self.reachable[length == 1] = True
        self.reachable[list(symbols)] = True
        self._derive(left, right, rank, made, length)
        self._levels = [
            np.flatnonzero(self._depth == depth) for depth in range(1, int(self._depth.max()) + 1)
        ]
        self.row = lru_cache(maxsize=512)(self._row)

    def apart(self, first: int, second: int) -> bool:
        """Whether two reachable tokens side by side stay as they are."""
        if not (self.reachable[first] and self.reachable[second]):
            return False
        u, u_end, u_last = first, int(NEVER), int(NEVER)
        while u >= 0:
            v, v_end, v_last = second, int(NEVER), int(NEVER)
            while v >= 0:
                rank = self._rank.get(u * self.size + v)
                if rank is not None:
                    times = int(self._time[u]), int(self._time[v])
                    if bool(_chosen(rank, *times, u_end, v_end, u_last, v_last)):
                        return False
                v_end, v_last = int(self._time[v]), int(self._after_left[v])
                v = int(self._left[v])
            u_end, u_last = int(self._time[u]), int(self._made_by[u])
            u = int(self._right[u])
        return True

    def _row(self, last: int) -> Bools:
        """bool [size]: the tokens that stay as they are behind `last`, and it before them."""
        if not self.reachable[last]:
            return np.zeros(self.size, dtype=bool)
        joined = np.zeros(self.size, dtype=bool)  # with the token itself
        inside = np.zeros(self.size, dtype=bool)  # with a lower part of its left edge
        u, u_end, u_last = last, int(NEVER), int(NEVER)
        while u >= 0:
            low, high = np.searchsorted(self._keys, [u * self.size, (u + 1) * self.size])
            rank = np.full(self.size + 1, NEVER)  # the last entry is for "no left half"
            rank[self._right_of_pair[low:high]] = self._ranks[low:high]
            at = self._right_of_pair[low:high]
            time = np.int64(self._time[u])
            joined[at] |= _chosen(rank[at], time, self._time[at], u_end, NEVER, u_last, NEVER)
            above = np.flatnonzero(rank[self._left] < NEVER)
            part = self._left[above]
            inside[above] |= _chosen(
                rank[part],
                time,
                self._time[part],
                u_end,
                self._time[above],
                u_last,
                self._after_left[above],
            )
            u_end, u_last = int(time), int(self._made_by[u])
            u = int(self._right[u])
        for level in self._levels:
            inside[level] |= inside[self._left[level]]
        return self.reachable & ~joined & ~inside

    def _derive(self, left: Ints, right: Ints, rank: Ints, made: Ints, length: Ints) -> None:
        """Find the last merge of every token, shorter tokens first."""
        lengths = length[made]
        order = np.argsort(lengths, kind="stable")
        steps = np.flatnonzero(np.diff(lengths[order])) + 1
        for group in np.split(order, steps):
            group = group[self.reachable[left[group]] & self.reachable[right[group]]]
            group = group[~self._cross(left[group], right[group])]
            token, a, b = made[group], left[group], right[group]
            self.reachable[token] = True
            self._left[token], self._right[token] = a, b
            self._made_by[token] = rank[group]
            time = np.maximum(np.maximum(self._time[a], self._time[b]), rank[group])
            self._time[token] = time
            tie = (self._time[a] == time) & (self._time[b] == time)
            self._after_left[token] = np.where(tie, time, rank[group])
            self._depth[token] = self._depth[a] + 1

    def _cross(self, first: Ints, second: Ints) -> Bools:
        """bool [pairs]: whether a merge crosses the border before both tokens are complete."""
        found = np.zeros(len(first), dtype=bool)
        rows, u = np.arange(len(first)), first
        u_end = u_last = np.full(len(first), NEVER)
        top = True
        while len(rows):
            at, v = np.arange(len(rows)), second[rows]
            v_end = v_last = np.full(len(rows), NEVER)
            whole = top
            while len(at):
                if not whole:
                    rank = self._rank_of(u[at], v)
                    times = self._time[u[at]], self._time[v]
                    found[rows[at]] |= _chosen(rank, *times, u_end[at], v_end, u_last[at], v_last)
                whole = False
                going = self._left[v] >= 0
                at, v = at[going], v[going]
                v_end, v_last, v = self._time[v], self._after_left[v], self._left[v]
            going = (self._right[u] >= 0) & ~found[rows]
            rows, u = rows[going], u[going]
            u_end, u_last, u = self._time[u], self._made_by[u], self._right[u]
            top = False
        return found

    def _rank_of(self, left: Ints, right: Ints) -> Ints:
        keys = left * self.size + right
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._ranks[at], NEVER)


def _chosen(
    rank: Ints | np.int64 | int,
    u_time: Ints | np.int64 | int,
    v_time: Ints | np.int64 | int,
    u_end: Ints | np.int64 | int,
    v_end: Ints | np.int64 | int,
    u_last: Ints | np.int64 | int,
    v_last: Ints | np.int64 | int,
) -> Bools:
    """Whether the pair (u, v) across the border is merged while both are there.

    rank: of the pair; time, end: when a part is made and when it is used up; last: the highest rank
    merged on its side between the two. Where a part is made and used up at one time, only `last`
    tells what comes in between; on equal times the left side moves first.
    """
    begin, end = np.maximum(u_time, v_time), np.minimum(u_end, v_end)
    right_ends = (v_end == end) & (u_end > end)
    open_time = (begin < end) & ((rank < end) | ((rank == end) & right_ends))
    at_once = begin == end
    by_left = at_once & (u_time == end) & (u_end == end) & (v_time < end) & (rank < u_last)
    limit = np.where(np.equal(v_time, end), v_last, end)
    by_right = at_once & right_ends & (rank <= limit)
    return np.asarray((rank < NEVER) & (open_time | by_left | by_right))

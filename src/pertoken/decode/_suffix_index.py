"""Counts of every short substring of several growing token sequences, as a compressed suffix tree.

The tree holds, for every position of every sequence, the substring of at most ``max_depth``
tokens that starts there. A node's count is the number of such substrings that run through it.
Three ideas keep it small and quick in plain Python:

* path compression: a node stores a stretch ``text[begin:end]`` of one sequence, not one token;
* a leaf that only one substring runs through is left *open*: it ends where its sequence ends, so
  it grows by itself and costs nothing per token;
* only the substrings that end inside the tree (their text has been seen elsewhere too) are kept
  in a list, ``ends``, and walked one token further by every append.

Children are kept in the order in which suffix decoding's own implementation keeps them (most
frequent first; see `_raise`), because the order decides between equally frequent continuations.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import islice
from struct import Struct

import numpy as np

_FLOAT = Struct("f")


class IndexedSequence:
    """One sequence of the index: its tokens and the nodes where its newest substrings end."""

    __slots__ = ("ends", "growing", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ends: deque[_Node] = deque()  # longest substring first; all of them end at the end
        self.growing = True


class _Node:
    __slots__ = ("begin", "children", "count", "end", "order", "parent", "sequence")

    def __init__(
        self, count: int, sequence: IndexedSequence, begin: int, end: int, parent: _Node | None
    ) -> None:
        self.count = count
        self.sequence = sequence
        self.begin = begin
        self.end = end  # an open leaf's end may lie behind the end of its sequence
        self.parent = parent
        self.children: dict[int, _Node] = {}
        self.order: list[_Node] = []

    def stop(self) -> int:
        return min(self.end, len(self.sequence.tokens))

    def length(self) -> int:
        return min(self.end, len(self.sequence.tokens)) - self.begin

    def first(self) -> int:
        return self.sequence.tokens[self.begin]


@dataclass(slots=True)
class SuffixDraft:
    """Drafted tokens; `parents` are indices into `tokens`, -1 for the root."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)  # of the whole path to the token
    score: float = 0.0  # sum of the probabilities = expected number of accepted tokens
    match_length: int = 0


class SuffixIndex:
    """Suffix tree over several sequences that grow, finish and are removed again.

    >>> index = SuffixIndex(max_depth=8)
    >>> sequence = index.new_sequence()
    >>> index.extend(sequence, [1, 2, 3, 1, 2])
    >>> index.count([1, 2]), index.count([2, 3]), index.count([3, 3])
    (2, 1, 0)
    >>> index.draft([1, 2], limit=4, factor=2.0).tokens
    [3, 1]
    """

    def __init__(self, max_depth: int = 64) -> None:
        self.max_depth = max_depth
        self._root = _Node(0, IndexedSequence(), 0, 0, None)  # its `order` stays empty: unused
        self._met: list[tuple[IndexedSequence, _Node]] = []

    def new_sequence(self) -> IndexedSequence:
        """An empty sequence that `append` and `extend` fill."""
        return IndexedSequence()

    def extend(self, sequence: IndexedSequence, tokens: Iterable[int]) -> None:
        """Append several tokens to a sequence."""
        for token in tokens:
            self.append(sequence, token)

    def finish(self, sequence: IndexedSequence) -> None:
        """Keep the sequence's counts but promise that it never grows again."""
        sequence.growing = False
        sequence.ends.clear()

    def append(self, sequence: IndexedSequence, token: int) -> None:
        """Append one token to a sequence and count the substrings that now end with it."""
        root, ends, tokens = self._root, sequence.ends, sequence.tokens
        position = len(tokens)
        ends.append(root)
        if len(ends) > self.max_depth:
            ends.popleft()
        tokens.append(token)
        start = position + 1 - len(ends)
        still: deque[_Node] = deque()
        for node in ends:
            child = node.children.get(token)
            if child is not None:
                if node is not root and node.count == child.count + 1:
                    still.append(self._pull_up(node, child, sequence))
                else:
                    still.append(self._step_into(node, child, sequence))
            elif node.count == 1 and node is not root:
                # Removals left this substring alone on its path: it is an open leaf again.
                node.begin = position - node.length()
                node.sequence, node.end = sequence, start + self.max_depth
            else:
                leaf = _Node(1, sequence, position, start + self.max_depth, node)
                node.children[token] = leaf
                if node is not root:
                    node.order.append(leaf)
            start += 1
        sequence.ends = still
        # Leaves that were open and that we stepped onto exactly at their sequence's end: those
        # substrings are no longer alone, so their sequences have to walk them from now on.
        while self._met:
            other, node = self._met.pop()
            other.ends.appendleft(node)

    def remove(self, sequence: IndexedSequence) -> None:
        """Take every substring of a sequence out of the counts."""
        tokens = sequence.tokens
        for start in range(len(tokens)):
            node, position = self._root, start
            stop = min(len(tokens), start + self.max_depth)
            while position < stop:
                child = node.children[tokens[position]]
                if child.count == 1:
                    del node.children[tokens[position]]
                    if node is not self._root:
                        node.order.remove(child)
                    break
                position += child.length()
                self._lower(node, child)
                node = child
            if node is not self._root and len(node.order) == 1:
                (child,) = node.order
                if child.count == node.count:
                    child.begin -= node.length()
                    self._swap(node, child)
        sequence.growing = False
        sequence.ends.clear()

    def count(self, text: Sequence[int]) -> int:
        """How often a text of at most ``max_depth`` tokens occurs."""
        node, _ = self._locate(list(text))
        return 0 if node is None else node.count

    def draft(
        self,
        context: Sequence[int],
        limit: int,
        factor: float = 1.0,
        offset: float = 0.0,
        min_probability: float = 0.1,
        tree: bool = False,
        max_depth: int | None = None,
        beat: float = 0.0,
        sequence: IndexedSequence | None = None,
    ) -> SuffixDraft:
        """The draft with the greatest score over all match lengths; ties go to the longer match.

        Args:
            context: tokens to continue; only the last ``max_depth`` are looked at.
            limit: most tokens to draft.
            factor, offset: at most ``factor * match length + offset`` tokens are drafted.
            min_probability: paths less probable than this are not drafted.
            tree: draft a tree (most probable paths first) instead of one chain.
            max_depth: greatest depth of a drafted token.
            beat: an empty draft is returned unless one scores more than this.
            sequence: the sequence that ends as the context does, where there is one: same
                drafts, but its matches need not be searched.
        """
        context = list(context[-self.max_depth :])
        min_probability = _single(min_probability)
        room = limit if max_depth is None else max_depth
        best = SuffixDraft(score=beat)
        for match_length, node, covered in reversed(list(self._matches(context, sequence))):
            allowed = min(limit, int(match_length * factor + offset + 1e-6))
            if allowed <= best.score:
                break  # a score is at most its number of tokens: shorter matches cannot win
            if tree:
                draft = _draft_tree(node, covered, allowed, min_probability, room)
            else:
                draft = _draft_chain(node, covered, min(allowed, room), min_probability)
            if draft.score > best.score:
                best = draft
                best.match_length = match_length
        return best if best.tokens else SuffixDraft()

    def _matches(
        self, context: list[int], sequence: IndexedSequence | None
    ) -> Iterator[tuple[int, _Node, int]]:
        """(match length, node, tokens covered of it) for all last tokens found, shortest first."""
        known = 0
        if sequence is not None and sequence.growing:
            for node in islice(reversed(sequence.ends), max(0, len(context) - 1)):
                known += 1
                yield known, node, node.length()
            if known < len(sequence.tokens):
                return  # longer matches are the sequence's own end, with nothing behind it
        for match_length in range(known + 1, len(context)):
            found, covered = self._locate(context[-match_length:])
            if found is None:
                return
            if not found.order and found.begin + covered == found.stop():
                return  # nothing behind it, and so nothing behind longer matches either
            yield match_length, found, covered

    def _locate(self, text: list[int]) -> tuple[_Node | None, int]:
        """Node in whose stretch the text ends, and how many of its tokens the text covers."""
        node, position, covered = self._root, 0, 0
        while position < len(text):
            child = node.children.get(text[position])
            if child is None:
                return None, 0
            covered = min(child.length(), len(text) - position)
            stretch = child.sequence.tokens[child.begin : child.begin + covered]
            if covered > 1 and stretch != text[position : position + covered]:
                return None, 0
            node = child
            position += covered
        return node, covered

    def _pull_up(self, node: _Node, child: _Node, sequence: IndexedSequence) -> _Node:
        """Lengthen `node` by the first token of its only child; all that pass it now go there."""
        position = len(sequence.tokens)
        begin = position - node.length() - 1
        if child.length() > 1:
            del node.children[child.first()]
            child.begin += 1
            node.children[child.first()] = child
            kept = node
        else:
            self._meet(child)
            kept = child
        kept.sequence, kept.begin, kept.end = sequence, begin, position
        if kept is child:
            child.count = node.count
            self._swap(node, child)
        return kept

    def _step_into(self, node: _Node, child: _Node, sequence: IndexedSequence) -> _Node:
        """Walk from the end of `node` over the first token of `child`, which ends a node then."""
        if child.length() == 1:
            self._meet(child)
            child.end = child.begin + 1
            kept = child
        else:
            position = len(sequence.tokens)
            kept = _Node(child.count, sequence, position - 1, position, node)
            self._swap(child, kept)
            child.begin += 1
            child.parent = kept
            kept.children[child.first()] = child
            kept.order.append(child)
        self._raise(node, kept)
        return kept

    def _meet(self, leaf: _Node) -> None:
        """Note an open leaf whose whole text we have just walked, if it can still grow."""
        if leaf.end > len(leaf.sequence.tokens) and leaf.sequence.growing:
            self._met.append((leaf.sequence, leaf))

    def _swap(self, old: _Node, new: _Node) -> None:
        """Put `new` in the place of `old` under its parent; both begin with the same token."""
        parent = old.parent
        assert parent is not None
        new.parent = parent
        parent.children[new.first()] = new
        if parent is not self._root:
            parent.order[parent.order.index(old)] = new

    def _raise(self, parent: _Node, child: _Node) -> None:
        """Count one more substring through `child` and keep the siblings in order.

        The first of those with count c goes to the front of those with c + 1, any other to
        their back: the order that the linked lists of the published implementation produce.
        """
        order, count = parent.order, child.count
        if len(order) > 1:
            place = order.index(child)
            before = order[place - 1].count if place else count + 2
            if before <= count + 1:
                target = bisect_left(order, -before, key=_by_count)
                del order[place]
                order.insert(target, child)
        child.count = count + 1

    def _lower(self, parent: _Node, child: _Node) -> None:
        """Count one substring less through `child`: it goes to the front of its new equals."""
        order, count = parent.order, child.count
        if len(order) > 1:
            place = order.index(child)
            target = bisect_left(order, -(count - 1), key=_by_count)
            order.insert(target, child)
            del order[place]
        child.count = count - 1


def _by_count(node: _Node) -> int:
    return -node.count


# Scores are compared for equality, and 2/3 + 2/3 + 2/3 is two or not depending on the precision:
# single precision here makes ties fall as they do in the published implementation.
def _single(value: float) -> float:
    rounded: float = _FLOAT.unpack(_FLOAT.pack(value))[0]
    return rounded


def _single_sum(values: list[float]) -> float:
    if not values or values[0] == values[-1] == 1.0:
        return float(len(values))  # probabilities fall along a draft: all of them are one
    return float(np.cumsum(np.array(values, dtype=np.float32))[-1])


def _draft_chain(node: _Node, offset: int, limit: int, min_probability: float) -> SuffixDraft:
    """Follow the most frequent child."""
    draft = SuffixDraft()
    probability = 1.0
    tokens, probabilities = draft.tokens, draft.probabilities
    while len(tokens) < limit and probability >= min_probability:
        begin = node.begin + offset
        stretch = node.sequence.tokens[begin : min(node.stop(), begin + limit - len(tokens))]
        tokens.extend(stretch)
        probabilities.extend([probability] * len(stretch))
        if not node.order:
            break
        child = node.order[0]
        if child.count != node.count:
            probability = _single(probability * _single(child.count / node.count))
        node, offset = child, 0
    draft.parents.extend(range(-1, len(tokens) - 1))
    draft.score = _single_sum(probabilities)
    return draft


def _draft_tree(
    node: _Node, offset: int, limit: int, min_probability: float, max_depth: int
) -> SuffixDraft:
    """Take the most probable continuation again and again, whichever branch it is on."""
    draft = SuffixDraft()
    serial = 0
    heap: list[tuple[float, int, _Node, int, int, int]] = [(-1.0, serial, node, offset, -1, 0)]
    while heap and len(draft.tokens) < limit:
        negative, _, node, offset, parent, depth = heappop(heap)
        if depth == max_depth:
            continue
        if offset < node.length():
            draft.tokens.append(node.sequence.tokens[node.begin + offset])
            draft.parents.append(parent)
            draft.probabilities.append(-negative)
            serial += 1
            here = len(draft.tokens) - 1
            heappush(heap, (negative, serial, node, offset + 1, here, depth + 1))
            continue
        for child in node.order:
            probability = _single(_single(-negative * child.count) / node.count)
            if probability < min_probability:
                break
            serial += 1
            heappush(heap, (-probability, serial, child, 0, parent, depth))
    draft.score = _single_sum(draft.probabilities)
    return draft

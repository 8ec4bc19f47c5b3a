"""What the text and the model's own logits say about the next token: the sources of drafts.

`Successors` remembers the model's best guesses behind short contexts, from every forward pass, the
rejected nodes included. `Places` finds where the last tokens stood before. `Continuations` counts
what followed them. All are plain dictionaries: a step looks up some dozens of entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from pertoken.decode.topk import NodeLogits
from pertoken.decode.tree import TokenTree

LIMIT = 65_536
"""Contexts remembered per tier, about 100 MB in all."""

Guess = tuple[list[int], list[float]]  # ids and scores, best first


class Successors:
    """Top-`k` tables of the model's logits, by the last 1 … `orders` tokens.

    Scores are the softmax over the k kept logits, so they sum to 1 within the k. A context seen
    again is overwritten: the last pass, and within a pass the last node, wins. Beyond `limit`
    contexts of one length the half that was met first is forgotten.
    """

    def __init__(self, k: int = 10, orders: int = 2, limit: int = LIMIT) -> None:
        self.k = k
        self.limit = limit
        self.tiers: list[dict[tuple[int, ...], Guess]] = [{} for _ in range(orders)]

    def after(self, tail: Sequence[int]) -> tuple[int, list[int], list[float]]:
        """(tier, ids, scores) behind the longest known context at the end of `tail`; tier 0: none.

        tail: the last tokens of the text, at least as many as the longest tier if there are.
        """
        for order in range(min(len(self.tiers), len(tail)), 0, -1):
            found = self.tiers[order - 1].get(tuple(tail[-order:]))
            if found is not None:
                return order, *found
        return 0, [], []

    def write_text(self, tokens: Sequence[int], logits: NodeLogits, previous: int | None) -> None:
        """Take the logits of consecutive tokens; previous: the token before the first."""
        before = [] if previous is None else [previous]
        text = [*before, *tokens]
        shift = len(before)
        for i, guess in enumerate(self._guesses(logits)):
            for order in range(1, min(len(self.tiers), i + shift + 1) + 1):
                end = i + shift + 1
                self._write(order, tuple(text[end - order : end]), guess)

    def write_tree(self, tree: TokenTree, logits: NodeLogits, tail: Sequence[int]) -> None:
        """Take the logits of all nodes of a tree; tail: text up to and including its root.

        A node's context runs through its ancestors. With a tail of one token the root is noted by
        that token alone.
        """
        longest = len(self.tiers)
        tails: list[tuple[int, ...]] = []
        for node, guess in enumerate(self._guesses(logits)):
            parent = tree.parents[node]
            if parent < 0:
                context = tuple(tail[-longest:])
            else:
                context = (*tails[parent], tree.tokens[node])[-longest:]
            tails.append(context)
            for order in range(1, len(context) + 1):
                self._write(order, context[-order:], guess)

    def _write(self, order: int, context: tuple[int, ...], guess: Guess) -> None:
        tier = self.tiers[order - 1]
        tier[context] = guess
        if len(tier) > self.limit:
            for old in list(islice(tier, self.limit // 2)):
                del tier[old]

    def _guesses(self, logits: NodeLogits) -> list[Guess]:
        ids, values = logits.top(self.k)
        scores = values.softmax(-1)
        return list(zip(ids.tolist(), scores.tolist(), strict=True))

    def state(self) -> list[Any]:
        """As plain lists, for saving."""
        return [[[list(key), *guess] for key, guess in tier.items()] for tier in self.tiers]

    def load(self, state: list[Any]) -> None:
        """Take over what `state` returned."""
        self.tiers = [
            {tuple(key): (list(ids), list(scores)) for key, ids, scores in tier} for tier in state
        ]


class Places:
    """Where every n-gram of a growing text first stood, and whether it always went on alike.

    >>> places = Places((3, 2))
    >>> places.extend([1, 2, 3, 4, 1, 2, 3])
    >>> places.find([1, 2, 3])       # (position behind the first occurrence, always the same next)
    (3, False)
    >>> places.extend([4, 1, 2, 3])
    >>> places.find([1, 2, 3])       # occurrences count once a token stands behind them
    (3, True)
    """

    def __init__(self, lengths: Sequence[int] = (5, 4, 3)) -> None:
        self.lengths = tuple(lengths)
        self.text: list[int] = []
        self._found: dict[tuple[int, ...], list[int]] = {}  # first end, count, 1 if unanimous

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        text = self.text
        for token in tokens:
            end = len(text)
            for length in self.lengths:
                if end >= length:
                    known = self._found.setdefault(tuple(text[end - length : end]), [end, 0, 1])
                    known[1] += 1
                    if known[0] < end and text[known[0]] != token:
                        known[2] = 0
            text.append(token)

    def find(self, tail: Sequence[int]) -> tuple[int, bool]:
        """Longest n-gram first: (position of the token behind its first place, or -1; consensus).

        Consensus: it occurred at least twice and the same token followed every time.
        """
        for length in self.lengths:
            if len(tail) >= length:
                known = self._found.get(tuple(tail[-length:]))
                if known is not None:
                    return known[0], known[1] >= 2 and bool(known[2])
        return -1, False


class Continuations:
    """Counts of what followed the last 1 … `longest` tokens in a growing text.

    >>> counts = Continuations(longest=2)
    >>> counts.extend([1, 2, 3, 1, 2, 4, 1, 2])
    >>> counts.after((1, 2))                       # latest first
    (2, {4: 1, 3: 1}, 5)
    """

    def __init__(self, longest: int = 8) -> None:
        self.longest = longest
        self.text: list[int] = []
        # context -> (token: count, kept in order of last use; position of the latest one)
        self._after: list[dict[tuple[int, ...], tuple[dict[int, int], list[int]]]] = [
            {} for _ in range(longest)
        ]

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        text = self.text
        for token in tokens:
            end = len(text)
            for length in range(1, min(self.longest, end) + 1):
                key = tuple(text[end - length : end])
                counts, latest = self._after[length - 1].setdefault(key, ({}, [end]))
                counts[token] = counts.pop(token, 0) + 1
                latest[0] = end
            text.append(token)

    def after(
        self, tail: Sequence[int], longest: int | None = None
    ) -> tuple[int, dict[int, int], int]:
        """(length of the longest known context, counts by token latest first, latest position)."""
        for length in range(min(longest or self.longest, len(tail)), 0, -1):
            known = self._after[length - 1].get(tuple(tail[-length:]))
            if known is not None:
                return length, dict(reversed(known[0].items())), known[1][0]
        return 0, {}, -1

    def agreement(self, position: int, cap: int = 32) -> int:
        """How many tokens before `position` equal the end of the text."""
        text, end = self.text, len(self.text)
        count = 0
        while count < cap and position - 1 - count >= 0:
            if text[position - 1 - count] != text[end - 1 - count]:
                break
            count += 1
        return count

"""Honest probabilities for drafted edges: estimate each by its kind, learn from every verification.

An *edge* is a drafted token given that everything above it was accepted. Drafters give every edge
a key (what kind of guess it is); the calibrator counts how often edges of that kind are accepted.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from pertoken.decode.budget import Calibrator
from pertoken.decode.tree import TokenTree


def bucket(number: int) -> int:
    """1, 2, 3, 4 stay apart; then 5-8, 9-16, 17-32 and more share a bucket.

    >>> [bucket(n) for n in (1, 4, 5, 8, 9, 64)]
    [1, 4, 5, 5, 6, 8]
    """
    return number if number <= 4 else min(8, 2 + (number - 1).bit_length())


class EdgeBook:
    """Adds drafted tokens to trees at calibrated probabilities and scores them afterwards."""

    def __init__(self, calibrator: Calibrator | None = None) -> None:
        self.calibrator = Calibrator() if calibrator is None else calibrator
        self._drafted: dict[int, tuple[TokenTree, dict[int, Hashable]]] = {}

    def open(self, row: int, tree: TokenTree) -> TokenTree:
        """Start the book of one row's new tree; the tree is returned."""
        self._drafted[row] = (tree, {})
        return tree

    def add(
        self, row: int, parent: int, token: int, source: str, key: Hashable, prior: float
    ) -> int:
        """Add a token to the row's tree; a token that is there already keeps its first key."""
        tree, keys = self._drafted[row]
        known = len(tree)
        node = tree.add(parent, token, source=source, probability=self.calibrator.p(key, prior))
        if node == known:
            keys[node] = key
        return node

    def settle(self, row: int, tokens: Sequence[int]) -> None:
        """Count hits and misses of the row's last tree against the tokens that came.

        Guesses that were drafted but cut before the verification count too: the text tells.
        """
        if row not in self._drafted:
            return
        tree, keys = self._drafted.pop(row)
        node = 0
        for token in tokens:
            right = tree.child(node, token)
            for child in tree.children(node):
                if child in keys:
                    self.calibrator.update(keys[child], child == right)
            if right < 0:
                return
            node = right

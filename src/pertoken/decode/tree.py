"""The token tree: every draft, whatever its method, is one of these.

Node 0 is the *root*, the last committed token, whose logits the model has not computed yet. Each
further node is a guess for the token behind its parent. Parents come before their children.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class TokenTree:
    """Drafted tokens as a trie below the last committed token.

    tokens, parents, depths, sources: one entry per node; ``parents[0] == -1``.
    values: the drafter's estimate of the probability that all tokens down to the node are accepted;
    never greater than the parent's.

    >>> tree = TokenTree(7)
    >>> spine = tree.add_chain(0, [8, 9], source="spine", probabilities=[0.5, 0.5])
    >>> tree.add(0, 8, source="branch", probability=0.1)      # there already: merged
    1
    >>> tree.tokens, tree.parents, tree.depths, tree.values
    ([7, 8, 9], [-1, 0, 1], [0, 1, 2], [1.0, 0.5, 0.25])
    """

    __slots__ = ("_children", "depths", "parents", "sources", "tokens", "values")

    def __init__(self, root_token: int) -> None:
        self.tokens = [root_token]
        self.parents = [-1]
        self.depths = [0]
        self.sources = ["root"]
        self.values = [1.0]
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def size(self) -> int:
        """Number of drafted nodes; the root does not count."""
        return len(self.tokens) - 1

    def add(
        self, parent: int, token: int, *, source: str = "draft", probability: float = 1.0
    ) -> int:
        """Add a guess and return its node; a child that is there already is returned as it is.

        probability: chance that the token is right, given that everything above it is.
        """
        key = (parent, token)
        node = self._children.get(key)
        if node is not None:
            return node
        node = len(self.tokens)
        self._children[key] = node
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.sources.append(source)
        self.values.append(self.values[parent] * probability)
        return node

    def add_chain(
        self,
        parent: int,
        tokens: Sequence[int],
        *,
        source: str = "draft",
        probabilities: Sequence[float] | None = None,
    ) -> int:
        """Add tokens one below the other and return the last node."""
        for i, token in enumerate(tokens):
            p = 1.0 if probabilities is None else probabilities[i]
            parent = self.add(parent, token, source=source, probability=p)
        return parent

    def child(self, node: int, token: int) -> int:
        """The child of a node that carries the token, or -1."""
        return self._children.get((node, token), -1)

    def children(self, node: int) -> list[int]:
        """The children of a node in the order in which they were added."""
        return [i for i in range(node + 1, len(self.parents)) if self.parents[i] == node]

    def best(self, size: int) -> TokenTree:
        """The tree of the `size` most valuable nodes (a child never goes without its parent)."""
        if size >= self.size:
            return self
        order = sorted(range(1, len(self.tokens)), key=lambda i: (-self.values[i], i))[:size]
        return self.only(sorted(order))

    def only(self, nodes: Sequence[int]) -> TokenTree:
        """The tree of some nodes in ascending order; their parents must be among them."""
        part = TokenTree(self.tokens[0])
        place = {0: 0}
        for node in nodes:
            parent = place[self.parents[node]]
            above = part.values[parent]
            place[node] = part.add(
                parent,
                self.tokens[node],
                source=self.sources[node],
                probability=self.values[node] / above if above else 0.0,
            )
        return part

    def path(self, node: int) -> list[int]:
        """The nodes from the root down to `node`."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]


def ancestor_mask(parents: Sequence[int], size: int | None = None) -> torch.Tensor:
    """Who may see whom: bool [size, size], True where the column is the row's node or above it.

    Rows and columns beyond the tree (padding of a batch) see only themselves.

    >>> ancestor_mask([-1, 0, 0, 1]).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    """
    size = len(parents) if size is None else size
    rows: list[int] = []  # row i as the bits of one integer: a row is its parent's plus itself
    for node, parent in enumerate(parents):
        rows.append((rows[parent] if parent >= 0 else 0) | (1 << node))
    rows.extend(1 << node for node in range(len(parents), size))
    width = (size + 7) // 8
    packed = b"".join(row.to_bytes(width, "little") for row in rows)
    bits = torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(size, width)
    mask = (bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return mask.view(size, width * 8)[:, :size].bool()

"""Parts of the prefix trie: nodes of tokens, blocks of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pertoken.cache._rows import Rows


class Node:
    """One prefix: its last token, -log2 P of that token and of the whole, and who covers it."""

    __slots__ = ("blocks", "children", "parent", "token", "total")

    def __init__(self, parent: Node | None, token: int, bits: float) -> None:
        self.parent = parent
        self.token = token
        self.total: float = bits + (parent.total if parent else 0.0)
        self.children: dict[int, Node] = {}
        self.blocks: list[Block] = []


class Block:
    """Rows of up to `block` tokens behind the block before; `end` counts from the first token."""

    __slots__ = ("before", "end", "followers", "hits", "nbytes", "nodes", "rows", "users")

    def __init__(self, before: Block | None, nodes: list[Node], rows: Rows, end: int) -> None:
        self.before = before
        self.nodes = nodes
        self.rows = rows
        self.end = end
        self.users = self.hits = 1
        self.followers = 0
        self.nbytes = sum(t.numel() * t.element_size() for pair in rows for t in pair)
        for node in nodes:
            node.blocks.append(self)
        if before is not None:
            before.followers += 1

    def path(self) -> list[Block]:
        """The blocks from the first token to this one."""
        found, block = [self], self.before
        while block is not None:
            found.append(block)
            block = block.before
        return found[::-1]


def joined(path: Sequence[Block], length: int) -> Rows:
    """Rows of the first `length` tokens of a path, copied."""
    return [
        (
            torch.cat([block.rows[layer][0] for block in path], 2)[:, :, :length].clone(),
            torch.cat([block.rows[layer][1] for block in path], 2)[:, :, :length].clone(),
        )
        for layer in range(len(path[0].rows))
    ]


def form(rows: Rows) -> list[tuple[int, int, torch.dtype]]:
    """Heads, size and dtype of every tensor."""
    return [(t.shape[1], t.shape[3], t.dtype) for pair in rows for t in pair]


def same(ours: Rows, theirs: Rows) -> bool:
    """Whether rows of one form are the same bits."""
    return all(
        torch.equal(raw(a), raw(b))
        for pair, other in zip(ours, theirs, strict=True)
        for a, b in zip(pair, other, strict=True)
    )


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)  # 0.0 and -0.0 are not the same bits

"""Token Recycling (arXiv 2408.08696): draft from the candidates that earlier passes threw away.

A matrix holds for every token of the vocabulary the 8 tokens that were most probable behind it
when it was last fed. A fixed, imbalanced tree of 80 nodes is filled from it, layer by layer: the
child of rank r below a node is entry r of the node's token. Every verified node, rejected ones
included, overwrites its token's row. Less than 2 MB for a vocabulary of 32,000 as published.

Published: about 2 x plain decoding on Vicuna-7B/13B/33B, greedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from pertoken.decode._edges import EdgeBook
from pertoken.decode.drafter import Drafter
from pertoken.decode.topk import NodeLogits
from pertoken.decode.tree import TokenTree
from pertoken.errors import PertokenError

K = 8

# The published tree ("2.2.2"): number of children below each path of ranks, breadth first.
_CHILDREN = (
    {"": 8}
    | {"0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1}
    | {"00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1}
    | {"10": 2, "11": 1, "20": 1, "30": 1, "40": 1, "50": 1}
    | {"000": 5, "001": 2, "002": 1, "003": 1, "004": 1}
    | {"010": 1, "020": 1, "100": 1, "200": 1, "300": 1}
    | {"0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1}
    | {"00000": 2, "00010": 1}
)


def tree_paths() -> list[tuple[int, ...]]:
    """The published tree's 80 nodes as paths of ranks, parents first.

    >>> paths = tree_paths()
    >>> len(paths), [sum(len(path) == depth for path in paths) for depth in range(1, 7)]
    (80, [8, 21, 25, 15, 8, 3])
    """
    return [
        (*map(int, above), rank)
        for above, children in _CHILDREN.items()
        for rank in range(children)
    ]


_PATHS = tree_paths()
_PARENT = [_PATHS.index(path[:-1]) + 1 if len(path) > 1 else 0 for path in _PATHS]


class TokenRecycling(Drafter):
    """Drafts a fixed tree from the candidates of earlier passes.

    Args:
        budget: nodes verified; 80 by default, as published; fewer are the first of the tree.
        harvest_prompt: also note the candidates behind the prompt's tokens (the published code
            notes those of the drafted trees alone, so False is the published method).
        keep: the matrix survives to the next call, as it does in the published runs ("hot start").

    The published code lets the order of writes decide when a token stands at several nodes; here
    the last node wins, and a matrix that is still zero proposes token 0. With ``keep`` the
    pass that ends a text is noted too, which the published code skips.

    Example: ``model.generate(**inputs, max_new_tokens=64, custom_generate=TokenRecycling())``
    """

    slug = "token-recycling"
    default_budget = len(_PATHS)

    def __init__(
        self,
        *,
        budget: int | Literal["auto"] | None = None,
        harvest_prompt: bool = False,
        keep: bool = False,
        streamer: Any = None,
        tokenizer: Any = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        super().__init__(
            budget=budget,
            keep=keep,
            streamer=streamer,
            tokenizer=tokenizer,
            stop_strings=stop_strings,
        )
        self.harvest_prompt = harvest_prompt
        self.wants_prompt = harvest_prompt
        self.reset()

    def reset(self) -> None:
        """Back to a matrix of zeros."""
        super().reset()
        self.matrix: np.ndarray[Any, np.dtype[np.int32]] | None = None
        self._edges = EdgeBook()

    @property
    def storage_bytes(self) -> int:
        """Memory of the matrix: 32 bytes per token of the vocabulary."""
        return 0 if self.matrix is None else self.matrix.nbytes

    def begin(self, vocab_size: int) -> None:
        """A matrix for this vocabulary; the old one if told to keep it."""
        if not self.keep:
            self.reset()
        if self.matrix is None:
            self.matrix = np.zeros((vocab_size, K), dtype=np.int32)
        elif len(self.matrix) != vocab_size:
            raise PertokenError(
                f"this drafter's matrix is for a vocabulary of {len(self.matrix)} tokens, the "
                f"model has {vocab_size}; call reset() or use a new one"
            )

    def observe_prompt(
        self, row: int, tokens: list[int], logits: NodeLogits, previous: int | None
    ) -> None:
        """Note the candidates behind the prompt's tokens."""
        self._write(tokens, logits)

    def observe(self, row: int, tree: TokenTree, path: list[int], logits: NodeLogits) -> None:
        """Note the candidates behind every node."""
        self._write(tree.tokens, logits)

    def commit(self, row: int, tokens: list[int]) -> None:
        """Learn how often each place of the tree is right (for ``budget="auto"``)."""
        super().commit(row, tokens)
        self._edges.settle(row, tokens)

    def propose(self, row: int, budget: int, room: int) -> TokenTree:
        """The published tree, filled from the matrix."""
        assert self.matrix is not None
        tree = self._edges.open(row, TokenTree(self.contexts[row][-1]))
        nodes = [0]  # of the template's places, merged where a row repeats a token
        for place, path in enumerate(_PATHS[:budget]):
            if len(path) > room:
                break
            parent = nodes[_PARENT[place]]
            token = int(self.matrix[tree.tokens[parent], path[-1]])
            key = ("recycled", min(len(path), 4), path[-1])
            prior = 0.3 / (1 + path[-1])
            nodes.append(self._edges.add(row, parent, token, "recycled", key, prior))
        return tree

    def state_dict(self) -> dict[str, Any]:
        """The rows of the matrix that were written."""
        rows = {}
        if self.matrix is not None:
            written = np.flatnonzero(self.matrix.any(-1))
            rows = {int(token): self.matrix[token].tolist() for token in written}
        size = 0 if self.matrix is None else len(self.matrix)
        return {**super().state_dict(), "vocabulary": size, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        super().load_state_dict(state)
        self.reset()
        if state["vocabulary"]:
            self.matrix = np.zeros((state["vocabulary"], K), dtype=np.int32)
            for token, row in state["rows"].items():
                self.matrix[int(token)] = row

    def _write(self, tokens: list[int], logits: NodeLogits) -> None:
        assert self.matrix is not None
        ids, _ = logits.top(K)
        # numpy writes in order, so the last of repeated tokens wins.
        self.matrix[tokens, : ids.shape[-1]] = ids.cpu().numpy()

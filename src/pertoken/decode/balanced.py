"""Balanced (isotropic) trees: the same recycled guesses as Goose, k children at every node.

The control of Goose's paper: same table, no spine, and the same number of nodes, stretched where
Goose would trust a copy of earlier text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pertoken.decode._edges import EdgeBook
from pertoken.decode.drafter import Drafter
from pertoken.decode.goose import BRANCH_DEPTH, MIN_SCORE, NODE_BUDGET, K, matched, stretched
from pertoken.decode.tables import Places, Successors
from pertoken.decode.topk import NodeLogits
from pertoken.decode.tree import TokenTree
from pertoken.errors import PertokenError


class Balanced(Drafter):
    """A balanced k-ary tree of the model's recycled guesses, filled breadth-first.

    Args:
        k: children per node; the paper compares 3 and 5.
        budget: nodes below the root; 59 by default, 60 with the root as in the paper.
        keep: recycled guesses survive to the next call.

    Depth is at most 6 (Goose, arXiv 2604.02047, the topology control).

    Example: ``model.generate(**inputs, max_new_tokens=64, custom_generate=Balanced(k=3))``
    """

    slug = "balanced"
    default_budget = NODE_BUDGET - 1
    wants_prompt = True

    def __init__(
        self,
        *,
        k: int = 3,
        budget: int | Literal["auto"] | None = None,
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
        if not 1 <= k <= K:
            raise PertokenError(f"a balanced tree has 1 to {K} children per node, not {k}")
        self.k = k
        self.reset()

    def reset(self) -> None:
        """Forget the recycled guesses."""
        super().reset()
        self._table = Successors(K, orders=2)
        self._edges = EdgeBook()

    def begin(self, vocab_size: int) -> None:
        """Start empty unless told to keep."""
        if not self.keep:
            self.reset()
        self._places = [Places() for _ in self.contexts]
        for places, prompt in zip(self._places, self.contexts, strict=True):
            places.extend(prompt)

    def observe_prompt(
        self, row: int, tokens: list[int], logits: NodeLogits, previous: int | None
    ) -> None:
        """Recycle the guesses behind the prompt's tokens."""
        self._table.write_text(tokens, logits, previous)

    def observe(self, row: int, tree: TokenTree, path: list[int], logits: NodeLogits) -> None:
        """Recycle the guesses behind all nodes."""
        self._table.write_tree(tree, logits, self.contexts[row][-1:])

    def commit(self, row: int, tokens: list[int]) -> None:
        """Learn how often guesses of each rank are right."""
        super().commit(row, tokens)
        self._edges.settle(row, tokens)
        self._places[row].extend(tokens)

    def propose(self, row: int, budget: int, room: int) -> TokenTree:
        """The k best guesses below every node, level by level."""
        context = self.contexts[row]
        tree = self._edges.open(row, TokenTree(context[-1]))
        places = self._places[row]
        _, confidence = matched(places, context[-max(places.lengths) :])
        budget = stretched(budget + 1, confidence) - 1
        node = 0
        while node < len(tree) and tree.size < budget:
            if tree.depths[node] < min(BRANCH_DEPTH, room):
                parent = tree.parents[node]
                before = tree.tokens[parent : parent + 1] if parent >= 0 else context[-2:-1]
                tier, ids, scores = self._table.after([*before, tree.tokens[node]])
                for rank in range(min(self.k, len(ids), budget - tree.size)):
                    if scores[rank] < MIN_SCORE:
                        break
                    key = ("table", tier, rank)
                    prior = 0.5 * scores[rank]
                    self._edges.add(row, node, ids[rank], "table", key, prior)
            node += 1
        return tree

    def state_dict(self) -> dict[str, Any]:
        """The recycled guesses."""
        return {**super().state_dict(), "table": self._table.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        super().load_state_dict(state)
        self.reset()
        self._table.load(state["table"])

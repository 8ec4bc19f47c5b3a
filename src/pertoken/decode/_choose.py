"""What the model chooses at the nodes of a tree: the argmax or a draw, after logits processors."""

from __future__ import annotations

from typing import Any

import torch

from pertoken.decode.accept import recursive_rejection
from pertoken.decode.topk import NodeLogits
from pertoken.decode.tree import TokenTree

Walk = tuple[list[int], list[int]]
"""Accepted nodes from the root, and the tokens chosen at them (the last one is the bonus)."""

_BY_ROW = {  # processors that treat every row alike, whatever its place in the batch
    *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"),
    *("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"),
    *("NoRepeatNGramLogitsProcessor", "NoBadWordsLogitsProcessor"),
    "SuppressTokensLogitsProcessor",
}


class Chooser:
    """Applies the processors, each time with the node's own prefix, and picks.

    sample: draw instead of taking the best; rows: size of the batch.
    """

    def __init__(self, processor: Any, *, sample: bool, rows: int) -> None:
        self.processor = processor
        self.sample = sample
        self.rows = rows
        self.freely = not sample and not processor  # the argmax of the logits, no prefix needed
        self.by_batch = any(type(one).__name__ not in _BY_ROW for one in processor or [])

    def one_each(self, texts: list[torch.Tensor], logits: torch.Tensor) -> list[int]:
        """One token per row from logits [batch, vocab]: what transformers' own loop does.

        texts: the rows' ids so far, each [1, time], all of one length.
        """
        if self.freely:
            return NodeLogits(logits).greedy()
        scores = self._processed(torch.cat(texts), logits)
        if not self.sample:
            found = scores.argmax(-1)
        else:
            found = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        tokens: list[int] = found.tolist()
        return tokens

    def walk(
        self, index: int, ids: torch.Tensor, length: int, tree: TokenTree, logits: torch.Tensor
    ) -> Walk:
        """Walk down a tree, each node visited being treated with its own prefix.

        index: the row's place in the batch; ids: buffer [1, longest] with `length` ids of text,
        behind which the accepted drafts are written; logits: [nodes, vocab].
        """
        node, path, tokens = 0, [0], []
        while True:
            scores = self.at(index, self.processor, ids[:, :length], logits[node])
            if not self.sample:
                token = int(scores.argmax())
                child = tree.child(node, token)
            else:
                children = tree.children(node)
                drafts = torch.tensor([tree.tokens[i] for i in children], device=ids.device)
                token, place = recursive_rejection(scores.softmax(-1), drafts.long())
                child = children[place] if place >= 0 else -1
            tokens.append(token)
            if child < 0 or length + 1 >= ids.shape[1]:
                return path, tokens
            ids[0, length] = token
            length += 1
            node = child
            path.append(node)

    def at(
        self, index: int, processor: Any, prefix: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Processed scores [vocab] of one row at one node; prefix: [1, time]."""
        scores = logits.float()  # as generate does, before processors
        if not processor:
            return scores
        # A processor that may hold something per row is shown a batch, the row in its own place.
        copies, place = (self.rows, index) if self.by_batch else (1, 0)
        processed: torch.Tensor = processor(prefix.repeat(copies, 1), scores.repeat(copies, 1))
        return processed[place]

    def _processed(self, prefix: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scores = logits.to(dtype=torch.float32, copy=True)  # as generate does, before processors
        processed: torch.Tensor = self.processor(prefix, scores) if self.processor else scores
        return processed


def walk_greedy(tree: TokenTree, best: list[int]) -> Walk:
    """Follow the model's own choices; best: the most probable token at every node."""
    node, path, tokens = 0, [0], []
    while True:
        token = best[node]
        tokens.append(token)
        node = tree.child(node, token)
        if node < 0:
            return path, tokens
        path.append(node)

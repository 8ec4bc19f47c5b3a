"""The logits of a tree's nodes, and the few questions that drafters ask of them."""

from __future__ import annotations

import torch

_BLOCK = 128  # a block's maximum is one vectorised pass; sorting starts from the best blocks only


class NodeLogits:
    """The model's logits at the nodes of one row, ``raw`` [nodes, vocab], any float type.

    A vocabulary has 50,000 to 260,000 entries and a step asks for ten of them: the maxima of
    blocks of 128 are taken once, and everything else looks at the blocks that can matter.
    """

    __slots__ = ("_greedy", "_maxima", "_top", "raw")

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw
        self._maxima: torch.Tensor | None = None
        self._greedy: list[int] | None = None
        self._top: tuple[torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.raw.shape[0]

    def greedy(self) -> list[int]:
        """The most probable token of every node, the smallest id on ties, as `argmax` does.

        >>> NodeLogits(torch.tensor([[1.0, 3.0, 3.0], [0.0, -1.0, 2.0]])).greedy()
        [1, 2]
        """
        if self._greedy is None:
            self._greedy = self._argmax().tolist()
        return self._greedy

    def top(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best tokens of every node, best first: ids and logits in float32, [nodes, k].

        >>> ids, logits = NodeLogits(torch.tensor([[1.0, 3.0, 2.0]])).top(2)
        >>> ids.tolist(), logits.tolist()
        ([[1, 2]], [[3.0, 2.0]])
        """
        k = min(k, self.raw.shape[-1])
        if self._top is None or self._top[0].shape[-1] < k:
            self._top = self._best(k)
        ids, values = self._top
        return ids[:, :k], values[:, :k]

    def _blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        whole = self.raw.shape[1] // _BLOCK * _BLOCK
        blocks = self.raw[:, :whole].unflatten(-1, (-1, _BLOCK))
        if self._maxima is None:
            self._maxima = blocks.amax(-1)
        return blocks, self._maxima

    def _argmax(self) -> torch.Tensor:
        nodes, vocab = self.raw.shape
        if vocab < 16 * _BLOCK:
            return self.raw.argmax(-1)
        blocks, maxima = self._blocks()
        block = maxima.argmax(-1)
        inside = blocks[torch.arange(nodes, device=block.device), block].argmax(-1)
        best = block * _BLOCK + inside
        rest = self.raw[:, blocks.shape[1] * _BLOCK :]
        if rest.shape[-1]:
            value, place = rest.max(-1)
            later = value > maxima.amax(-1)
            best = torch.where(later, blocks.shape[1] * _BLOCK + place, best)
        return best

    def _best(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        vocab = self.raw.shape[1]
        if vocab < 16 * _BLOCK or k > vocab // _BLOCK:
            values, ids = self.raw.topk(k, dim=-1)
            return ids, values.float()
        # The k best tokens lie in the k blocks with the greatest maxima (or in the rest).
        blocks, maxima = self._blocks()
        chosen = maxima.topk(k, dim=-1, sorted=False).indices
        candidates = blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, _BLOCK)).flatten(1)
        rest = self.raw[:, blocks.shape[1] * _BLOCK :]
        values, place = torch.cat((candidates, rest), -1).float().topk(k, dim=-1)
        inside = place % _BLOCK
        block = chosen.gather(1, (place // _BLOCK).clamp(max=k - 1))
        ids = block * _BLOCK + inside
        return torch.where(
            place < k * _BLOCK, ids, blocks.shape[1] * _BLOCK + place - k * _BLOCK
        ), (values)

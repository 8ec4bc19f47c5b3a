"""The two heuristics of TokenAdapt as weights of old tokens, for many new tokens at once.

Pieces of all tokens lie in flat tensors [pieces]; `row` says which new token a piece belongs to.
"""

from __future__ import annotations

import torch

__all__ = ["global_weights", "local_weights", "nearest", "segment_softmax"]

_BLOCK = 1 << 25  # numbers of a block of similarities: 128 MiB


def segment_softmax(values: torch.Tensor, row: torch.Tensor, rows: int) -> torch.Tensor:
    """Softmax over the pieces of each row, [pieces].

    >>> segment_softmax(torch.tensor([0.0, 0.0, 5.0]), torch.tensor([0, 0, 1]), 2)
    tensor([0.5000, 0.5000, 1.0000])
    """
    top = values.new_full((rows,), -torch.inf).scatter_reduce(0, row, values, "amax")
    raised = (values - top[row]).exp()
    return raised / values.new_zeros(rows).index_add(0, row, raised)[row]


def local_weights(
    similarity: torch.Tensor,
    share: torch.Tensor,
    row: torch.Tensor,
    rows: int,
    temperature: float,
) -> torch.Tensor:
    """w = softmax(c / temperature), c = (softmax(similarity) + share) / 2, [pieces].

    similarity: inner product of the unit vectors of piece and token; share: length of the piece
    over that of the token. The temperature acts on the average (the authors' code; the paper's text
    can be read as if it acted on the similarities).

    >>> share, row = torch.tensor([0.75, 0.25]), torch.tensor([0, 0])
    >>> local_weights(torch.zeros(2), share, row, 1, 0.5)            # softmax([0.625, 0.375] / 0.5)
    tensor([0.6225, 0.3775])
    """
    average = (segment_softmax(similarity, row, rows) + share) / 2
    return segment_softmax(average / temperature, row, rows)


def global_weights(similarity: torch.Tensor, temperature: float, threshold: float) -> torch.Tensor:
    """softmax(similarity / temperature) over the neighbours [tokens, neighbours], those below the
    threshold then dropped and the rest brought to sum 1; a row of zeros where none is left.

    >>> global_weights(torch.tensor([[0.9, 0.9, 0.1]]), 0.6, 0.5)
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    weights = (similarity / temperature).softmax(-1) * (similarity >= threshold)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total, 0.0)


def nearest(
    queries: torch.Tensor, keys: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` keys of largest inner product: (similarity, place), each [queries, count].

    Exact, block by block: at vocabulary size that is a matter of seconds, so no index is built.
    """
    step = max(1, _BLOCK // max(1, len(keys)))
    blocks = [(block @ keys.T).topk(count, dim=-1) for block in queries.split(step)]
    return torch.cat([each.values for each in blocks]), torch.cat([each.indices for each in blocks])

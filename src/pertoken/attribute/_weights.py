"""The weights of a model's attention, some rows at a time."""

from __future__ import annotations

import torch

__all__ = ["attention_weights"]


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float | None,
    allowed: torch.Tensor | None,
    causal: bool,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights [heads, batch, end, rows] from queries and keys [batch, heads, time, dim].

    A query's weights lie along `end`: so the rows of one key stand side by side.
    allowed: bool, to broadcast to [batch, heads, time, time], of a causal layer with all its rows;
        None where a query sees all before it, in an encoder all.
    rows: places of the queries, all by default; end: behind the last place that one of them sees.

    >>> x = torch.zeros(1, 2, 4, 8)
    >>> attention_weights(x, x, None, None, True, torch.tensor([1]))[0, 0].tolist()
    [[0.5], [0.5]]
    """
    if rows is None:
        rows = torch.arange(query.shape[2], device=query.device)
    end = int(rows.max()) + 1 if causal else key.shape[2]
    asked = query[:, :, rows].transpose(0, 1).unflatten(0, (key.shape[1], -1))
    scores = (key[:, :, :end].transpose(0, 1)[:, None] @ asked.mT).flatten(0, 1)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if causal:
        before = torch.arange(end, device=rows.device) <= rows[:, None]
        allowed = before if allowed is None else before & allowed[..., rows, :end]
    elif allowed is not None:
        allowed = allowed.transpose(0, 1)
    if allowed is not None:
        scores = scores.masked_fill(~allowed.mT, -torch.inf)
    return scores.softmax(-2)

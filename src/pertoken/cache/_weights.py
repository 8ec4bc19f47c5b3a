"""Attention weights of chosen queries, without any model in eager mode.

Heads of a group that share keys stand together: weights are [batch, key heads, group, queries,
keys], in float32 (float64 for a float64 model).
"""

from __future__ import annotations

import torch

BLOCK = 64  # queries whose weights are alive at once
_WIDE = {torch.float64: torch.float64}


def weigh(
    query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Softmax weights [batch, key heads, group, queries, keys].

    query: [batch, heads, queries, dim]; key: [batch, key heads, keys, dim]; allowed: bool, to
    broadcast to [batch, key heads, queries, keys], None for all.

    >>> weigh(torch.ones(1, 4, 3, 8), torch.ones(1, 2, 5, 8), None, 1.0).shape
    torch.Size([1, 2, 2, 3, 5])
    """
    scores = _scores(query * scaling, key)
    if allowed is not None:
        scores = scores.masked_fill(~allowed.unsqueeze(2), -torch.inf)
    return _softmax(scores)


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    batch, heads, time, dim = query.shape
    shared = key.shape[1]
    folded = query.reshape(batch, shared, heads // shared * time, dim)
    return (folded @ key.transpose(2, 3)).view(batch, shared, heads // shared, time, -1)


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1, dtype=_WIDE.get(scores.dtype, torch.float32))


def mix(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Values mixed by `weights`, [batch, queries, heads, dim] as attention functions give them."""
    batch, shared, group, time, keys = weights.shape
    mixed = weights.to(value.dtype).view(batch, shared, group * time, keys) @ value
    return mixed.view(batch, shared * group, time, -1).transpose(1, 2)


def watched(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    scaling: float,
    voting: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, and what every key got from all queries together.

    Queries go block by block, so that no [queries, keys] of a long prompt is alive at once.
    allowed: None where everything is visible to one query, or where keys and queries are the same
        tokens in order (causal).
    voting: bool [batch, queries], False for queries that do not count.
    Gives the mixed values [batch, queries, heads, dim] and the sums [batch, key heads, keys], over
    queries and the heads of a group.
    """
    batch, _, time, _ = query.shape
    shared, keys = key.shape[1:3]
    wide = _WIDE.get(query.dtype, torch.float32)
    total = torch.zeros(batch, shared, keys, dtype=wide, device=key.device)
    query = query * scaling
    mixed = []
    for start in range(0, time, BLOCK):
        stop = min(start + BLOCK, time)
        # Where the order is causal, later keys need not be looked at, nor earlier ones masked.
        seen = stop if allowed is None and time > 1 else keys
        scores = _scores(query[:, :, start:stop], key[:, :, :seen])
        if allowed is not None:
            scores = scores.masked_fill(~allowed[..., start:stop, :].unsqueeze(2), -torch.inf)
        elif time > 1:
            past = causal(stop - start, stop - start, key.device)
            scores[..., start:].masked_fill_(~past, -torch.inf)
        weights = _softmax(scores)
        mixed.append(mix(weights, value[:, :, :seen]))
        counted = weights.detach()
        if voting is not None:
            counted = counted * voting[:, None, None, start:stop, None]
        total[..., :seen] += counted.flatten(2, 3).sum(2)
    return torch.cat(mixed, 1), total


def causal(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """What the last queries of a text see of it: bool [1, 1, queries, keys]."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return ones.tril(keys - queries)[None, None]

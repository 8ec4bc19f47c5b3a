"""Attention over keys that are never all there at once: softmax block by block.

A block gives, for every query, the largest score, the sum of the weights exp(score - largest) and
the values mixed with these weights. Two such parts become one when both are put on the larger of
their maxima (log-sum-exp merging), so the blocks may come in any number and order, and the result
is softmax attention over all of them. Sums are in float32, or in the model's dtype if wider.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Part(NamedTuple):
    """Attention over some of the keys, not yet divided by the sum of the weights.

    largest, total: [batch, heads, time, 1], -inf and 0 where a query sees none of the keys;
    mixed: [batch, heads, time, dim].
    """

    largest: torch.Tensor
    total: torch.Tensor
    mixed: torch.Tensor


def attend_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scaling: float | None = None,
) -> Part:
    """What queries see in one block of keys.

    query: [batch, heads, time, dim]; key, value: [batch, key heads, keys, dim], where each key head
    serves heads / key heads query heads in a row. mask: to broadcast to [batch, 1, time, keys],
    bool (True where a query sees a key) or float (added to the scores). scaling: of the scores,
    1 / sqrt(dim) by default.
    """
    batch, heads, time, dim = query.shape
    groups = key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    # The query heads of one key head stand below each other: no key is copied.
    stacked = query.to(wide).reshape(batch, groups, -1, dim)
    scores = stacked @ key.to(wide).transpose(-1, -2)
    scores = scores.view(batch, heads, time, -1) * (dim**-0.5 if scaling is None else scaling)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + mask
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - _finite(largest)).exp()
    mixed = weights.view(batch, groups, -1, weights.shape[-1]) @ value.to(wide)
    return Part(largest, weights.sum(-1, keepdim=True), mixed.view(batch, heads, time, -1))


def merge(one: Part | None, other: Part) -> Part:
    """Attention over the keys of both parts.

    >>> query, keys = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 7, 4)
    >>> whole = attend_part(query, keys, keys)
    >>> part = merge(attend_part(query, keys[:, :, :5], keys[:, :, :5]),
    ...              attend_part(query, keys[:, :, 5:], keys[:, :, 5:]))
    >>> torch.allclose(mixed_values(part, query.dtype), mixed_values(whole, query.dtype))
    True
    """
    if one is None:
        return other
    largest = torch.maximum(one.largest, other.largest)
    finite = _finite(largest)
    first, second = (one.largest - finite).exp(), (other.largest - finite).exp()
    return Part(
        largest,
        one.total * first + other.total * second,
        one.mixed * first + other.mixed * second,
    )


def mixed_values(part: Part, dtype: torch.dtype) -> torch.Tensor:
    """The output of attention [batch, time, heads, dim]; 0 for a query that saw no key."""
    out = part.mixed / part.total.masked_fill(part.total == 0, 1.0)
    return out.to(dtype).transpose(1, 2).contiguous()


def _finite(largest: torch.Tensor) -> torch.Tensor:
    """Where a query sees nothing, -inf minus -inf would be no number."""
    return largest.masked_fill(largest == -torch.inf, 0.0)

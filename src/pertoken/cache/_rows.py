"""Every row of a cache as tensors, and a plain cache of such rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import DynamicCache

Rows = Sequence[tuple[torch.Tensor, torch.Tensor]]


def plain_rows(cache: Any, time: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(keys, values) of each layer, [batch, heads, time, dim], not copied.

    time: rows each layer must hold; None takes what the first layer holds.
    Raises PertokenError where a layer holds other rows than those of the tokens seen: quantised,
    static, evicting and recurrent layers, and sliding ones that have dropped some.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    found = []
    for index, layer in enumerate(getattr(cache, "layers", [])):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise PertokenError(
                f"a {type(cache).__name__} does not hold plain keys and values: its layer {index} "
                f"is a {type(layer).__name__}; use DynamicCache()"
            )
        seen, held = int(layer.get_seq_length()), 0 if layer.keys is None else layer.keys.shape[-2]
        if held < seen:
            raise PertokenError(
                f"layer {index} of the cache slides and holds {held} of {seen} rows: use "
                "DynamicCache() without a config, whose layers keep all of them"
            )
        time = seen if time is None else time
        if seen != time:
            raise PertokenError(
                f"layer {index} of the cache holds {seen} rows where {time} tokens are given"
            )
        found.append((layer.keys, layer.values))
    if not found or found[0][0] is None:
        raise PertokenError("the cache is empty: run the model on the tokens first")
    return found


def plain_cache(rows: Rows) -> DynamicCache:
    """A `DynamicCache` of plain layers that holds these rows."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(rows):
        cache.update(keys, values, layer)
    return cache

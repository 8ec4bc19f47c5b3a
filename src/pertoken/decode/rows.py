"""Keeping the accepted rows of a cache after a tree was fed, whatever the layer type.

A tree of N nodes adds N rows to every layer; of these the accepted path is kept. Rows of a batch
that accept different numbers of tokens stay right-aligned: the text of every row ends at the last
slot and the difference becomes left padding, which every model understands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


def refuse_unfit_cache(cache: Cache, method: object) -> None:
    """Raise PertokenError, naming both, if the cache cannot drop what the method's drafts left."""
    if reason := unfit(cache, static=True):
        raise PertokenError(
            f"{type(method).__name__} drops the rows of rejected drafts, which "
            f"{type(cache).__name__} cannot: it {reason}; use DynamicCache or KVDirectCache, or "
            "decode without a drafter"
        )


def unfit(cache: Cache, *, static: bool) -> str:
    """Why `keep_rows` cannot serve a cache, "" where it can; static: whether static layers do."""
    if hasattr(cache, "keep_nodes"):
        return ""
    from transformers import cache_utils as known

    fit = [known.DynamicLayer, known.DynamicSlidingWindowLayer]
    fit += [known.StaticLayer] if static else []
    reason = "is offloaded" if getattr(cache, "offloading", False) else ""
    for layer in cache.layers:
        if type(layer) not in fit:
            layers = f"has layers of type {type(layer).__name__}"
            reason = getattr(cache, "keeps_no_drafts", layers)
    return reason


def static_slots(cache: Cache) -> list[int]:
    """The fixed numbers of rows that static layers have; [] for a cache that grows."""
    return [slots for layer in cache.layers if (slots := getattr(layer, "max_cache_len", None))]


def start_recording(cache: Cache) -> None:
    """Let sliding layers keep the rows that a rejected draft would push out. After the prefill."""
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = True


def stop_recording(cache: Cache) -> None:
    """Leave the cache as an ordinary one."""
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = False


def keep_rows(
    cache: Cache, mask: torch.Tensor, nodes: int, kept: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Keep some of the last `nodes` rows and return the text's new mask [batch, seen].

    mask: [batch, seen before the tree]; kept: for every batch row the accepted nodes in order.
    A cache that holds its rows in its own way has a method `keep_nodes(source, mask)`: of all its
    slots, nodes included, keep `source` [batch, length], with the new mask [batch, length].
    """
    counts = [len(row) for row in kept]
    most = max(counts)
    batch, seen = mask.shape
    own = getattr(cache, "keep_nodes", None)
    if min(counts) == most and own is None:
        same = all(list(row) == list(kept[0]) for row in kept)
        straight = same and list(kept[0]) == list(range(most))
        index = torch.tensor(kept if not same else [kept[0]], device=mask.device)
        for layer in cache.layers:
            _keep_equal(layer, nodes, index, straight)
        return torch.cat((mask, mask.new_ones(batch, most)), -1)
    for layer in cache.layers:
        if own is None and (not hasattr(layer, "keys") or type(layer).__name__ == "StaticLayer"):
            raise PertokenError(
                "a static cache cannot hold rows that accept different numbers of tokens; use "
                "DynamicCache for a batch"
            )
    # Slot s of the new text shows old slot s - shift; kept nodes follow; columns that are left
    # padding in every row are dropped.
    shift = torch.tensor([most - count for count in counts], device=mask.device)
    slots = torch.arange(seen + most, device=mask.device)
    source = (slots - shift.unsqueeze(1)).clamp(min=0)
    for row, chosen in enumerate(kept):
        if chosen:
            source[row, -len(chosen) :] = seen + torch.tensor(chosen, device=mask.device)
    padded = torch.cat((mask, mask.new_ones(batch, most)), -1)
    valid = slots >= shift.unsqueeze(1)
    old = padded.gather(1, (slots - shift.unsqueeze(1)).clamp(min=0)) * valid
    for row, count in enumerate(counts):
        if count:
            old[row, -count:] = 1
    unused = int(old.any(0).int().argmax())
    source, old = source[:, unused:], old[:, unused:]
    if own is not None:
        own(source, old)
        return old
    for layer in cache.layers:
        _keep_ragged(layer, seen, nodes, source)
    return old


def _keep_equal(layer: Any, nodes: int, index: torch.Tensor, straight: bool) -> None:
    """All rows keep the same number of nodes: index [1 or batch, kept]."""
    index = index.to(layer.keys.device)  # a model may lie on several devices
    count = index.shape[-1]
    if hasattr(layer, "max_cache_len"):  # static: rows behind the text are masked anyway
        end = int(layer.get_seq_length())
        start = end - nodes
    else:
        end = layer.keys.shape[-2]
        start = end - nodes
    if not straight:
        for name in ("keys", "values"):
            state = getattr(layer, name)
            if index.shape[0] == 1:
                chosen = state[:, :, start:end].index_select(2, index[0])
            else:
                where = index[:, None, :, None].expand(-1, state.shape[1], -1, state.shape[3])
                chosen = state[:, :, start:end].gather(2, where)
            state[:, :, start : start + count] = chosen
    if hasattr(layer, "max_cache_len"):
        layer.cumulative_length.fill_(start + count)
        return
    rows = start + count
    first = 0
    if hasattr(layer, "sliding_window"):
        layer.cumulative_length -= nodes - count
        first = max(0, rows - (layer.sliding_window - 1))
    layer.keys = layer.keys[:, :, first:rows]
    layer.values = layer.values[:, :, first:rows]


def _keep_ragged(layer: Any, seen: int, nodes: int, source: torch.Tensor) -> None:
    """Rows keep different numbers of nodes: source [batch, new length], slots before the cut."""
    length = source.shape[1]
    stored = layer.keys.shape[-2]
    hidden = seen + nodes - stored  # slots that a sliding layer has let go already
    if hasattr(layer, "sliding_window"):
        source = source[:, -(layer.sliding_window - 1) :]
        layer.cumulative_length = length
    where = (source.to(layer.keys.device) - hidden).clamp(min=0)[:, None, :, None]
    for name in ("keys", "values"):
        state = getattr(layer, name)
        index = where.expand(-1, state.shape[1], -1, state.shape[3])
        setattr(layer, name, state.gather(2, index))

"""Bytes that a KV cache holds, counted from its tensors, and bytes of the whole process.

`cache_bytes` walks over everything a cache reaches and adds up the storages of the tensors it
finds, so that it needs to know nothing about the kind of cache: layers, lists, quantised blocks and
scratch all count. `full_cache_bytes` is the arithmetic of a cache that keeps everything.
"""

from __future__ import annotations

import os
import re
import sys
import types
import weakref
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

__all__ = ["cache_bytes", "full_cache_bytes", "peak_rss_bytes", "rss_bytes"]

_STATUS = Path("/proc/self/status")

# What no tensor of a cache hides in, or what is code and not state.
_LEAVES = (
    *(str, int, float, complex, type(None), type),
    *(types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType),
    *(torch.dtype, torch.device, torch.Generator),
)


def cache_bytes(cache: Cache) -> int:
    """Bytes of every tensor that a cache holds, each storage once.

    Found are tensors in the cache and its layers, in their attributes, lists, tuples, dicts, sets
    and objects, nested as they like; numpy arrays and byte strings count too. A view counts its
    whole storage, since that is what is held: ten rows cut out of a thousand hold a thousand.
    Weights never count: neither those of a model that the cache refers to, nor views of them.
    What hides in the closure of a function is not found.

    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 0)
    >>> cache_bytes(cache)  # 2 tensors x 80 float32
    640
    """
    storages: dict[tuple[str, int], int] = {}
    weights: set[tuple[str, int]] = set()
    seen: set[int] = set()
    # Objects that properties and `__tensor_flatten__` make on the fly stay alive until the end, so
    # that no id is given out twice.
    todo: list[Any] = [cache]
    kept: list[Any] = []
    while todo:
        item = todo.pop()
        if isinstance(item, _LEAVES) or id(item) in seen:
            continue
        seen.add(id(item))
        kept.append(item)
        if isinstance(item, torch.nn.Module):
            for tensor in (*item.parameters(), *item.buffers()):
                weights.update(_storages(tensor))
        elif isinstance(item, torch.nn.Parameter):
            weights.update(_storages(item))
        elif isinstance(item, torch.Tensor):
            storages.update(_storages(item))
        elif isinstance(item, np.ndarray):
            if item.base is None:
                storages["numpy", item.__array_interface__["data"][0]] = item.nbytes
            todo.append(item.base)  # a view: of an array, of a tensor, or of bytes
        elif isinstance(item, memoryview):
            todo.append(item.obj)
        elif isinstance(item, bytes | bytearray):
            storages["bytes", id(item)] = len(item)
        elif isinstance(item, weakref.ref):  # only to know whose weights are none of the cache's
            todo.extend(target for target in [item()] if isinstance(target, torch.nn.Module))
        else:
            todo.extend(_inside(item))
    return sum(size for place, size in storages.items() if place not in weights)


def _storages(tensor: torch.Tensor) -> dict[tuple[str, int], int]:
    """Place and bytes of the storages behind a tensor; several for a tensor made of others."""
    if hasattr(tensor, "__tensor_flatten__"):  # quantised tensors of several libraries
        found: dict[tuple[str, int], int] = {}
        for name in tensor.__tensor_flatten__()[0]:
            found.update(_storages(getattr(tensor, name)))
        return found
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return {}
    storage = tensor.untyped_storage()
    return {(str(tensor.device), storage.data_ptr()): storage.nbytes()} if storage.nbytes() else {}


def _inside(item: Any) -> list[Any]:
    """What an object holds: elements, values, and attributes also of classes with slots."""
    found: list[Any] = []
    if isinstance(item, Mapping):
        found += [*item.keys(), *item.values()]
    elif isinstance(item, list | tuple | Set) or type(item).__name__ == "deque":
        found += item
    found += getattr(item, "__dict__", {}).values()
    for kind in type(item).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                found.append(getattr(item, name, None))
    return found


def full_cache_bytes(model: PreTrainedModel, tokens: int, batch: int = 1) -> int:
    """Bytes of keys and values that transformers' own cache keeps for `tokens` tokens per row.

    Full-attention layers keep every token, sliding-window layers the last window - 1, layers that
    share another layer's cache none. (A sliding layer may hold more for a moment: the storage that
    its rows were cut out of.) A model with latent attention (DeepSeek) reads a token for it.
    Raises PertokenError for models with other kinds of layers.

    >>> from pertoken.testing import tiny_model
    >>> full_cache_bytes(tiny_model("llama"), 10)  # 2 x 2 layers x 2 heads x 8 x 8 bytes x 10
    5120
    """
    from transformers import DynamicCache

    if tokens < 0 or batch < 1:
        raise PertokenError(f"tokens must be 0 or more and batch 1 or more, got {tokens}, {batch}")
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None)
    heads = heads or getattr(config, "num_attention_heads", None)
    if model.config.is_encoder_decoder or not heads:
        raise PertokenError(f"{type(model).__name__} has no keys and values of a decoder to count")
    rows = 0
    for layer in DynamicCache(config=config).layers:
        kind = type(layer).__name__
        if kind == "DynamicSlidingWindowLayer":
            rows += min(tokens, layer.sliding_window - 1)
        elif kind == "DynamicLayer":
            rows += tokens
        elif kind != "DummyLayer":
            raise PertokenError(
                f"{type(model).__name__} has layers whose state is no keys and values ({kind}); "
                "what a full cache of it holds cannot be told beforehand"
            )
    if getattr(config, "kv_lora_rank", None):
        return batch * rows * _latent_bytes(model)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_row = 2 * heads * size * torch.empty((), dtype=model.dtype).element_size()
    return batch * rows * per_row


@torch.no_grad()
def _latent_bytes(model: PreTrainedModel) -> int:
    """Bytes of a token in a layer of a model with latent attention, counted on one token.

    Versions of transformers differ in what they keep: the latent, or keys and values made of it.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    one = torch.ones(1, 1, dtype=torch.long, device=model.device)
    model.get_decoder()(input_ids=one, past_key_values=cache, use_cache=True)
    return int(cache.layers[0].keys.nbytes + cache.layers[0].values.nbytes)


def rss_bytes() -> int:
    """Bytes of memory that this process has in RAM now; PertokenError where it cannot be told."""
    return _status("VmRSS")


def peak_rss_bytes() -> int:
    """The most bytes of RAM that this process has had since it started."""
    if _STATUS.exists():
        return _status("VmHWM")
    try:
        import resource
    except ImportError:
        raise PertokenError("this system does not tell a process's peak memory") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB", _STATUS.read_text(encoding="ascii"), re.M)
    except OSError:
        found = None
    if found is None:
        raise PertokenError(f"this system ({os.name}) does not tell a process's memory in /proc")
    return int(found[1]) * 1024

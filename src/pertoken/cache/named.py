"""Caches by name, for command lines and tables: one name, one budget, one new cache.

"full" is transformers' own cache that keeps everything, "fp8" its quantised one that needs no
further package. A budget is in tokens per layer and row; these two have none and take any.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pertoken.errors import PertokenError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

__all__ = ["CACHES", "UNBOUNDED", "check_budget", "check_name", "make_cache"]

Maker = Callable[["PreTrainedModel", int], "Cache"]


def _full(model: PreTrainedModel, budget: int) -> Cache:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _fp8(model: PreTrainedModel, budget: int) -> Cache:
    from transformers import QuantizedCache

    try:
        return QuantizedCache("fp8", config=model.config)
    except ValueError as error:  # sliding windows, or a transformers that has no fp8 yet
        raise PertokenError(f"fp8 cannot hold {type(model).__name__}: {error}") from None


def _own(module: str, name: str, **options: Any) -> Maker:
    def make(model: PreTrainedModel, budget: int) -> Cache:
        kind = getattr(import_module(f"pertoken.cache.{module}"), name)
        cache: Cache = kind(model, budget, **options)
        return cache

    return make


def _snapkv(model: PreTrainedModel, budget: int) -> Cache:
    # Its observation window lies within the budget: half of it where the usual 32 do not fit.
    return _own("snapkv", "SnapKVCache", window=min(32, (budget + 1) // 2))(model, budget)


_kv_direct = partial(_own, "kv_direct", "KVDirectCache")

CACHES: dict[str, Maker] = {
    "full": _full,
    "fp8": _fp8,
    "kv-direct": _kv_direct(),
    "kv-direct:turn": _kv_direct(rematerialize="turn"),
    "kv-direct:residual": _kv_direct(checkpoint="residual"),
    "kv-direct:residual:turn": _kv_direct(checkpoint="residual", rematerialize="turn"),
    "kv-direct:per_layer": _kv_direct(checkpoint="per_layer"),
    "kv-direct:per_layer:turn": _kv_direct(checkpoint="per_layer", rematerialize="turn"),
    "window": _own("window", "WindowCache"),
    "streaming-llm": _own("streaming_llm", "StreamingLLMCache"),
    "h2o": _own("h2o", "H2OCache"),
    "snapkv": _snapkv,
    "tova": _own("tova", "TOVACache"),
}
"""Name -> function of a model and a budget in tokens that makes an empty cache."""

UNBOUNDED = frozenset({"full", "fp8"})
"""Names of caches that keep every token, whatever the budget."""


def make_cache(name: str, model: PreTrainedModel, budget: int) -> Cache:
    """A new, empty cache of a name in `CACHES`.

    budget: tokens per layer and batch row, 1 or more; "full" and "fp8" keep all and ignore it.
    "snapkv" observes with the last 32 tokens, or with half of a budget below 64 (our reading).
    Raises PertokenError for an unknown name, suggesting the nearest, and for a budget that is no
    whole number from 1 on.

    >>> from pertoken.testing import tiny_model
    >>> type(make_cache("full", tiny_model("llama"), budget=64)).__name__
    'DynamicCache'
    """
    check_name(name)
    check_budget(budget)
    return CACHES[name](model, budget)


def check_name(name: str) -> None:
    """Raise PertokenError, with the nearest names, for a name that no cache has."""
    if name not in CACHES:
        raise PertokenError(
            f"unknown cache {name!r}{nearest(name, CACHES)}; known: {', '.join(CACHES)}"
        )


def check_budget(budget: int) -> None:
    """Raise PertokenError for a budget that is no whole number from 1 on."""
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise PertokenError(f"the budget of a cache is a whole number from 1 on, got {budget!r}")

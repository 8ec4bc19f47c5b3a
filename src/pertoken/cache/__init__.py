"""KV caches: exact under a budget, evicting at a known cost, or stored on disk.

Each cache is an object to hand to `generate`: ``past_key_values=KVDirectCache(model, budget=256)``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pertoken.cache.kv_direct import KVDirectCache as KVDirectCache

__all__ = ["KVDirectCache"]

_HOME = {"KVDirectCache": "kv_direct"}
    from pertoken.cache.h2o import H2OCache
    from pertoken.cache.snapkv import SnapKVCache
    from pertoken.cache.streaming_llm import StreamingLLMCache
    from pertoken.cache.tova import TOVACache
    from pertoken.cache.window import WindowCache

__all__ = [
    "H2OCache",
    "SnapKVCache",
    "StreamingLLMCache",
    "TOVACache",
    "WindowCache",
]

_HOME = {
    "H2OCache": "h2o",
    "SnapKVCache": "snapkv",
    "StreamingLLMCache": "streaming_llm",
    "TOVACache": "tova",
    "WindowCache": "window",
    from pertoken.cache.fidelity import Fidelity, Turn, cache_fidelity, compare_caches
    from pertoken.cache.fidelity_report import fidelity_table
    from pertoken.cache.memory import cache_bytes, full_cache_bytes
    from pertoken.cache.named import CACHES, make_cache

__all__ = [
    "CACHES",
    "Fidelity",
    "Turn",
    "cache_bytes",
    "cache_fidelity",
    "compare_caches",
    "fidelity_table",
    "full_cache_bytes",
    "make_cache",
]

_HOME = {
    "CACHES": "named",
    "Fidelity": "fidelity",
    "Turn": "fidelity",
    "cache_bytes": "memory",
    "cache_fidelity": "fidelity",
    "compare_caches": "fidelity",
    "fidelity_table": "fidelity_report",
    "full_cache_bytes": "memory",
    "make_cache": "named",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

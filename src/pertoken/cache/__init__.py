"""KV caches: exact under a budget, evicting at a known cost, or stored on disk.

Each cache is an object to hand to `generate`: ``past_key_values=KVDirectCache(model, budget=256)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.cache.archive import (
        Inspection,
        Restored,
        Saved,
        inspect_cache,
        restore_cache,
        save_cache,
    )
    from pertoken.cache.fidelity import Fidelity, Turn, cache_fidelity, compare_caches
    from pertoken.cache.fidelity_report import fidelity_table
    from pertoken.cache.fingerprint import model_fingerprint
    from pertoken.cache.h2o import H2OCache
    from pertoken.cache.kv_direct import KVDirectCache
    from pertoken.cache.memory import cache_bytes, full_cache_bytes
    from pertoken.cache.named import CACHES, make_cache
    from pertoken.cache.prefix_trie import PrefixTrie, canonical_text
    from pertoken.cache.quantize import (
        KIVI,
        Int4,
        Int8,
        Predictive,
        TurboQuant,
        decode_cache,
        encode_cache,
        fit_predictor,
    )
    from pertoken.cache.rate_distortion import paper_ratio
    from pertoken.cache.snapkv import SnapKVCache
    from pertoken.cache.streaming_llm import StreamingLLMCache
    from pertoken.cache.tova import TOVACache
    from pertoken.cache.window import WindowCache

__all__ = [
    "CACHES",
    "KIVI",
    "Fidelity",
    "H2OCache",
    "Inspection",
    "Int4",
    "Int8",
    "KVDirectCache",
    "Predictive",
    "PrefixTrie",
    "Restored",
    "Saved",
    "SnapKVCache",
    "StreamingLLMCache",
    "TOVACache",
    "TurboQuant",
    "Turn",
    "WindowCache",
    "cache_bytes",
    "cache_fidelity",
    "canonical_text",
    "compare_caches",
    "decode_cache",
    "encode_cache",
    "fidelity_table",
    "fit_predictor",
    "full_cache_bytes",
    "inspect_cache",
    "make_cache",
    "model_fingerprint",
    "paper_ratio",
    "restore_cache",
    "save_cache",
]

_HOME = {
    "CACHES": "named",
    "Fidelity": "fidelity",
    "H2OCache": "h2o",
    "Inspection": "archive",
    "Int4": "quantize",
    "Int8": "quantize",
    "KIVI": "quantize",
    "KVDirectCache": "kv_direct",
    "Predictive": "quantize",
    "PrefixTrie": "prefix_trie",
    "Restored": "archive",
    "Saved": "archive",
    "SnapKVCache": "snapkv",
    "StreamingLLMCache": "streaming_llm",
    "TOVACache": "tova",
    "TurboQuant": "quantize",
    "Turn": "fidelity",
    "WindowCache": "window",
    "cache_bytes": "memory",
    "cache_fidelity": "fidelity",
    "canonical_text": "prefix_trie",
    "compare_caches": "fidelity",
    "decode_cache": "quantize",
    "encode_cache": "quantize",
    "fidelity_table": "fidelity_report",
    "fit_predictor": "quantize",
    "full_cache_bytes": "memory",
    "inspect_cache": "archive",
    "make_cache": "named",
    "model_fingerprint": "fingerprint",
    "paper_ratio": "rate_distortion",
    "restore_cache": "archive",
    "save_cache": "archive",
}

__getattr__, __dir__ = lazy(__name__, _HOME)

"""KV caches: exact under a budget, evicting at a known cost, or stored on disk.

Each cache is an object to hand to `generate`: ``past_key_values=KVDirectCache(model, budget=256)``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pertoken.cache.archive import (
        Inspection,
        Restored,
        Saved,
        inspect_cache,
        restore_cache,
        save_cache,
    )
    from pertoken.cache.fingerprint import (
        model_fingerprint,
    )
    from pertoken.cache.prefix_trie import (
        PrefixTrie,
        canonical_text,
    )
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
    from pertoken.cache.rate_distortion import (
        paper_ratio,
    )

__all__ = [
    "KIVI",
    "Inspection",
    "Int4",
    "Int8",
    "Predictive",
    "PrefixTrie",
    "Restored",
    "Saved",
    "TurboQuant",
    "canonical_text",
    "decode_cache",
    "encode_cache",
    "fit_predictor",
    "inspect_cache",
    "model_fingerprint",
    "paper_ratio",
    "restore_cache",
    "save_cache",
]

_HOME: dict[str, str] = {
    "KIVI": "quantize",
    "Inspection": "archive",
    "Int4": "quantize",
    "Int8": "quantize",
    "Predictive": "quantize",
    "PrefixTrie": "prefix_trie",
    "Restored": "archive",
    "Saved": "archive",
    "TurboQuant": "quantize",
    "canonical_text": "prefix_trie",
    "decode_cache": "quantize",
    "encode_cache": "quantize",
    "fit_predictor": "quantize",
    "inspect_cache": "archive",
    "model_fingerprint": "fingerprint",
    "paper_ratio": "rate_distortion",
    "restore_cache": "archive",
    "save_cache": "archive",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

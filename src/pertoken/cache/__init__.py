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
    from pertoken.cache.fingerprint import model_fingerprint

__all__ = [
    "Inspection",
    "Restored",
    "Saved",
    "inspect_cache",
    "model_fingerprint",
    "restore_cache",
    "save_cache",
]

_HOME: dict[str, str] = {
    "Inspection": "archive",
    "Restored": "archive",
    "Saved": "archive",
    "inspect_cache": "archive",
    "model_fingerprint": "fingerprint",
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

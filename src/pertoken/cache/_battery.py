"""How the caches are made for the laws of `pertoken.testing`, and what does not apply to them."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

from pertoken.cache.archive import restore_cache, save_cache
from pertoken.cache.named import make_cache
from pertoken.testing import check_cache_restores, check_leaves_no_trace
from pertoken.testing.battery import Subject

__all__ = ["SUBJECTS"]


def _stored(level: str, model: Any, ids: Any, cache: Any) -> Any:
    """What a cache that has seen `ids` [1, time] is behind a file of this level."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/talk.ptkv"
        save_cache(path, model, ids, cache=cache, level=level, chunk=ids.shape[1])
        return restore_cache(path, model).cache


def _restores(level: str, model: Any) -> None:
    check_cache_restores(partial(_stored, level), model)


_STORES = "it stores what transformers' cache holds; while decoding it does nothing"
_WHILE_DECODING = (
    "equals a full cache",
    "exact within its budget",
    "batch = single",
    "turns",
    "reorder",
    "crop",
)
_EVICTING = ("h2o", "snapkv", "streaming-llm", "tova", "window")

SUBJECTS = (
    *(
        Subject(
            name,
            "cache",
            partial(make_cache, name),
            skip={"exact within its budget": "it evicts: what is gone changes the output"},
            refuses={"crop": "it refuses by name: what the taken-back tokens evicted is gone"},
        )
        for name in _EVICTING
    ),
    Subject("kv-direct", "cache", partial(make_cache, "kv-direct")),
    Subject(
        "plt-kv",
        "cache",
        _stored,
        skip=dict.fromkeys(_WHILE_DECODING, _STORES),
        laws={
            "restored as stored": lambda case: _restores("raw", case.model),
            "restored from tokens": lambda case: _restores("tokens", case.model),
            "no trace": lambda case: check_leaves_no_trace(
                case.model, partial(_restores, "raw"), rng=True
            ),
        },
    ),
)

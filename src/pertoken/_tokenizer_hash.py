"""One short name for "this very tokenizer": what its ids mean and how it cuts, hashed."""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePath
from typing import Any

__all__ = ["tokenizer_hash", "tokenizer_name"]


def tokenizer_hash(tokenizer: Any) -> str:
    """32 hexadecimal digits (128 bits of sha256) of a tokenizer's rules and vocabulary; of
    one without a backend, of its class and vocabulary.

    Padding and truncation do not count: calls change them.

    >>> from pertoken.testing import ByteTokenizer
    >>> tokenizer_hash(ByteTokenizer()) == tokenizer_hash(ByteTokenizer())
    True
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts: Any = [type(tokenizer).__name__, getattr(tokenizer, "get_vocab", dict)()]
    if backend is not None:
        rules = json.loads(backend.to_str())
        parts = [rules[key] for key in sorted(rules) if key not in ("padding", "truncation")]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def tokenizer_name(tokenizer: Any) -> str:
    """A readable name: the last part of the name or folder it was loaded by, else its class."""
    path = str(getattr(tokenizer, "name_or_path", "") or "").replace("\\", "/").rstrip("/")
    return PurePath(path).name or type(tokenizer).__name__

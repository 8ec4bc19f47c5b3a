"""Text to ids: open any tokenizer, see what it costs, and change it.

``audit(["smollm2", "cl100k"]).to_html()``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.tokenize.load import as_fast, open_tokenizer
    from pertoken.tokenize.public import PUBLIC, PublicTokenizer

__all__ = ["PUBLIC", "PublicTokenizer", "as_fast", "open_tokenizer"]

_HOME = {
    "PUBLIC": "public",
    "PublicTokenizer": "public",
    "as_fast": "load",
    "open_tokenizer": "load",
}

__getattr__, __dir__ = lazy(__name__, _HOME)

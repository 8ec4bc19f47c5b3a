"""Text to ids: open any tokenizer, see what it costs, and change it.

``audit(["smollm2", "cl100k"]).to_html()``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.tokenize.load import as_fast, open_tokenizer
    from pertoken.tokenize.public import PUBLIC, PublicTokenizer
    from pertoken.tokenize.report import SECTIONS, Audit, audit
    from pertoken.tokenize.section import Row, Section

__all__ = [
    "PUBLIC",
    "SECTIONS",
    "Audit",
    "PublicTokenizer",
    "Row",
    "Section",
    "as_fast",
    "audit",
    "open_tokenizer",
]

_HOME = {
    "PUBLIC": "public",
    "SECTIONS": "report",
    "Audit": "report",
    "PublicTokenizer": "public",
    "Row": "section",
    "Section": "section",
    "as_fast": "load",
    "audit": "report",
    "open_tokenizer": "load",
}

__getattr__, __dir__ = lazy(__name__, _HOME)

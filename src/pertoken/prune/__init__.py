"""Fewer tokens for the same purpose: drop what a prompt can do without.

``compress("A long prompt. Answer with one word.", keep=0.6).text``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.prune._protect import ANSWER_FORMAT
    from pertoken.prune.compressed import CompressedChat, CompressedPrompt, Word
    from pertoken.prune.frugalprompt import SALIENCE, compress

__all__ = ["ANSWER_FORMAT", "SALIENCE", "CompressedChat", "CompressedPrompt", "Word", "compress"]

_HOME = {
    "ANSWER_FORMAT": "_protect",
    "SALIENCE": "frugalprompt",
    "CompressedChat": "compressed",
    "CompressedPrompt": "compressed",
    "Word": "compressed",
    "compress": "frugalprompt",
}

__getattr__, __dir__ = lazy(__name__, _HOME)

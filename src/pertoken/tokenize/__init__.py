"""Text to ids: what a tokenizer costs, and how to change it.

``model, tokenizer = transplant(model, tokenizer, train_supertokens(texts, 32_000))``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.tokenize._embed import SelfEmbedder
    from pertoken.tokenize.check import check_transplant, save_transplant
    from pertoken.tokenize.per_byte import bits_per_byte, nats_per_text, perplexity_per_byte
    from pertoken.tokenize.supertokens import train_supertokens
    from pertoken.tokenize.tokenadapt import METHODS, Transplant, transplant

__all__ = [
    "METHODS",
    "SelfEmbedder",
    "Transplant",
    "bits_per_byte",
    "check_transplant",
    "nats_per_text",
    "perplexity_per_byte",
    "save_transplant",
    "train_supertokens",
    "transplant",
]

_HOME = {
    "METHODS": "tokenadapt",
    "SelfEmbedder": "_embed",
    "Transplant": "tokenadapt",
    "bits_per_byte": "per_byte",
    "check_transplant": "check",
    "nats_per_text": "per_byte",
    "perplexity_per_byte": "per_byte",
    "save_transplant": "check",
    "train_supertokens": "supertokens",
    "transplant": "tokenadapt",
}

__getattr__, __dir__ = lazy(__name__, _HOME)

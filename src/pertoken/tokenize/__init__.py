"""Text to ids: what a tokenizer costs, and how to get a better one.

``train_tokenizer(texts, 4096, "superword")``; ``token_premiums({"eng": [...], "tur": [...]}, tok)``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.tokenize.premiums import Premiums, corpus_token_counts, token_premiums
    from pertoken.tokenize.spread import (
        PowerLaw,
        Regression,
        SpreadTest,
        optimal_vocabulary,
        regression,
        spread_test,
    )
    from pertoken.tokenize.sweeps import Sweep, read_sweep, sweep
    from pertoken.tokenize.train import KINDS, train_tokenizer

__all__ = [
    "KINDS",
    "PowerLaw",
    "Premiums",
    "Regression",
    "SpreadTest",
    "Sweep",
    "corpus_token_counts",
    "optimal_vocabulary",
    "read_sweep",
    "regression",
    "spread_test",
    "sweep",
    "token_premiums",
    "train_tokenizer",
]

_HOME = {
    "KINDS": "train",
    "PowerLaw": "spread",
    "Premiums": "premiums",
    "Regression": "spread",
    "SpreadTest": "spread",
    "Sweep": "sweeps",
    "corpus_token_counts": "premiums",
    "optimal_vocabulary": "spread",
    "read_sweep": "sweeps",
    "regression": "spread",
    "spread_test": "spread",
    "sweep": "sweeps",
    "token_premiums": "premiums",
    "train_tokenizer": "train",
}

__getattr__, __dir__ = lazy(__name__, _HOME)

"""How the decoding methods are made for the laws of `pertoken.testing`, and what does not apply."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from pertoken.decode._ngram_counts import count
from pertoken.decode.awrs import AWRS
from pertoken.decode.balanced import Balanced
from pertoken.decode.byte_model import ByteModel
from pertoken.decode.goose import Goose
from pertoken.decode.lookahead import Lookahead
from pertoken.decode.ngram_style import Corpus, NGramStyle
from pertoken.decode.prompt_lookup import PromptLookup
from pertoken.decode.sift import Wording, sift
from pertoken.decode.suffix import SuffixTree
from pertoken.decode.token_recycling import TokenRecycling
from pertoken.testing.battery import Subject

__all__ = ["SUBJECTS"]


class Anything:
    """The constraint that allows every text."""

    def accepts(self, ids: Sequence[int]) -> bool:
        return True

    def complete(self, ids: Sequence[int]) -> bool:
        return True


def _bytes(model: Any, tokenizer: Any, prompt: str, seed: int) -> bytes:
    return ByteModel(model, tokenizer).sample(prompt[:9], 4, seed=seed)


def _style(**settings: Any) -> Any:
    """A style of random text in the 32 tokens of the laws' models."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, 32, 400).tolist()]
    corpus = Corpus(count(texts, 32, 3), tokenizer="ids", sha256="", texts=1, tokens=400)
    return NGramStyle(corpus)(strength=1.0, **settings)


def _sift(model: Any, tokenizer: Any, prompt: str) -> Any:
    """With a wording that fits the laws' tiny models."""
    short = Wording(
        "Facts: {question}", "{question} {sticker}", "{prediction}", "{sticker}", "{text}"
    )
    return sift(prompt[:20], model, tokenizer=tokenizer, max_new_tokens=5, wording=short)


_SAMPLES = "it samples: there is no greedy text"

SUBJECTS = (
    Subject(
        "awrs",
        "generate",
        partial(AWRS, Anything()),
        {
            "lossless": _SAMPLES,
            "lossless with processors": _SAMPLES,
            "batch = single": "each row of a batch is a draw of its own",
        },
    ),
    Subject(
        "balanced",
        "generate",
        partial(Balanced, k=3),
        settings={"branching=5": partial(Balanced, k=5)},
    ),
    Subject("byte-probabilities", "text", _bytes),
    Subject(
        "goose",
        "generate",
        Goose,
        settings={
            "budget=7": partial(Goose, budget=7),
            "shape=paper": partial(Goose, shape="paper"),
        },
    ),
    Subject("ngram-style", "logits", _style),
    Subject("sift", "text", _sift),
    *(
        Subject(kind.slug, "generate", kind, settings={"budget=7": partial(kind, budget=7)})
        for kind in (Lookahead, PromptLookup, SuffixTree, TokenRecycling)
    ),
)

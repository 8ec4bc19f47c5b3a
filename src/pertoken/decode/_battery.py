"""How the decoding methods are made for the laws of `pertoken.testing`, and what does not apply."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from pertoken.decode.awrs import AWRS
from pertoken.decode.balanced import Balanced
from pertoken.decode.byte_model import ByteModel
from pertoken.decode.cascade import Cascade
from pertoken.decode.goose import Goose
from pertoken.decode.lookahead import Lookahead
from pertoken.decode.prompt_lookup import PromptLookup
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


def _cascade(model: Any, tokenizer: Any, prompt: str, seed: int) -> tuple[str, ...]:
    """Half of what is left of a prompt, of itself."""
    member = (model, tokenizer)
    made = Cascade(member, member, "chow-average", max_new_tokens=4, seed=seed)
    questions = [prompt[:size] for size in (3, 5, 7, 9)]
    return made.fit(made.answer(questions)).generate(questions, rate=0.5).texts


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
    Subject("lm-cascades", "text", _cascade),
    *(
        Subject(kind.slug, "generate", kind, settings={"budget=7": partial(kind, budget=7)})
        for kind in (Lookahead, PromptLookup, SuffixTree, TokenRecycling)
    ),
)

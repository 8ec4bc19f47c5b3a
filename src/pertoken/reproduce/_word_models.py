"""The two models that are asked about words, and sentences and words of Brown for them."""

from __future__ import annotations

from typing import Any

from pertoken.reproduce._context import Context
from pertoken.reproduce._tokenadapt_texts import prose

__all__ = ["DEVELOPMENT", "REPORT", "SECOND", "TwoModels", "brown_sentences", "brown_words"]

SECOND = "gemma3-270m"  # its terms must have been accepted: PERTOKEN_ACCEPT_LICENCE=gemma3-270m
DEVELOPMENT, REPORT = 1, 3  # what the number of a text leaves when divided by 4
_SMOKE = [
    {"words": [sentence.split()]}
    for sentence in (
        "the cat sat on the mat and the dog on the log today .",
        "how many legs has a cat with a hat in the house now .",
    )
] * 2
_SMOKE_WORDS = [
    {"words": [[first + "tterlegibl"[: n - 1] for n in range(4, 11) for first in "abcde"]]}
] * 4


class TwoModels:
    """The models of a run by "first" and "second", each loaded when it is first needed."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._loaded: dict[str, Any] = {}

    def load(self, which: str) -> Any:
        """(model, tokenizer); in a smoke run a tiny one whose tokens are bytes and some words."""
        if which not in self._loaded:
            self._loaded[which] = self._load(which)
        return self._loaded[which]

    def _load(self, which: str) -> Any:
        context = self._context
        if context.smoke:
            from pertoken.testing import tiny_model, tiny_tokenizer

            tokenizer = tiny_tokenizer()
            size: dict[str, Any] = {"vocab_size": len(tokenizer), "max_positions": 1024}
            return tiny_model("llama", seed=context.seed, **size), tokenizer
        if which == "first":
            return context.load()
        from pertoken.loading import load

        return load(SECOND, device=context.device, dtype=context.dtype, kind="decoder")


def brown_sentences(context: Context, part: int, shortest: int, longest: int) -> list[str]:
    """Sentences of one part of Brown with so many words, marks counted too; each once.

    The texts take turns, so that the first so many are of all genres.
    """
    rows = context.data("brown", smoke_rows=_SMOKE)
    texts = [
        [
            prose([sentence])
            for sentence in row["words"]
            if shortest <= len(sentence) <= longest and sentence[-1] == "."
        ]
        for place, row in enumerate(rows)
        if place % 4 == part
    ]
    most = max(map(len, texts), default=0)
    turns = [text[turn] for turn in range(most) for text in texts if turn < len(text)]
    return [each for each in dict.fromkeys(turns) if "[" not in each and "]" not in each]


def brown_words(context: Context, part: int) -> list[str]:
    """The words of 4 to 10 letters of one part of Brown, their case kept."""
    from pertoken.probe._questions import words_in

    rows = context.data("brown", smoke_rows=_SMOKE_WORDS)
    return words_in(
        " ".join(sentence)
        for place, row in enumerate(rows)
        if place % 4 == part
        for sentence in row["words"]
    )

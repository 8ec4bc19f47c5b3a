"""Prompt lookup: draft what followed the last few tokens where they first stood in the text.

Two published variants, both without a model or a data set:

* ``"transformers"`` (default): what ``generate(prompt_lookup_num_tokens=10)`` of transformers does.
  n-grams of 2, then 1 tokens; the first place where the n-gram has anything behind it; up to 10
  tokens are copied, fewer when the text ends before.
* ``"original"``: the function the method was published as (github.com/apoorvumang/
  prompt-lookup-decoding). n-grams of 3, 2, 1; only places with all 10 tokens behind them.

Both scan the whole text in every step; here a table of first places gives the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pertoken.decode._edges import EdgeBook, bucket
from pertoken.decode.drafter import Drafter
from pertoken.decode.tree import TokenTree
from pertoken.errors import PertokenError, nearest

_LONGEST = {"transformers": 2, "original": 3}


class FirstPlaces:
    """For every n-gram of a growing text: the position behind its first occurrence.

    >>> places = FirstPlaces(2)
    >>> places.update([7, 8, 9, 7, 8])
    >>> places.after((7, 8)), places.after((9,)), places.after((8, 9))
    (2, 3, 3)
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._first: dict[tuple[int, ...], int] = {}
        self._done = 1  # an n-gram counts once a token stands behind it

    def update(self, text: list[int]) -> None:
        """Take in what was appended to the text since the last call."""
        for end in range(self._done, len(text)):
            for length in range(1, min(self.longest, end) + 1):
                self._first.setdefault(tuple(text[end - length : end]), end)
        self._done = max(self._done, len(text))

    def after(self, ngram: tuple[int, ...]) -> int | None:
        """Position of the token behind the n-gram's first occurrence, or None."""
        return self._first.get(ngram)


class PromptLookup(Drafter):
    """Drafts a copy of earlier text (prompt lookup decoding).

    Args:
        variant: ``"transformers"`` or ``"original"``, see the module.
        max_ngram: longest n-gram looked up; the variant's own (2 or 3) by default.
        stop_ids: a copy ends before any of these. transformers does so with its stop tokens;
            without them a stop token may be drafted, which saves the last forward pass.
        budget: tokens copied (10), or ``"auto"``.

    Example: ``model.generate(**inputs, max_new_tokens=64, custom_generate=PromptLookup())``
    """

    slug = "prompt-lookup"
    default_budget = 10

    def __init__(
        self,
        *,
        variant: Literal["transformers", "original"] = "transformers",
        max_ngram: int | None = None,
        stop_ids: Iterable[int] = (),
        budget: int | Literal["auto"] | None = None,
        keep: bool = False,
        streamer: Any = None,
        tokenizer: Any = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        super().__init__(
            budget=budget,
            keep=keep,
            streamer=streamer,
            tokenizer=tokenizer,
            stop_strings=stop_strings,
        )
        if variant not in _LONGEST:
            raise PertokenError(
                f"unknown variant {variant!r} of prompt lookup{nearest(variant, _LONGEST)}"
            )
        if max_ngram is not None and max_ngram < 1:
            raise PertokenError(f"max_ngram must be at least 1, not {max_ngram}")
        self.variant = variant
        self.max_ngram = max_ngram
        self.longest = _LONGEST[variant] if max_ngram is None else max_ngram
        self.stop_ids = frozenset(stop_ids)
        self._edges = EdgeBook()
        self._places: list[FirstPlaces] = []

    def begin(self, vocab_size: int) -> None:
        """Forget the last call's texts."""
        super().begin(vocab_size)
        self._places = [FirstPlaces(self.longest) for _ in self.contexts]

    def propose(self, row: int, budget: int, room: int) -> TokenTree:
        """One chain: the copy, or the root alone."""
        context = self.contexts[row]
        self._places[row].update(context)
        tree = self._edges.open(row, TokenTree(context[-1]))
        length, copy = self._copy(row, budget)
        node = 0
        for depth, token in enumerate(copy[:room], start=1):
            prior = min(0.9, 0.35 + 0.15 * length) if depth == 1 else 0.8
            node = self._edges.add(row, node, token, "copy", ("copy", length, bucket(depth)), prior)
        return tree

    def commit(self, row: int, tokens: list[int]) -> None:
        """Learn how often copies of this kind are right."""
        super().commit(row, tokens)
        self._edges.settle(row, tokens)

    def _copy(self, row: int, tokens: int) -> tuple[int, list[int]]:
        """(length of the n-gram found, what followed it)."""
        context = self.contexts[row]
        for length in range(min(self.longest, len(context) - 1), 0, -1):
            start = self._places[row].after(tuple(context[-length:]))
            if start is None:
                continue
            if self.variant == "original" and (
                start + tokens > len(context) or start >= len(context) - length
            ):
                continue
            copy = context[start : start + tokens]
            for place, token in enumerate(copy):
                if token in self.stop_ids:
                    return length, copy[:place]
            return length, copy
        return 0, []

"""Forbid a word in every encoding where it would stand again: a `LogitsProcessor`.

The intervention of "Say Anything but This" (arXiv 2601.14658): while a target is being written,
tokens that begin an encoding of its text are masked, whatever the encoding, so that the model can
neither copy the word nor write it with other tokens. The paper finds phantom edits at 0 to 5 % of
the trials then, and real replacements instead.

A target is being written behind the word that stands before it in the text; blanks and punctuation
may come between, and the brackets. A token is masked if it is a beginning of what is left of the
target, white space and punctuation at its ends aside, and the rest can be written too. The first
token that goes another way ends it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from transformers import LogitsProcessor

from pertoken._shown import Shown
from pertoken.byte_vocab import ByteVocab
from pertoken.errors import PertokenError
from pertoken.probe._marked import WORD, mark
from pertoken.tokenize.ways import Ways

__all__ = ["SurfaceMask"]

_INSIDE = re.compile(rb"[^\w\x80-\xff]*([\w\x80-\xff]+)(.*)", re.DOTALL)


class SurfaceMask(Shown, LogitsProcessor):
    """Keeps marked words from being written again: ``logits_processor=[SurfaceMask(…)]``.

    Args:
        tokenizer: a fast tokenizer with a byte view.
        texts: for each row of the batch its text with the targets in [brackets].
        prompt_length: tokens of the (padded) prompt; what is behind it is the model's own text.

    Rows with several beams or draws stand in a row, as `generate` puts them. Raises PertokenError
    for a tokenizer without a byte view, texts without marks, and rows that don't fit the texts.

    >>> from pertoken.testing import tiny_tokenizer
    >>> tokenizer = tiny_tokenizer()
    >>> mask = SurfaceMask(tokenizer, texts=["the [cat] sat"], prompt_length=0)
    >>> ids = torch.tensor([tokenizer.encode("the")])
    >>> scores = mask(ids, torch.zeros(1, len(tokenizer)))
    >>> sorted(tokenizer.decode(token) for token in scores[0].isneginf().nonzero())
    [' c', ' cat', 'c']
    """

    def __init__(self, tokenizer: Any, *, texts: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.texts, self.prompt_length = tokenizer, list(texts), prompt_length
        for number, text in enumerate(texts, 1):
            if "[" not in text:
                raise PertokenError(f"text {number} has no word in [brackets] to mask")
        self._vocab = ByteVocab(tokenizer)
        self._stems = _stems(self._vocab)
        self._forbidden: dict[str, torch.Tensor] = {}
        marked = [mark(text, 1, 0, f"text {number}") for number, text in enumerate(texts, 1)]
        # Of each row: (the word before a target, the target).
        self._targets = [
            [
                (WORD.findall(each.text[:start])[-1], each.text[start:end])
                for start, end in each.targets
            ]
            for each in marked
        ]

    def of_rows(self, rows: Sequence[int], prompt_length: int) -> SurfaceMask:
        """The mask of some of the texts, for a batch of their own."""
        found = copy(self)
        found.texts = [self.texts[row] for row in rows]
        found.prompt_length = prompt_length
        found._targets = [self._targets[row] for row in rows]
        return found

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [batch, vocab], -inf for tokens that write a target; input_ids: [batch, time]."""
        each, rest = divmod(len(input_ids), len(self._targets))
        if rest or not each:
            raise PertokenError(
                f"a SurfaceMask of {len(self._targets)} texts does not fit {len(input_ids)} rows"
            )
        masked = scores.clone()
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            for left in self._left(ids, self._targets[row // each]):
                masked[row, self._tokens(left).to(scores.device)] = -torch.inf
        return masked

    def _left(self, ids: Sequence[int], targets: Sequence[tuple[str, str]]) -> list[str]:
        """What is left to write of the targets that may be in writing."""
        spelled = b"".join(self._spelled(token) for token in ids)
        words = [word[0] for word in WORD.finditer(spelled.decode("utf-8", "ignore"))]
        found = []
        for before, target in targets:
            if words[-1:] == [before]:
                found.append(target)
            elif words[-2:-1] == [before] and target.startswith(words[-1]) and words[-1] != target:
                found.append(target[len(words[-1]) :])
        return found

    def _spelled(self, token: int) -> bytes:
        known = self._vocab.token_bytes
        return known[token] or b"" if token < len(known) else b""

    def _tokens(self, left: str) -> torch.Tensor:
        """The tokens that begin an encoding of what is left of a word."""
        if left not in self._forbidden:
            spelled = left.encode()
            ends = Ways(self._vocab, spelled).ends
            found = list(self._stems.get((spelled, False), []))  # punctuation behind the word
            for cut in range(1, len(spelled) + 1):
                if ends[cut]:
                    found += self._stems.get((spelled[:cut], True), [])
            self._forbidden[left] = torch.tensor(found, dtype=torch.long)
        return self._forbidden[left]


def _stems(vocab: ByteVocab) -> dict[tuple[bytes, bool], list[int]]:
    """Tokens by the first run of letters in them, and whether nothing stands behind it."""
    found: dict[tuple[bytes, bool], list[int]] = {}
    for token, spelled in enumerate(vocab.token_bytes):
        inside = _INSIDE.fullmatch(spelled) if spelled else None
        if inside is not None:
            found.setdefault((inside[1], not inside[2]), []).append(token)
    return found

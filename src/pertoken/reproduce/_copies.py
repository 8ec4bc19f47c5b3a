"""Texts that are not copies of each other: mails come again, with another name on top."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["unlike"]

WORDS, MOST = 8, 0.3


def unlike(texts: Sequence[str], known: Iterable[str] = ()) -> list[int]:
    """Places of the texts that are no near copy of a known one, nor of an earlier one kept.

    A near copy shares more than 30 % of its runs of eight words with one other text. Blanks, line
    ends and case do not count.

    >>> mail = " ".join(f"word{n}" for n in range(30))
    >>> unlike([mail, f"Hi\\n{mail}", "another text"]), unlike([mail], known=[mail.upper()])
    ([0, 2], [])
    """
    seen = [_runs(text) for text in known]
    kept = []
    for place, text in enumerate(texts):
        own = _runs(text)
        if all(len(own & other) <= MOST * len(own) for other in seen):
            kept.append(place)
            seen.append(own)
    return kept


def _runs(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[at : at + WORDS]) for at in range(max(1, len(words) - WORDS + 1))}

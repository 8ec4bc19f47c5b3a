"""What must survive: patterns by name, patterns of the user's, and how an answer shall look."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from pertoken.errors import PertokenError, nearest
from pertoken.prune._text import Span, overlapping

__all__ = ["ANSWER_FORMAT", "NAMED", "Pattern", "Protected", "find", "patterns"]

NAMED = {
    # A fence that is never closed reaches to the end, as it does for a reader of Markdown.
    "code": r"(?ms)^[ \t]*(`{3,}|~{3,}).*?(?:^[ \t]*\1[`~]*[ \t]*(?=\r?$)|\Z)|`[^`\n]+`",
    "urls": r"(?i)\b(?:[a-z][a-z0-9+.-]{0,20}://|www\.)\S+",
    "numbers": r"\d+",
}
"""Patterns that `protect` knows by name."""

# Up to the sentence's end, which is no stop inside a word, nor anything before a small letter.
_REST = r"(?-i:[^.!?\n]|[.!?](?=\w|[ \t]+[a-z])|\n[ \t]*(?=[a-z]))*[.!?]*"

ANSWER_FORMAT = (
    r"(?i)\b(?:answer|reply|respond)\s+(?:only\s+|just\s+)?(?:with|in|by|as|using)\b" + _REST,
    r"(?i)\b(?:output|return|print|give|provide|write)\s+(?:only|just|(?:valid\s+)?json|your\s+"
    r"(?:final\s+)?answer|the\s+(?:final\s+)?answer)\b" + _REST,
    r"(?im)^[ \t]*(?:final answer|answer|response|output|label|summary)[ \t]*:",
)
"""How an answer shall look: a sentence such as "Answer with …", and the cue at a line's start."""


class Pattern(NamedTuple):
    """A compiled pattern and what it is called."""

    name: str
    compiled: re.Pattern[str]


class Protected(NamedTuple):
    """start, end: characters of the text, whole words; name: of the pattern that says so."""

    start: int
    end: int
    name: str


def patterns(protect: str | Sequence[str], defaults: bool) -> tuple[list[Pattern], list[str]]:
    """The patterns asked for, and notes about them.

    Raises PertokenError for one that does not compile.

    >>> [pattern.name for pattern in patterns(["urls", "Ms? \\\\w+"], defaults=False)[0]]
    ['urls', 'Ms? \\\\w+']
    """
    found, notes = [], []
    for given in [protect] if isinstance(protect, str) else protect:
        if not isinstance(given, str):
            raise PertokenError(f"protect takes names and patterns, not {type(given).__name__}")
        if not given:
            raise PertokenError("a pattern to protect is empty")
        if given not in NAMED and given.isalpha() and (hint := nearest(given, NAMED)):
            notes.append(f"protect {given!r} was read as a pattern{hint}")
        try:
            found.append(Pattern(given, re.compile(NAMED.get(given, given))))
        except re.error as error:
            where = "" if error.pos is None else f" at character {error.pos + 1}"
            raise PertokenError(
                f"the pattern {given!r} does not compile: {error.msg}{where}"
            ) from None
    if defaults:
        found += [Pattern("answer format", re.compile(each)) for each in ANSWER_FORMAT]
    return found, notes


def find(text: str, spans: Sequence[Span], wanted: Sequence[Pattern]) -> list[Protected]:
    """Where the patterns match, each match made larger to whole words (`spans`)."""
    found = []
    for name, compiled in wanted:
        for match in compiled.finditer(text):
            start, end = match.span()
            if start == end:
                continue
            inside = overlapping(spans, start, end)
            if inside:
                start = min(start, spans[inside.start][0])
                end = max(end, spans[inside.stop - 1][1])
            # A line break of two characters is one character to a reader.
            start -= text[start - 1 : start + 1] == "\r\n"
            end += text[end - 1 : end + 1] == "\r\n"
            found.append(Protected(start, end, name))
    return found

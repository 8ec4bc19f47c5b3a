"""Words, sentences, and the text that is left when words are taken out.

All of it works on places in the original text: what is kept is cut out of it, never written anew.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

import regex

__all__ = ["add_up", "join", "kept_spans", "merge", "overlapping", "sentences", "words"]

Span = tuple[int, int]

_CLUSTER = regex.compile(r"\X")  # what a reader takes for one character
_ALONE = regex.compile(r"[\p{Han}\p{Hiragana}]")  # written without blanks between the words
_BREAK = regex.compile(r"\r\n|[\n\r\v\f\x85\u2028\u2029]")
_END = regex.compile(r"""[.!?…。！？]['"”’»)\]]*$""")
_INITIAL = regex.compile(r"\p{Lu}\.$")
_SHORT = """
    mr. mrs. ms. dr. prof. rev. gen. sen. rep. st. jr. sr. vs. etc. cf. al. fig. figs. eq. no. vol.
    pp. p. ch. sec. approx. inc. ltd. co. corp. dept. est. e.g. i.e. a.m. p.m. jan. feb. mar. apr.
    jun. jul. aug. sep. sept. oct. nov. dec.
"""
_ABBREVIATIONS = frozenset(_SHORT.split())


def words(text: str) -> list[Span]:
    """Where the words stand: runs of characters without white space.

    A Chinese character or a Japanese hiragana is a word by itself, with the marks behind it. No
    border lies inside what a reader takes for one character (accents, emoji put together).

    >>> [("ab, 你好。x"[start:end]) for start, end in words("ab, 你好。x")]
    ['ab,', '你', '好。', 'x']
    """
    found: list[Span] = []
    runs = False  # may the last word go on with a letter?
    for match in _CLUSTER.finditer(text):
        start, end = match.span()
        cluster = match[0]
        if cluster.isspace():
            runs = False
            continue
        alone = _ALONE.match(cluster) is not None
        touches = bool(found) and found[-1][1] == start
        if touches and not alone and (runs or not cluster[0].isalnum()):
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
            runs = not alone
    return found


def sentences(text: str, spans: Sequence[Span]) -> list[range]:
    """Which words make a sentence, for all sentences in order (our reading of "sentence").

    A sentence ends behind a word that ends in `. ! ? …` or their full-width forms, and at a line
    break; not before a small letter, and not behind an initial or one of a few abbreviations. An
    empty line always ends it.

    >>> text = "Dr. No came. He\\nstayed, e.g. for tea!\\n- Why?"
    >>> spans = words(text)
    >>> [text[spans[r.start][0] : spans[r.stop - 1][1]] for r in sentences(text, spans)]
    ['Dr. No came.', 'He\\nstayed, e.g. for tea!', '- Why?']
    """
    found, begin = [], 0
    for place in range(1, len(spans)):
        (start, end), (behind, _) = spans[place - 1], spans[place]
        if _is_border(text[start:end], text[end:behind], text[behind]):
            found.append(range(begin, place))
            begin = place
    return [*found, range(begin, len(spans))] if spans else []


def _is_border(before: str, gap: str, following: str) -> bool:
    breaks = len(_BREAK.findall(gap))
    if breaks > 1:
        return True
    if following.islower():
        return False
    if breaks:
        return True
    plain = before.lstrip("\"'“‘«([")
    short = plain.lower() in _ABBREVIATIONS or _INITIAL.match(plain) is not None
    return _END.search(before) is not None and not short


def merge(spans: Iterable[Span]) -> list[Span]:
    """Spans in order, those that overlap or touch as one.

    >>> merge([(4, 6), (0, 2), (1, 3), (3, 4)])
    [(0, 6)]
    """
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def overlapping(spans: Sequence[Span], start: int, end: int) -> range:
    """The places of the spans (in order, apart) that share a character with start … end.

    >>> overlapping([(0, 2), (3, 5), (6, 9)], 4, 7)
    range(1, 3)
    """
    first = bisect_right(spans, start, key=lambda span: span[1])
    return range(first, max(first, bisect_left(spans, end, key=lambda span: span[0])))


def add_up(
    spans: Sequence[Span], offsets: Iterable[Span], values: Iterable[float], into: list[float]
) -> None:
    """Add the value of each token to the word it stands in; over several words in equal parts.

    >>> sums = [0.0, 0.0]
    >>> add_up([(0, 2), (3, 5)], [(0, 1), (1, 2), (2, 5)], [1.0, 2.0, 4.0], sums)
    >>> sums
    [3.0, 4.0]
    """
    for (start, end), value in zip(offsets, values, strict=True):
        places = overlapping(spans, start, end)
        for place in places:
            into[place] += value / len(places)


def kept_spans(text: str, spans: Sequence[Span], solid: Sequence[Span]) -> list[Span]:
    """What is cut out of the text: `solid` (in order, apart) with the white space between.

    spans: all words. Where nothing was dropped the white space stays as it is. Where words were
    dropped, one run of it stays, that with the most line breaks and of those the last; at the
    beginning and at the end of the text it is the outermost one.

    >>> text = "one  two\\n three four"
    >>> [text[s:e] for s, e in kept_spans(text, words(text), [(0, 3), (16, 20)])]
    ['one', '\\n ', 'four']
    """
    found = list(solid)
    # White space lies between words; a protected text may begin or end inside it.
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    borders = [(0, 0), *solid, (len(text), len(text))]
    for (_, end), (start, _) in pairwise(borders):
        runs = [
            (max(ends[place], end), min(starts[place], start))
            for place in range(bisect_right(starts, end), bisect_left(ends, start))
        ]
        runs = [(low, high) for low, high in runs if low < high]
        if end == 0:
            runs = [run for run in runs if run[0] == 0]
        elif start == len(text):
            runs = [run for run in runs if run[1] == start]
        if runs:
            found.append(max(runs, key=lambda run: (len(_BREAK.findall(text[slice(*run)])), run)))
    return merge(found)


def join(text: str, spans: Sequence[Span]) -> str:
    """The spans as one text.

    Two words that stood apart only by what was dropped (a Chinese character between Latin letters)
    get a blank between them; everything else is the original's own characters.

    >>> join("to中be not", [(0, 2), (3, 5)])
    'to be'
    """
    parts: list[str] = []
    for start, end in spans:
        if parts and _runs_together(parts[-1][-1], text[start]):
            parts.append(" ")
        parts.append(text[start:end])
    return "".join(parts)


def _runs_together(left: str, right: str) -> bool:
    return left.isalnum() and right.isalnum() and not _ALONE.match(left) and not _ALONE.match(right)

"""Texts with marked words, and what became of each in a reply.

Words are runs of letters and digits, with single apostrophes and hyphens inside. A reply is held
against the text word by word, the targets left out: a target's place is what stands between its two
neighbours, if they are in the reply (our reading; the paper does not say how it finds the words).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from pertoken._stop_words import STOP_WORDS
from pertoken.errors import PertokenError

__all__ = ["WORD", "Marked", "Slot", "mark", "slots"]

WORD = re.compile(r"\w+(?:['\N{RIGHT SINGLE QUOTATION MARK}-]\w+)*")
_MARK = re.compile(r"\[([^\[\]\n]*)\]")
_SHORTEST = 3  # letters of a word that is chosen as a target
_MOST = 4  # words that may stand in a target's place


@dataclass(frozen=True)
class Marked:
    """A text and the places (start, end) of its target words, in order."""

    text: str
    targets: tuple[tuple[int, int], ...]

    @property
    def marked(self) -> str:
        """The text with its targets in brackets."""
        found, last = "", 0
        for start, end in self.targets:
            found += f"{self.text[last:start]}[{self.text[start:end]}]"
            last = end
        return found + self.text[last:]

    def word(self, target: int) -> str:
        """A target."""
        start, end = self.targets[target]
        return self.text[start:end]

    def starts_sentence(self, target: int) -> bool:
        """Whether a target is the first word of a sentence."""
        before = self.text[: self.targets[target][0]].rstrip(
            " \t\"'(\N{LEFT DOUBLE QUOTATION MARK}"
        )
        return not before or before[-1] in ".!?:\n"


@dataclass(frozen=True)
class Slot:
    """What stands in a target's place of a reply: characters (start, end), and if in brackets."""

    text: str
    start: int
    end: int
    bracketed: bool


def mark(text: str, share: float, seed: int, name: str = "the text") -> Marked:
    """The targets of a text: its words in [brackets], or a share of its words that are drawn.

    Drawn are words of 3 letters or more that are no stop words, at least one; never the first or
    the last word and never two in a row, so that their neighbours show their place in a reply.
    Raises PertokenError for brackets around anything but one word of letters that has neighbours,
    and for a text without a word to choose.

    >>> mark("The cat [sat] there.", 0.05, 0)
    Marked(text='The cat sat there.', targets=((8, 11),))
    >>> mark("Not a single long word would do.", 0.5, 0).marked
    'Not a [single] long [word] would do.'
    """
    given = list(_MARK.finditer(text))
    if given:
        return _given(text, given, name)
    words = list(WORD.finditer(text))
    fit = [
        place
        for place, word in enumerate(words)
        if 0 < place < len(words) - 1
        and word[0].isalpha()
        and len(word[0]) >= _SHORTEST
        and word[0].lower() not in STOP_WORDS
    ]
    if not fit:
        raise PertokenError(
            f"{name} has no word to replace: give a longer one, or mark a word inside it as [word]"
        )
    wanted = max(1, round(share * len(fit)))
    chosen: set[int] = set()
    for place in random.Random(f"{seed} {text}").sample(fit, len(fit)):
        if len(chosen) < wanted and not {place - 1, place + 1} & chosen:
            chosen.add(place)
    return Marked(text, tuple(words[place].span() for place in sorted(chosen)))


def _given(text: str, marks: Sequence[re.Match[str]], name: str) -> Marked:
    """The text without its brackets."""
    bare, targets, last = "", [], 0
    for found in marks:
        if not found[1].isalpha():
            raise PertokenError(f"{name}: {found[0]!r} must hold one word of letters")
        bare += text[last : found.start()]
        targets.append((len(bare), len(bare) + len(found[1])))
        bare += found[1]
        last = found.end()
    whole = Marked(bare + text[last:], tuple(targets))
    spans = [word.span() for word in WORD.finditer(whole.text)]
    for number, target in enumerate(targets):
        place = spans.index(target) if target in spans else 0
        beside = (
            {spans[place - 1], spans[place + 1]} if 0 < place < len(spans) - 1 else set(targets)
        )
        if beside & set(targets):
            raise PertokenError(
                f"{name}: [{whole.word(number)}] must be a whole word with an unmarked word on "
                "either side"
            )
    return whole


def slots(marked: Marked, reply: str) -> tuple[list[Slot | None], int]:
    """The place of each target in a reply, None where there is none; and other words changed.

    >>> slots(mark("The cat [sat] there.", 0.05, 0), "The cat [stood] there!")
    ([Slot(text='stood', start=9, end=14, bracketed=True)], 0)
    >>> slots(mark("The cat [sat] there.", 0.05, 0), "A dog sat.")
    ([None], 3)
    """
    words = list(WORD.finditer(marked.text))
    targets = {span: number for number, span in enumerate(marked.targets)}
    plain = ["" if word.span() in targets else word[0] for word in words]
    answer = list(WORD.finditer(reply))
    match = SequenceMatcher(None, plain, [word[0] for word in answer], autojunk=False)
    at = {
        block.a + step: block.b + step
        for block in match.get_matching_blocks()
        for step in range(block.size)
    }
    found: list[Slot | None] = [None] * len(targets)
    for place, word in enumerate(words):
        if word.span() not in targets or place - 1 not in at or place + 1 not in at:
            continue
        between = answer[at[place - 1] + 1 : at[place + 1]]
        if 1 <= len(between) <= _MOST:
            start, end = between[0].start(), between[-1].end()
            bracketed = reply[start - 1 : start] == "[" and reply[end : end + 1] == "]"
            found[targets[word.span()]] = Slot(reply[start:end], start, end, bracketed)
    return found, len(plain) - len(targets) - len(at)

"""The eight kinds of tokenizer artifacts of "Say Anything but This" (arXiv 2601.14658).

A phantom edit writes a word that stays as it was with other tokens. Which kind it is, is told from
the pieces before and after. Kinds of white space need equal pieces apart from that; the others need
the word cut elsewhere, and white space at its ends is no matter (our reading: the paper's examples
for them leave it out). Where several kinds fit, the first in this order counts (ours): newline,
detachment, shift; plural, acronym, proper noun, morphology, and resegmentation for all the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from pertoken.errors import PertokenError

__all__ = ["ARTIFACTS", "OTHER", "artifact"]

ARTIFACTS = {
    "whitespace shift": '" February" becomes "February"',
    "whitespace detached": '" Saturday" becomes " ", " Saturday"',
    "newline": '" However" becomes "\\n", "However"',
    "resegmentation": '" unbelievable" becomes "un", "bel", "ievable"',
    "proper noun": '" Dorm", "er" becomes "D", "orm", "er"',
    "morphology": '" repaid" becomes "re", "paid"',
    "acronym": '" HIV" becomes "H", "IV"',
    "plural": '" rights" becomes "right", "s"',
}
"""The kinds by our names, in the paper's order, with the paper's examples."""

OTHER = "other"
"""Other ids with the same pieces and white space: tokens that write the same, such as bytes."""

_TAILS = ("s", "es", "'s", "\N{RIGHT SINGLE QUOTATION MARK}s")
_PREFIXES = """
    anti bi co counter de dis em en ex extra fore il im in inter ir micro mid mis multi non over
    out post pre pro re semi sub super tele trans tri ultra un under up
"""
_SUFFIXES = """
    able age al an ance ant ary ate ed en ence ent er ers est ful fully hood ial ian ible ic ical
    ied ier ies iest ify ily ing ings ion ions ise ised ish ism ist ists ite ity ive ize ized ly
    ment ments ness or ous ship sion sions some th tion tions ty ure ward wards y
"""
_KNOWN = (frozenset(_PREFIXES.split()), frozenset(_SUFFIXES.split()))
_AROUND = " \t\n\r\f\v\xa0[]"  # white space, and the brackets that mark a target


def artifact(before: Sequence[str], after: Sequence[str], *, sentence_start: bool = False) -> str:
    """Which of `ARTIFACTS` made one word's pieces into others; `OTHER` where none did.

    before, after: the texts of the tokens, white space included. sentence_start: whether the word
    stands where every word has a capital. Prefixes, suffixes and plurals are told by their letters
    alone: "bus" cut before its s is a plural.
    Raises PertokenError where the two do not write the same word.

    >>> artifact([" rights"], ["right", "s"]), artifact([" unbelievable"], ["un", "bel", "ievable"])
    ('plural', 'resegmentation')
    """
    first, second = _inner(before), _inner(after)
    word = "".join(first)
    if word != "".join(second) or not word:
        raise PertokenError(f"{list(before)} and {list(after)} do not write one and the same word")
    if first == second:
        return _white(before, after)
    changed = _cuts(first) ^ _cuts(second)
    if any(word[cut:] in _TAILS for cut in changed):
        return "plural"
    if word.isupper() and len(word) > 1:
        return "acronym"
    if word[0].isupper() and not sentence_start:
        return "proper noun"
    low = word.lower()
    if all(low[:cut] in _KNOWN[0] or low[cut:] in _KNOWN[1] for cut in changed):
        return "morphology"
    return "resegmentation"


def _white(before: Sequence[str], after: Sequence[str]) -> str:
    """The kind where only white space, or nothing, tells the pieces apart."""
    if "".join(before).count("\n") != "".join(after).count("\n"):
        return "newline"
    if _blanks(before) != _blanks(after):
        return "whitespace detached"
    return "whitespace shift" if "".join(before) != "".join(after) else OTHER


def _inner(pieces: Sequence[str]) -> list[str]:
    bare = [piece.strip(_AROUND) for piece in pieces]
    return [piece for piece in bare if piece]


def _blanks(pieces: Sequence[str]) -> int:
    """Pieces of nothing but white space."""
    return sum(bool(piece) and piece.isspace() for piece in pieces)


def _cuts(pieces: Sequence[str]) -> set[int]:
    return set(accumulate(map(len, pieces[:-1])))

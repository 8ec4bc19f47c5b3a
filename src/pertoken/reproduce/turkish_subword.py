"""Optimal Turkish subwords (arXiv 2602.06942): families, vocabularies and corpora in one sweep.

Every cell trains a tokenizer on one of two corpora, measures where it cuts words of other sentences
beside where their morphemes end, and has a small classifier learn from its pieces. The corpora are
the development halves of the Google treebanks: `web` alone (the paper's minimal one), and web and
Wikipedia (its mixed one). Gold: see `_turkish_texts`. The classifiers tell a word's case or part of
speech (what morphology should help with) and the source of a sentence (what it should not).

Not the paper's regime: its corpora have gigabytes and its vocabularies 2k to 128k, here there are
some 11,000 and 28,000 words and vocabularies of 700 to 4,500; its downstream models are BERTs, here
there is one layer over the pieces, of equal size for every tokenizer. One thing is by construction:
the morphology family cuts by the first reading of the analyser whose readings, chosen by the
treebank, are the gold. That it comes first says only that nothing is lost between the two; how far
the others stay behind is the figure.

VOCABULARIES were chosen on the development half: WordPiece, BPE and Unigram all fill the largest.

In version 1 the sentences that the probe of the source was asked about came from the documents of
those it had learned from, most of Wikipedia's; now documents are told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from itertools import pairwise
from typing import Any

from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row
from pertoken.reproduce._turkish_texts import (
    SET,
    analyzer,
    halves,
    running_words,
    silver,
    smoke_rows,
    word_rows,
)

VERSION = 2
MODEL = "none"
FAMILIES = ("wordpiece", "bpe", "unigram", "character", "word", "morphology")
VOCABULARIES = (700, 1500, 3000, 4500)
SMOKE_VOCABULARIES = (560, 600)
CORPORA = {"web": ("web",), "web and wiki": ("web", "wiki")}
SUBWORD = ("wordpiece", "bpe", "unigram")

_F1 = "boundary F1, {}: morphology-level less the best other family"
_INNER = "boundary F1 without the ends of words, {}: morphology-level less the best other family"
_FALLS = "steps to a larger vocabulary of WordPiece, BPE, Unigram that lower {}"
_LEMMA = "WordPiece: lemmas in one token, largest vocabulary less smallest"
_CASE = "probe of case and part of speech: morphology-level less the best WordPiece"
_SOURCE = "probe of the source: characters less the best WordPiece"
_ERRORS = "CER, edits of the cut word over its letters, {}: morphology-level less the best other"
BARS = {
    "cells": ">= 32",
    **{_F1.format(name): "> 0" for name in CORPORA},
    **{_INNER.format(name): "> 0" for name in CORPORA},
    _FALLS.format("fertility"): ">= 0.9",
    _FALLS.format("over-segmentation"): ">= 0.9",
    _LEMMA: "> 0",
    _CASE: "> 0",
    _SOURCE: "< 0",
}
_ONE_READER = (
    "by construction: its cuts and the gold are readings of one analyser. Counted in edits of the "
    "cut word (rows of CER) the trained families are nearer to the gold"
)
_MORE_FITS = "nearly so by definition: a larger vocabulary holds what a smaller one had, and more"
_ONE_SEED = "one classifier a cell, of one seed, and the best cell of each family"
CAVEATS = {
    **{name.format(corpus): _ONE_READER for name in (_F1, _INNER) for corpus in CORPORA},
    _FALLS.format("fertility"): _MORE_FITS,
    _FALLS.format("over-segmentation"): _MORE_FITS,
    _LEMMA: _MORE_FITS,
    _CASE: _ONE_SEED,
    _SOURCE: _ONE_SEED,
}
Unit = dict[str, Any]
Key = tuple[str, str, int]


def run(context: Context) -> Reproduction:
    """All rows; under an hour on one core, in several processes with --jobs."""
    sizes = SMOKE_VOCABULARIES if context.smoke else VOCABULARIES
    rows = context.data(SET, smoke_rows=smoke_rows())
    material = cache(partial(_material, rows, context.smoke))
    units: dict[Key, tuple[object, Any]] = {
        (corpus, family, size): (
            ["cell", corpus, family, size],
            partial(_cell, corpus, family, size, material, context.seed),
        )
        for corpus in CORPORA
        for family in FAMILIES
        for size in sizes
    }
    found = context.remember_all(units, "cells")
    gold = next(iter(found.values()))["gold"]
    return context.reproduction(
        [
            Row("cells", len(found)),
            *_gold_rows(gold),
            *_bar_rows(found, sizes),
            *_curve_rows(found),
        ],
        split="sentences with even numbers train, words of those with odd numbers are measured, of "
        "the same documents; for the probe of the source documents are apart",
        families=list(FAMILIES),
        vocabularies=list(sizes),
        corpora={name: list(sources) for name, sources in CORPORA.items()},
        analyzer="zeyrek, readings chosen by the treebank's lemmas and inflectional groups",
    )


def _material(rows: list[Unit], smoke: bool) -> Unit:
    """Texts to train on, words to measure, their gold, all analyses, and the probes."""
    development, report = halves(rows)
    reader = analyzer(smoke)
    gold, counts = silver(report, reader)
    seen = {word for word, *_ in word_rows(development)}
    words = {*seen, *gold, *(word for word, *_ in word_rows(report))}
    analyses = {word: reader(word) for word in sorted(words)}
    cuts = {word: found[0].morphemes for word, found in analyses.items() if found}
    case = [(word, label) for word, _, _, label in dict.fromkeys(word_rows(report))]
    documents = sorted({_document(row) for row in rows})
    learned = set(documents[::2])
    source: list[list[tuple[str, str]]] = [[], []]
    for row in rows:
        source[_document(row) not in learned].append((str(row["text"]), str(row["source"])))
    return {
        "texts": {
            name: [str(row["text"]) for row in development if row["source"] in sources]
            for name, sources in CORPORA.items()
        },
        "words": list(gold),
        "running": running_words(report),
        # The gold reading alone for what is measured, every reading for what is looked up.
        "analyses": {**analyses, **{word: (one,) for word, one in gold.items()}},
        "cuts": cuts,
        "gold": counts,
        "probes": {
            "case": (
                [(word, label) for word, _, _, label in dict.fromkeys(word_rows(development))],
                case if smoke else [pair for pair in case if pair[0] not in seen],
            ),
            "source": (source[0], source[1]),
        },
    }


def _document(row: Unit) -> str:
    return str(row["id"]).rpartition(":")[0] or str(row["id"])


def _cell(corpus: str, family: str, size: int, material: Any, seed: int) -> Unit:
    from pertoken.tokenize import Analyzer, morphology_report
    from pertoken.tokenize._morphology_cell import measure, train_family

    given = material()
    cuts = given["cuts"] if family == "morphology" else {}
    texts, analyses = given["texts"][corpus], given["analyses"]
    found = measure(
        texts, size, family, given["words"], analyses, cuts, given["probes"], True, seed
    )
    backend = train_family(texts, size, family, cuts)
    inner = morphology_report(backend, given["words"], Analyzer(analyses.get), final=False)
    running = morphology_report(backend, given["running"], Analyzer(analyses.get))
    kept = ("fertility", "words cut", "tokens", "unknown", "%TR", "%Pure")
    return {
        **found,
        "inner F1": inner["micro F1"],
        **{f"running {name}": running[name] for name in kept},
        "gold": dict(given["gold"]),
    }


def _gold_rows(gold: Mapping[str, int]) -> list[Row]:
    out = "; ".join(f"{count:,} {reason}" for reason, count in list(gold.items())[2:])
    return [Row("words whose cut the treebank settles", gold["settled"], "words", why=out)]


def _curve(found: Mapping[Key, Unit], corpus: str, family: str, metric: str) -> list[float]:
    return [
        float(cell[metric] if metric in cell else cell["probes"][metric]["accuracy"])
        for (own, kind, _), cell in found.items()
        if (own, kind) == (corpus, family)
    ]


def _bar_rows(found: Mapping[Key, Unit], sizes: tuple[int, ...]) -> list[Row]:
    rows = []
    for corpus in CORPORA:
        for metric, name in (("micro F1", _F1), ("inner F1", _INNER)):
            best = {family: max(_curve(found, corpus, family, metric)) for family in FAMILIES}
            own = best.pop("morphology")
            second = max(best, key=best.__getitem__)
            rows.append(
                Row(
                    name.format(corpus),
                    100 * (own - best[second]),
                    "points",
                    baseline=f"{second}: {100 * best[second]:.1f} %",
                    why=f"{100 * own:.1f} %; its readings and the gold's are of one analyser",
                )
            )
        errors = {family: min(_curve(found, corpus, family, "CER")) for family in FAMILIES}
        own, second = errors.pop("morphology"), min(errors, key=errors.__getitem__)
        rows.append(
            Row(
                _ERRORS.format(corpus),
                own - errors[second],
                baseline=f"{second}: {errors[second]:.2f}",
            )
        )
    for metric in ("fertility", "over-segmentation"):
        steps = [
            after < before
            for corpus in CORPORA
            for family in SUBWORD
            for before, after in pairwise(_curve(found, corpus, family, metric))
        ]
        rows.append(Row(_FALLS.format(metric), sum(steps) / len(steps), why=f"of {len(steps)}"))
    lemma = [_curve(found, corpus, "wordpiece", "lemma is one token") for corpus in CORPORA]
    rows.append(
        Row(
            _LEMMA,
            100 * min(curve[-1] - curve[0] for curve in lemma),
            "points",
            why=f"the smaller of both corpora, {sizes[0]} to {sizes[-1]}",
        )
    )
    for metric, name, family in (("case", _CASE, "morphology"), ("source", _SOURCE, "character")):
        tops = {
            kind: max(max(_curve(found, corpus, kind, metric)) for corpus in CORPORA)
            for kind in FAMILIES
        }
        every = ", ".join(f"{kind} {100 * top:.1f}" for kind, top in tops.items())
        rows.append(
            Row(
                name,
                100 * (tops[family] - tops["wordpiece"]),
                "points",
                baseline=f"WordPiece: {100 * tops['wordpiece']:.1f} %",
                why=f"best cell of each, %: {every}",
            )
        )
    return rows


def _curve_rows(found: Mapping[Key, Unit]) -> list[Row]:
    """The trade-off: boundary F1 with what it costs, by corpus, family and vocabulary."""
    rows = []
    for (corpus, family, size), cell in found.items():
        probes = ", ".join(
            f"probe {name} {100 * each['accuracy']:.1f} %" for name, each in cell["probes"].items()
        )
        rows.append(
            Row(
                f"{corpus}, {family}, {size}: boundary F1",
                100 * cell["micro F1"],
                "%",
                why=f"came out {cell['size']}; {cell['running fertility']:.2f} pieces per word of "
                f"the text, {100 * cell['running unknown']:.1f} % of the tokens unknown; inner F1 "
                f"{100 * cell['inner F1']:.1f} %; lemmas in one token "
                f"{100 * cell['lemma is one token']:.1f} %; CER {cell['CER']:.2f}; {probes}",
            )
        )
    return rows

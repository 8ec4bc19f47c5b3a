"""One cell of a morphology sweep: a corpus, a family, a vocabulary; trained and measured."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pertoken.tokenize.analyzers import Analysis, Analyzer

__all__ = ["FAMILIES", "measure", "smallest_of", "train_family", "with_standards"]

FAMILIES = ("wordpiece", "bpe", "unigram", "character", "word", "morphology")
"""The families of a morphology sweep: four of `train_tokenizer`, words, and morphemes."""

Pair = tuple[str, str]


def smallest_of(family: str) -> int:
    """The least vocabulary of a family; of words and morphemes, room for one of them."""
    from pertoken.tokenize.train import smallest

    return 3 if family in ("word", "morphology") else smallest(family)


def train_family(
    texts: Sequence[str], vocabulary: int, family: str, cuts: Mapping[str, Sequence[str]]
) -> Any:
    """A tokenizer of a family, as `tokenizers` has it. cuts: words in their morphemes."""
    from pertoken.tokenize._whole import whole_words
    from pertoken.tokenize.train import END, train_backend

    if family not in ("word", "morphology"):
        return train_backend(texts, vocabulary, family)
    backend = whole_words(texts, vocabulary, 2, [END], cuts if family == "morphology" else None)
    backend.add_special_tokens([END])
    return backend


def measure(
    texts: Sequence[str],
    vocabulary: int,
    family: str,
    words: Sequence[str],
    analyses: Mapping[str, Sequence[Analysis]],
    cuts: Mapping[str, Sequence[str]],
    probes: Mapping[str, tuple[Sequence[Pair], Sequence[Pair]]],
    final: bool,
    seed: int,
    morphemes: Iterable[str] | None = None,
) -> dict[str, Any]:
    """The figures of one cell, as plain JSON values.

    size: tokens the tokenizer came out with. The metrics of `morphology_report` by their names, and
    under probes the accuracy, F1 and majority of each.

    Of all analyses only those of `words` are needed. morphemes: those that the analyser lists; with
    them the row has `invalid` too, the tokens that `with_standards` asks the analyser itself for.
    """
    from pertoken.tokenize.morphology import morphology_report
    from pertoken.tokenize.word_probes import word_probe

    began = time.perf_counter()
    reader = Analyzer(analyses.get, morphemes=morphemes or ())
    backend = train_family(texts, vocabulary, family, cuts)
    found = morphology_report(backend, words, reader, final=final)
    probed = {}
    for name, (train, test) in probes.items():
        probe = word_probe(backend, train, test, seed=seed)
        probed[name] = {"accuracy": probe.accuracy, "f1": probe.f1, "majority": probe.majority}
    values = {name: value for name, value in found.values.items() if name != "vocabulary"}
    more = {} if morphemes is None else {"invalid": found.invalid}
    return {
        **more,
        "size": backend.get_vocab_size(),  # "vocabulary" is what was asked for
        "words": found.words,
        **values,
        "probes": probed,
        "seconds": round(time.perf_counter() - began, 3),
    }


def with_standards(row: Mapping[str, Any], reader: Analyzer) -> dict[str, Any]:
    """A row of `measure` with %TR and %Pure as `morphology_report` has them with this analyser.

    The cell could ask for the words alone: which tokens it makes shows when it is trained, and an
    analyser need not go to another process.
    """
    found = [reader(token) for token in row["invalid"]]
    valid = row["valid"] + sum(map(bool, found))
    pure = row["pure"] + sum(any(len(one.morphemes) == 1 for one in each) for each in found)
    total = row["different"]
    made = {
        "valid": valid,
        "pure": pure,
        "%TR": valid / total if total else None,
        "%Pure": pure / total if total else None,
    }
    return {name: made.get(name, value) for name, value in row.items() if name != "invalid"}

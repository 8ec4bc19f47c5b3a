"""A sweep over languages, vocabularies and kinds of tokenizers: resumable, in several processes.

A cell is one language, one kind and one vocabulary. Its tokenizer is trained on text of its
language alone and its tokens are counted on the parallel text. Each finished cell is one line of
JSON in the file of the sweep, which the main process alone writes: a sweep that is stopped in any
way goes on behind its last whole line, and a finished cell is trained again only where its text
or its settings have changed. A worker that is killed costs its own cell, which the next run makes.

Without a folder of training text the parallel text is cut into `folds`, and each fold is counted by
a tokenizer trained on the others. For the Declaration of Human Rights that is 10 kB a language,
where the paper has 300 MB: what is learnt there is mostly the script and the commonest words.

Paper: Arnett et al., arXiv 2510.21909.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pertoken._extras import need
from pertoken.errors import PertokenError, nearest
from pertoken.result import Part, Result, figure, plain
from pertoken.tokenize._cell import measure
from pertoken.tokenize._grid import fill, read_cells, read_toml
from pertoken.tokenize._texts import Texts, digest, lines, read_texts
from pertoken.tokenize.spread import PowerLaw, Regression, optimal_vocabulary, regression

__all__ = ["Sweep", "read_sweep", "sweep"]

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]
DEFAULTS: Row = {
    "text": "udhr",
    "train": None,
    "languages": "all",
    "vocabularies": None,
    "kinds": ["bpe"],
    "reference": "eng",
    "folds": 3,
    "transition": 0.9,
    "seed": 0,
}
_KEY = ("language", "kind", "vocabulary", "mark")  # of a cell
_MADE = ("tokens", "size")
FACTORS = ("similarity", "token_length", "white_space", "word_length", "entropy", "script")


@dataclass
class Sweep(Result):
    """The finished cells of a sweep, a dict each, and the cells that were lost in this run.

    target: tokens at which `optimal` compares the languages. A cell has language, kind, vocabulary
    (asked for), size (come out), tokens (the CTC), bytes, characters, and what the language and
    the tokenizer are like, see `_texts.facts` and `_cell.measure`.
    """

    reference: str
    cells: list[Row]
    lost: list[tuple[str, str, int]] = field(default_factory=list)
    target: float | None = None

    def counts(self, kind: str) -> dict[str, dict[int, int]]:
        """Corpus token count by language and vocabulary."""
        self._kind(kind)
        found: dict[str, dict[int, int]] = {}
        for row in self.cells:
            if row["kind"] == kind:
                found.setdefault(row["language"], {})[row["vocabulary"]] = row["tokens"]
        return found

    def premiums(self, kind: str, vocabulary: int) -> dict[str, float]:
        """Token premium over the reference language at one vocabulary."""
        counts = {
            name: own[vocabulary] for name, own in self.counts(kind).items() if vocabulary in own
        }
        if self.reference not in counts:
            raise PertokenError(
                f"no cell of the reference {self.reference} with {kind} {vocabulary}"
            )
        return {name: count / counts[self.reference] for name, count in counts.items()}

    def optimal(self, kind: str, target: float | None = None) -> dict[str, PowerLaw]:
        """The vocabulary at which each language takes `target` tokens, by its power law.

        target: by default the sweep's own, else the smallest count that every language came down
        to. The law is fitted to the sizes that came out, less the alphabet; sizes that a text could
        not fill count once, and a language with one size has none.
        """
        from pertoken.tokenize.train import smallest

        least = smallest(kind)
        reached: dict[str, dict[float, int]] = {}
        for row in self.cells:
            if row["kind"] == kind and row["size"] > least:
                reached.setdefault(row["language"], {})[row["size"]] = row["tokens"]
        reached = {name: own for name, own in reached.items() if len(own) > 1}
        lowest = max((min(own.values()) for own in reached.values()), default=1)
        goal = target or self.target or lowest
        return {name: optimal_vocabulary(own, goal, least) for name, own in reached.items()}

    def regression(
        self, kind: str, vocabulary: int, factors: Sequence[str] = FACTORS
    ) -> Regression:
        """The counts of one kind and vocabulary over the languages, explained by factors."""
        self._kind(kind)
        rows = [row for row in self.cells if (row["kind"], row["vocabulary"]) == (kind, vocabulary)]
        for name in factors:
            if rows and name not in rows[0]:
                raise PertokenError(f"unknown factor {name!r}{nearest(name, rows[0])}")
        return regression(
            [row["tokens"] for row in rows], {name: [row[name] for row in rows] for name in factors}
        )

    def _kind(self, kind: str) -> None:
        kinds = dict.fromkeys(row["kind"] for row in self.cells)
        if kind not in kinds:
            raise PertokenError(f"the sweep has no kind {kind!r}: {', '.join(kinds) or 'no cell'}")

    def settings(self) -> list[tuple[str, int]]:
        """(kind, vocabulary) of the cells, in order."""
        return sorted({(row["kind"], row["vocabulary"]) for row in self.cells})

    def to_dict(self) -> dict[str, Any]:
        """The cells and what is made of them: the vocabularies by kind and language."""
        kinds = dict.fromkeys(kind for kind, _ in self.settings())
        laws = {
            kind: {name: law.to_dict() for name, law in self.optimal(kind).items()}
            for kind in kinds
        }
        return {
            "reference": self.reference,
            "cells": plain(self.cells),
            "lost": plain(self.lost),
            "optimal": laws,
        }

    def rows(self) -> list[dict[str, Any]]:
        """A record per cell."""
        return [dict(cell) for cell in self.cells]

    def plot(self) -> Any:
        """Counts over vocabularies, a line per language: a plotly figure (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        curves = []
        for kind in dict.fromkeys(cell["kind"] for cell in self.cells):
            for name, own in self.counts(kind).items():
                sizes = sorted(own)
                curves.append(
                    graph.Scatter(x=sizes, y=[own[v] for v in sizes], name=f"{name}, {kind}")
                )
        return figure(
            curves,
            xaxis={"title": "vocabulary", "type": "log"},
            yaxis={"title": "corpus token count", "type": "log"},
        )

    def _parts(self) -> list[Part]:
        """Counts and spread, then each kind's vocabularies and regression."""
        from pertoken.tokenize._sweep_page import parts

        return parts(self)

    def _page(self) -> str:
        from pertoken.tokenize._sweep_page import page

        return page(self)


def sweep(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    jobs: int = 1,
    ray: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Train and count every cell that `out` does not have yet.

    config: a TOML file, or the same as a dict. vocabularies (required): sizes. kinds: see
    `train_tokenizer`. languages: codes, or "all". text: "udhr", or a folder of LANG.txt files with
    the same lines in every language. train: a folder of LANG.txt files to train on; without it the
    text is cut into `folds`. reference, transition, seed: as elsewhere.
    out: the file of JSON lines. jobs: processes; 1 works in this one, and with more a script needs
        its `if __name__ == "__main__":`. ray: on Ray instead (extra `ray`), in the cluster that is
        connected to or that RAY_ADDRESS names, where every node must find the folders of texts;
        else in a local one of `jobs` workers.
    progress: called with what is done, how many cells are, and of how many.

    Raises PertokenError for a config that cannot be run, before anything is trained.

        found = sweep({"languages": ["eng", "tur"], "vocabularies": [320, 512]}, "sweep.jsonl")
        print(found.table())
    """
    settings = read_config(config)
    if jobs < 1:
        raise PertokenError(f"jobs must be 1 or more, got {jobs}")
    texts, train = _texts(settings)
    path = Path(out).expanduser()
    read_cells(path, _KEY, _MADE)  # a file of something else is refused here
    marks = {
        name: digest(own, name) + (digest(train[name], name) if train else f"/{settings['folds']}")
        for name, own in texts.items()
    }
    wanted: dict[Any, tuple[Any, ...]] = {}
    for kind in settings["kinds"]:
        for size in settings["vocabularies"]:
            for name, own in texts.items():
                mark = marks[name] + _mark(kind, settings)
                wanted[name, kind, size, mark] = (
                    *(name, size, kind, own, train[name] if train else None),
                    *(settings["folds"], settings["transition"], settings["seed"]),
                )
    rows, lost = fill(path, wanted, measure, _KEY, jobs=jobs, ray=ray, progress=progress)
    return Sweep(settings["reference"], rows, [(name, kind, size) for name, kind, size, _ in lost])


def read_sweep(path: str | Path, reference: str | None = None) -> Sweep:
    """The cells of a sweep's file; of a cell that was made again with other text, the last.

    reference: the language that premiums are over; "eng" by default.
    Raises PertokenError where there is no such file, it holds no cells, or none of the reference.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise PertokenError(f"no sweep at {path}: `pertoken premiums sweep` makes one")
    newest = {
        tuple(row[name] for name in _KEY[:3]): row
        for row in read_cells(file, _KEY, _MADE, cut=False)
    }
    if not newest:
        raise PertokenError(f"{path} holds no finished cell")
    there = {row["language"] for row in newest.values()}
    if reference is not None and reference not in there:
        some = ", ".join(sorted(there)[:12]) + (", …" if len(there) > 12 else "")
        raise PertokenError(f"the reference {reference!r} is no language of {path}: it has {some}")
    return Sweep(reference or "eng", list(newest.values()))


def read_config(config: str | Path | Mapping[str, Any]) -> Row:
    """The settings of a sweep with its defaults; PertokenError for one that cannot be."""
    given, folder = read_toml(config)
    for key in given:
        if key not in DEFAULTS:
            raise PertokenError(f"unknown setting {key!r} of a sweep{nearest(key, DEFAULTS)}")
    settings = {**DEFAULTS, **given}
    for key in ("text", "train"):  # folders are named from where the config lies
        if settings[key] not in (None, "udhr"):
            settings[key] = str(folder / Path(settings[key]).expanduser())
    _check(settings)
    return settings


def _check(settings: Row) -> None:
    from pertoken.tokenize.train import KINDS, smallest

    sizes = settings["vocabularies"]
    if not isinstance(sizes, list) or not sizes or not all(type(n) is int for n in sizes):
        raise PertokenError("a sweep takes vocabularies, a list of sizes such as [320, 512]")
    if not isinstance(settings["kinds"], list) or not settings["kinds"]:
        raise PertokenError(f"kinds is a list of {', '.join(KINDS)}")
    for kind in settings["kinds"]:
        if min(sizes) < smallest(kind):
            raise PertokenError(
                f"a vocabulary of {min(sizes)} is smaller than the alphabet of {kind}: "
                f"{smallest(kind)} tokens"
            )
    languages = settings["languages"]
    if languages != "all" and not (isinstance(languages, list) and languages):
        raise PertokenError('languages is a list of codes, or "all"')
    if type(settings["folds"]) is not int or settings["folds"] < 2:
        raise PertokenError(f"folds must be 2 or more, got {settings['folds']!r}")
    if type(settings["seed"]) is not int:
        raise PertokenError(f"seed is a whole number, got {settings['seed']!r}")
    if not isinstance(settings["transition"], (int, float)) or not 0 <= settings["transition"] <= 1:
        raise PertokenError(f"transition is a share, 0 to 1, not {settings['transition']!r}")


def _texts(settings: Row) -> tuple[dict[str, Texts], dict[str, Path] | None]:
    """The parallel text, and the text to train on where there is some."""
    chosen = None if settings["languages"] == "all" else settings["languages"]
    texts = read_texts(settings["text"], chosen)
    for name, own in texts.items():
        found = lines(own, name)
        if settings["train"] is None and len(found) < settings["folds"]:
            raise PertokenError(
                f"{name} has {len(found)} lines, too few for {settings['folds']} folds"
            )
    if settings["reference"] not in texts:
        hint = nearest(settings["reference"], texts)
        raise PertokenError(f"the reference {settings['reference']!r} is no language here{hint}")
    if settings["train"] is None:
        return texts, None
    found_train = read_texts(settings["train"], list(texts))
    return texts, {name: own for name, own in found_train.items() if isinstance(own, Path)}


def _mark(kind: str, settings: Row) -> str:
    """What else a cell of this kind depends on."""
    if kind == "superword":
        return f"/t{settings['transition']}"
    return f"/s{settings['seed']}" if kind == "supertokens" else ""

"""A light classifier of documents: fastText's, with words and pairs of words, in numpy.

A document is a bag of features, its words (split at white space), the end of the document, and all
pairs of neighbours. Each feature has a vector; the mean of a document's vectors, times a vector D,
is the log odds that the document is wanted. Vectors and D are trained together by stochastic
gradient descent with a rate that falls linearly to zero (Joulin et al., arXiv 1607.01759). With two
labels fastText's softmax over two output vectors is just this, D being their difference, which
learns at twice the rate.

Features are found by hash in one table of 2^21 places, as fastText finds pairs; words share it.
After training each place keeps a single number, its vector times D: so scoring is one look-up per
feature, and all of it runs in array operations over about a million characters at once.

fastText reads the training file in its order, in as many places at once as it has threads; here
documents come in an order drawn anew for each epoch (our reading). What training has not seen
counts as a feature of no weight.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pertoken._files import check_target, whole_file
from pertoken.errors import PertokenError
from pertoken.prompts import check_utf8

__all__ = ["NgramScorer"]

PLACES = 1 << 21
AT_ONCE = 1 << 20  # characters that are scored together
NAMED, SEEN_IN = 200, 2  # features kept by name at either end, and documents one must be in
_FORMAT = "pertoken-ngram-scorer-1"
_BASE = 0x100000001B3
_PAIR = np.uint64(0x9E3779B97F4A7C15)
_END = ord("\n")
_BLANK = np.zeros(256, dtype=bool)
_BLANK[[ord(mark) for mark in " \t\v\f\r\0"]] = True

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Whole = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]


class NgramScorer:
    """Scores documents by their words and pairs of words; made by `fit` or `load`.

    weights: what each place of the table adds to the log odds, [places]. features: the (text,
    weight) that speak most for a document, then those that speak most against one, most first.

    >>> wanted, other = ["one plus two is three"] * 20, ["the sea is deep and blue"] * 20
    >>> scorer = NgramScorer.fit(wanted + other, [1] * 20 + [0] * 20, epochs=40)
    >>> one, two = scorer.score(["two plus two is four", "the blue sea"])
    >>> bool(one > 0.5 > two)
    True
    """

    def __init__(
        self, weights: Floats, features: tuple[list[tuple[str, float]], list[tuple[str, float]]]
    ) -> None:
        self.weights = weights
        self.features = features

    def __repr__(self) -> str:
        return f"NgramScorer({np.count_nonzero(self.weights):,} features)"

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        labels: Sequence[int],
        *,
        epochs: int = 3,
        learning_rate: float = 0.1,
        dim: int = 100,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> NgramScorer:
        """Train on texts with labels 1 (wanted) and 0; the defaults are the paper's.

        Raises PertokenError for labels of one kind alone.
        """
        wanted = np.asarray(labels)
        if len(wanted) != len(texts) or not np.isin(wanted, (0, 1)).all():
            raise PertokenError("labels must be 1 and 0, one for each text")
        if not 0 < wanted.sum() < len(wanted):
            raise PertokenError(
                f"all {len(wanted)} texts have the same label: a scorer learns from wanted and "
                "unwanted ones"
            )
        bags = [bag for part in _parts(texts) for bag in _bags(part)]
        places, dense = np.unique(np.concatenate([bag for bag, _ in bags]), return_inverse=True)
        starts = np.cumsum([0, *(len(bag) for bag, _ in bags)])
        rows = [(dense[a:b], bags[n][1]) for n, (a, b) in enumerate(itertools.pairwise(starts))]
        vectors, output = _train(
            rows, wanted, len(places), epochs, learning_rate, dim, seed, progress
        )
        weights = np.zeros(PLACES, dtype=np.float32)
        weights[places] = vectors @ output
        often = np.bincount(dense, minlength=len(places)) >= SEEN_IN
        return cls(weights, _named(texts, weights, places[often]))

    def score(self, texts: Sequence[str]) -> Floats:
        """Chance in (0, 1) that each text is wanted, [texts].

        Raises PertokenError for what is not text.
        """
        found = [self._score(part) for part in _parts(texts)]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.float32)

    def _score(self, buffer: Bytes) -> Floats:
        _, _, words, pairs, ends = _features(buffer)
        added = self.weights[words]
        added[:-1] += np.where(ends[:-1], np.float32(0), self.weights[pairs])
        last = np.flatnonzero(ends)
        first = np.concatenate(([0], last[:-1] + 1))
        odds = np.add.reduceat(added, first, dtype=np.float64) / (2 * (last - first) + 1)
        return (1 / (1 + np.exp(-odds))).astype(np.float32)

    def top_features(
        self, count: int = 20
    ) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
        """The (text, weight) of words and pairs that speak most for a document, and against one."""
        return self.features[0][:count], self.features[1][:count]

    @property
    def sha256(self) -> str:
        """A name for what it has learned."""
        return hashlib.sha256(self.weights.tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write it (safetensors); raises PertokenError where the file could not be written."""
        from safetensors.numpy import save

        check_target(Path(path))
        places = np.flatnonzero(self.weights).astype(np.int32)
        tensors = {"places": places, "weights": self.weights[places]}
        metadata = {"format": _FORMAT, "features": json.dumps(self.features)}
        with whole_file(Path(path)) as file:
            file.write(save(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> NgramScorer:
        """Read one back; raises PertokenError for a file that is none, or damaged."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise PertokenError(f"there is no file {path}")
        weights = np.zeros(PLACES, dtype=np.float32)
        try:
            with safe_open(str(path), "numpy") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise PertokenError(f"{path} is no scorer of documents")
                weights[file.get_tensor("places")] = file.get_tensor("weights")
            most, least = json.loads(about["features"])
        except (SafetensorError, KeyError, ValueError, IndexError) as error:
            raise PertokenError(f"{path} is no scorer of documents, or damaged ({error})") from None
        return cls(weights, ([(t, w) for t, w in most], [(t, w) for t, w in least]))


# Training.


def _train(
    rows: Sequence[tuple[Whole, Whole]],
    wanted: npt.NDArray[Any],
    features: int,
    epochs: int,
    learning_rate: float,
    dim: int,
    seed: int,
    progress: Progress | None,
) -> tuple[Floats, Floats]:
    """Vectors [features, dim] and D [dim]; rows: which features a text has, and how often."""
    draw = np.random.default_rng(seed)
    vectors = draw.uniform(-1 / dim, 1 / dim, (features, dim)).astype(np.float32)
    output = np.zeros(dim, dtype=np.float32)
    sizes = np.array([counts.sum() for _, counts in rows])
    done, total = 0, epochs * int(sizes.sum())
    for epoch in range(epochs):
        for place, n in enumerate(draw.permutation(len(rows))):
            if progress is not None and place % 256 == 0:
                progress("training the scorer", epoch * len(rows) + place, epochs * len(rows))
            own, counts = rows[n]
            share = (counts / sizes[n]).astype(np.float32)
            hidden = share @ vectors[own]
            chance = 1 / (1 + math.exp(-float(hidden @ output)))
            step = np.float32(learning_rate * (1 - done / total) * (wanted[n] - chance))
            vectors[own] += np.outer(step * share, output)
            output += 2 * step * hidden
            done += int(sizes[n])
    return vectors, output


def _bags(buffer: Bytes) -> Iterator[tuple[Whole, Whole]]:
    """(places, how often each) of every text of the buffer."""
    _, _, words, pairs, ends = _features(buffer)
    first = 0
    for last in np.flatnonzero(ends).tolist():
        own = np.concatenate((words[first : last + 1], pairs[first:last]))
        yield np.unique(own, return_counts=True)
        first = last + 1


def _named(
    texts: Sequence[str], weights: Floats, places: Whole
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """The features of greatest and of least weight among these places, with their text."""
    order = places[np.argsort(weights[places], kind="stable")]
    most = [int(place) for place in order[::-1][:NAMED] if weights[place] > 0]
    least = [int(place) for place in order[:NAMED] if weights[place] < 0]
    wanted = np.zeros(PLACES, dtype=bool)
    wanted[most + least] = True
    names: dict[int, str] = {}
    for buffer in _parts(texts):
        starts, stops, words, pairs, ends = _features(buffer)
        pair_stops = stops[1:]
        spans = [(words, starts, stops), (pairs, starts[:-1], pair_stops)]
        for found, left, right in spans:
            for at in np.flatnonzero(wanted[found]):
                if found is pairs and ends[at]:
                    continue
                place = int(found[at])
                if place not in names:
                    raw = buffer[left[at] : right[at]].tobytes().decode("utf-8", "replace")
                    names[place] = " ".join(raw.split(" ")).replace("\n", "</s>")
    return (
        [(names[place], float(weights[place])) for place in most],
        [(names[place], float(weights[place])) for place in least],
    )


# Features.


def _parts(texts: Sequence[str]) -> Iterator[Bytes]:
    """Texts as bytes, about `AT_ONCE` together; each ends in a line feed that stands alone."""
    waiting: list[bytes] = []
    size = 0
    for text in texts:
        if not isinstance(text, str):
            raise PertokenError(f"a document is {type(text).__name__}, not text")
        try:
            raw = text.replace("\n", " ").encode()
        except UnicodeEncodeError:
            check_utf8(text, "a document")
            raise
        waiting.append(raw)
        size += len(raw) + 3
        if size >= AT_ONCE:
            yield _joined(waiting)
            waiting, size = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(raws: Sequence[bytes]) -> Bytes:
    return np.frombuffer(b" \n ".join(raws) + b" \n ", dtype=np.uint8)


def _features(
    buffer: Bytes,
) -> tuple[Whole, Whole, Whole, Whole, npt.NDArray[np.bool_]]:
    """Of words: begin, stop, place, that of the pair with the next, and whether one ends a text."""
    inside = ~_BLANK[buffer]
    change = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    if inside[0]:
        change = np.concatenate(([0], change))
    starts, stops = change[::2], change[1::2]
    powers, inverse = _powers(
        1 << max(21, (len(buffer) - 1).bit_length())
    )  # one length for nearly all
    sums = np.empty(len(buffer) + 1, dtype=np.uint64)
    sums[0] = 0
    # A word's sum of bytes times powers of the base, moved to begin at power 0: its hash, mod 2^64.
    np.cumsum((buffer.astype(np.uint64) + np.uint64(1)) * powers[: len(buffer)], out=sums[1:])
    hashes = (sums[stops] - sums[starts]) * inverse[starts]
    ends = buffer[starts] == _END
    pairs = hashes[:-1] * _PAIR + hashes[1:]
    return starts, stops, _places(hashes), _places(pairs), ends


def _places(hashes: npt.NDArray[np.uint64]) -> Whole:
    """Places of the table; the high bits of a hash depend on all of its word."""
    mixed = (hashes ^ (hashes >> np.uint64(32))) * _PAIR
    return (mixed >> np.uint64(64 - PLACES.bit_length() + 1)).astype(np.int64)


@functools.lru_cache(maxsize=1)
def _powers(count: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """The base's powers mod 2^64, and their inverses."""
    bases = (_BASE, pow(_BASE, -1, 1 << 64))
    made = []
    for base in bases:
        factors = np.full(count, base, dtype=np.uint64)
        factors[0] = 1
        made.append(np.cumprod(factors))
    return made[0], made[1]

"""LexRank: how central each sentence of a text is (Erkan and Radev 2004).

The sentences are the documents: a term's weight falls with the number of sentences it stands in.
Sentences vote for those they resemble (cosine of their TF-IDF vectors), as pages do in PageRank;
here with the continuous similarities, section 3.3, not cut at a threshold.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import regex
import torch

__all__ = ["lexrank"]

_TERM = regex.compile(r"[\p{Han}\p{Hiragana}]|[^\W_]+")
_JUMP = 0.15  # the chance to go anywhere; the paper takes 0.1 to 0.2
_TOLERANCE = 1e-10
_MOST_STEPS = 500


def lexrank(sentences: Sequence[str]) -> list[float]:
    """The weight of each sentence; their mean is 1.

    The matrix of similarities is never written out: work and memory grow with the words.

    >>> weights = lexrank(["Cats eat fish.", "Cats sleep.", "Fish swim."])
    >>> weights[0] > weights[1]
    True
    """
    counts = [Counter(_TERM.findall(sentence.lower())) for sentence in sentences]
    number = len(counts)
    containing = Counter(term for count in counts for term in count)
    place = {term: index for index, term in enumerate(containing)}
    rows, columns, values = [], [], []
    for row, count in enumerate(counts):
        weights = {t: times * math.log(number / containing[t]) for t, times in count.items()}
        length = math.hypot(*weights.values())
        for term, weight in weights.items():
            if weight:
                rows.append(row)
                columns.append(place[term])
                values.append(weight / length)
    size = (number, max(1, len(place)))
    vectors = torch.sparse_coo_tensor(
        torch.tensor([rows, columns], dtype=torch.long),
        torch.tensor(values, dtype=torch.float64),
        size,
        check_invariants=False,
    ).coalesce()

    def alike(sums: torch.Tensor) -> torch.Tensor:
        """Similarities times a vector; a sentence without any term is like itself alone."""
        return vectors @ (vectors.t() @ sums) + bare * sums

    ones = torch.ones(number, 1, dtype=torch.float64)
    bare = torch.zeros_like(ones)
    bare[sorted(set(range(number)) - set(rows))] = 1.0
    votes = alike(ones)  # of each sentence, what its similarities add up to
    rank = ones / number
    for _ in range(_MOST_STEPS):
        new = _JUMP / number + (1 - _JUMP) * alike(rank / votes)
        done = float((new - rank).abs().max()) < _TOLERANCE / number
        rank = new
        if done:
            break
    return [float(value) for value in rank.flatten() * number]

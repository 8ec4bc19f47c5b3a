"""How likely Goose's guesses are before anything is learned, and the kinds they are counted by.

Logistic fits to what was accepted on the even question ids of Spec-Bench with SmolLM2. They are a
start: what is observed of a kind soon outweighs them (see `Calibrator`).
"""

from __future__ import annotations

from math import exp, log

SHORTER = 20
"""Kinds of match from here on: found behind half the context only."""

_TIER = (0.0, 0.0, 0.3, 0.4)  # guesses behind one, two, three known tokens


def table(tier: int, rank: int, score: float, copies: bool) -> float:
    """Chance of a recycled guess; copies: whether earlier text offers other tokens here.

    >>> round(table(tier=2, rank=0, score=0.5, copies=False), 2)
    0.48
    """
    z = -1.25 + 0.57 * _logit(score) + 0.86 * (rank == 0) - 0.79 * copies
    return _logistic(z + _TIER[tier])


def both(match: int, share: float, tier: int, score: float) -> float:
    """Chance of a copied token that is also a recycled guess; share: of the earlier places."""
    z = -1.2 if match > SHORTER else 0.23 * match + 1.1 * share - 1.6
    return _logistic(z + 0.43 * _logit(score) + _TIER[tier])


def copy(match: int, share: float) -> float:
    """Chance of a copied token that the model did not guess when it last was here."""
    return 0.02 if match > SHORTER else _logistic(0.39 * match + 2.5 * share - 4.8)


def match_kind(length: int) -> int:
    """Kind of a match by the number of tokens that agree, 0 to 8."""
    return length if length <= 5 else 6 if length <= 8 else 7 if length <= 16 else 8


def score_kind(score: float) -> int:
    """Kind of a guess by its share among the guesses kept, 0 to 7."""
    for place, limit in enumerate((0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95)):
        if score < limit:
            return place
    return 7


def _logit(score: float) -> float:
    score = min(0.99, max(0.01, score))
    return log(score / (1.0 - score))


def _logistic(z: float) -> float:
    return 1.0 / (1.0 + exp(-z))

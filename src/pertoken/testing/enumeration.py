"""Exact enumeration of the random choices that an estimator of `decode.rejection` makes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any


def outcomes(
    estimate: Callable[..., Any], probs: Sequence[float], allowed: Collection[int], max_rejects: int
) -> Iterator[tuple[float, Any]]:
    """Every outcome of ``estimate(p, draws, ok, max_rejects)`` with its probability.

    probs: [vocab], the distribution drawn from; allowed: the tokens that the constraint accepts.
    Draws without replacement are followed to their ends, counts of skipped draws up to
    `max_rejects`, beyond which all are the same to an estimator.

    >>> from pertoken.decode.rejection import recursive
    >>> found = list(outcomes(recursive, [0.5, 0.3, 0.2], {1}, 3))
    >>> round(sum(chance * drawn.weight for chance, drawn in found), 12)
    0.3
    """
    script: list[int] = []
    while True:
        draws = _Scripted(probs, script, max_rejects)
        drawn = estimate(probs.__getitem__, draws, allowed.__contains__, max_rejects)
        yield draws.chance, drawn
        taken = draws.taken
        while taken and taken[-1][0] == taken[-1][1] - 1:
            taken.pop()
        if not taken:
            return
        script = [choice for choice, _ in taken]
        script[-1] += 1


class _Scripted:
    """Randomness that follows a script of choices, and behind it takes the first of each."""

    def __init__(self, probs: Sequence[float], script: Sequence[int], cap: int) -> None:
        self._probs, self._script, self._cap = probs, script, cap
        self.taken: list[tuple[int, int]] = []  # (choice, number of choices)
        self.chance = 1.0

    def _choose(self, chances: Sequence[float]) -> int:
        place = len(self.taken)
        choice = self._script[place] if place < len(self._script) else 0
        self.taken.append((choice, len(chances)))
        self.chance *= chances[choice] / sum(chances)
        return choice

    def order(self, rejected: Collection[int]) -> Iterator[int]:
        left = [token for token, p in enumerate(self._probs) if p > 0 and token not in rejected]
        while left:
            yield left.pop(self._choose([self._probs[token] for token in left]))

    def skipped(self, rejected_mass: float) -> int:
        chances = [(1 - rejected_mass) * rejected_mass**n for n in range(self._cap)]
        return self._choose([*chances, rejected_mass**self._cap])

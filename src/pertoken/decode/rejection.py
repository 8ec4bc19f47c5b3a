"""One token under a constraint that can only be asked, and an estimate of the accepted mass.

Tokens are tried in the order of a draw without replacement until one is accepted: that one is a
sample of the constrained distribution. The estimators below differ in what they ask behind it for a
weight W with E[W, token is x] = p(x) for accepted x, else 0 (p the distribution drawn from, R the
mass of the rejected tokens; arXiv 2504.05410):

- *recursive*: the next token in order is asked too; W = 1 - R if it is accepted, else p(x). At most
  two questions more than rejections. (The authors' library; the product over rejected tokens of
  1 - p/(1 - R) telescopes to 1 - R.)
- *geometric*: rounds of fresh draws, in which accepted tokens stay and every token once rejected is
  skipped but counted as often as draws with replacement would have met it; W = (a - 1)/(a + r - 1)
  after a accepts and r rejections. (The authors' library.)
- *paper*: a second round behind the first accept; W = (1 - R)/(n1 + n2 + 1), n the rejections of
  the rounds. (The authors' replication code.)

The authors order tokens by Gumbel keys. Here they are drawn one by one from the cumulative
distribution, tokens already drawn left out: the same distribution, at the cost of one cumulative
sum instead of noise for the whole vocabulary (ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Protocol

import torch

_BLOCK = 8  # tokens drawn at once


class Draws(Protocol):
    """The randomness that the estimators use, so that tests can enumerate it."""

    def order(self, rejected: Collection[int]) -> Iterator[int]:
        """Tokens with mass as a draw without replacement gives them, without the rejected ones."""

    def skipped(self, rejected_mass: float) -> int:
        """How often draws with replacement meet a rejected token before one that is not."""


class TableDraws:
    """Draws from one row of masses.

    masses: [vocab], not negative, of any sum; ends: their cumulative sum [vocab], in float64.
    """

    def __init__(self, masses: torch.Tensor, ends: torch.Tensor) -> None:
        self._masses, self._ends = masses, ends

    def order(self, rejected: Collection[int]) -> Iterator[int]:
        """See `Draws`."""
        masses, ends = self._masses, self._ends
        total, seen = float(ends[-1]), set(rejected)
        gone = sum(float(masses[token]) for token in seen)  # mass of tokens drawn, still in `ends`
        while True:
            if 2.0 * gone >= total:
                # Half of the draws would be wasted: leave those tokens out of the table.
                masses = masses.clone()
                masses[list(seen)] = 0.0
                ends = masses.cumsum(-1, dtype=torch.float64)
                total, gone = float(ends[-1]), 0.0
            if not total > 0.0:  # also where logits were NaN
                return
            points = torch.rand(_BLOCK, dtype=torch.float64, device=ends.device) * total
            found = torch.searchsorted(ends, points, right=True).clamp_(max=len(ends) - 1)
            for token, mass in zip(found.tolist(), masses[found].tolist(), strict=True):
                if token in seen or mass <= 0.0:
                    continue
                seen.add(token)
                gone += mass
                yield token
                if 2.0 * gone >= total:
                    break

    def skipped(self, rejected_mass: float) -> int:
        """Geometric number of failures at success probability 1 - `rejected_mass`."""
        if rejected_mass <= 0.0:
            return 0
        uniform = 1.0 - float(torch.rand((), dtype=torch.float64))  # in (0, 1]
        return int(math.log(uniform) / math.log(rejected_mass)) if rejected_mass < 1.0 else 2**62


@dataclass(frozen=True)
class Drawn:
    """One token drawn under a constraint.

    token: -1 where none was accepted; weight: unbiased estimate of the accepted mass.
    """

    token: int
    weight: float


_DEAD = Drawn(-1, 0.0)
Chance = Callable[[int], float]
Verdict = Callable[[int], bool]


def recursive(p: Chance, draws: Draws, ok: Verdict, max_rejects: int) -> Drawn:
    """The recursive estimator; p: probability of a token; ok: the constraint's answer on it."""
    rejected_mass = 0.0
    order = draws.order(())
    for rejects, token in enumerate(islice(order, max_rejects)):
        if ok(token):
            # With one rejection left the draw itself was the coin that a second question tosses.
            following = None if rejects == max_rejects - 1 else next(order, None)
            if following is None or ok(following):
                return Drawn(token, max(0.0, 1.0 - rejected_mass))
            return Drawn(token, p(token))
        rejected_mass += p(token)
    return _DEAD


def geometric(
    p: Chance, draws: Draws, ok: Verdict, max_rejects: int, max_accepts: int = 2
) -> Drawn:
    """The estimator from counts, as of draws with replacement until `max_accepts` accepts."""
    rejected: set[int] = set()
    rejected_mass, rejects, accepts, first = 0.0, 0, 0, -1
    while accepts < max_accepts and rejects < max_rejects:
        accepted = False
        for token in draws.order(rejected):
            if rejected:
                rejects += draws.skipped(rejected_mass)
            if rejects >= max_rejects:
                break
            if ok(token):
                accepts += 1
                first = token if first < 0 else first
                accepted = True
                break
            rejected.add(token)
            rejected_mass += p(token)
            rejects += 1
            if rejects >= max_rejects:
                break
        if not accepted and rejects < max_rejects:  # every token with mass was rejected
            return _DEAD
    if accepts == 0:
        return _DEAD
    weight = min(max_accepts - 1, accepts) / (accepts + min(rejects, max_rejects) - 1)
    return Drawn(first, weight)


def paper(p: Chance, draws: Draws, ok: Verdict, max_rejects: int) -> Drawn:
    """The paper's own estimator: a second round over what was not rejected in the first.

    It has no cap of rejections and would be biased with one: `max_rejects` does not apply.
    """
    rejected: list[int] = []
    first = -1
    for token in draws.order(()):
        if ok(token):
            first = token
            break
        rejected.append(token)
    if first < 0:
        return _DEAD
    rest = max(0.0, 1.0 - sum(map(p, rejected)))
    more = 0
    for token in draws.order(rejected):
        if ok(token):
            break
        more += 1
    return Drawn(first, rest / (len(rejected) + more + 1))


def unweighted(p: Chance, draws: Draws, ok: Verdict, max_rejects: int) -> Drawn:
    """The first accepted token with weight 1: what masking samples, without its weight."""
    found = next(filter(ok, islice(draws.order(()), max_rejects)), -1)
    return _DEAD if found < 0 else Drawn(found, 1.0)


class NextTokens:
    """What one forward says of the next tokens of a batch: p, and the q that is drawn from.

    logits: [rows, vocab], of p; drafts: the same of q, None where that is p; dropped: ids that may
    not be drawn, [tokens].
    """

    def __init__(
        self,
        logits: torch.Tensor,
        drafts: torch.Tensor | None = None,
        dropped: torch.Tensor | None = None,
    ) -> None:
        self._p, self._q = logits, logits if drafts is None else drafts
        self._dropped = dropped
        self.vocab = logits.shape[-1]

    @cached_property
    def _table(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masses of q up to a factor, their cumulative sums, both [rows, vocab]; dropped [rows]."""
        masses = (self._q - self._q.amax(-1, keepdim=True)).exp_()
        dropped = masses.new_zeros(len(masses), dtype=torch.float64)
        if self._dropped is not None:
            dropped = masses[:, self._dropped].sum(-1, dtype=torch.float64)
            masses.index_fill_(1, self._dropped, 0.0)
        # The one pass over rows x vocabulary in float64; the rest is done on single tokens.
        return masses, masses.cumsum(-1, dtype=torch.float64), dropped

    @cached_property
    def _p_norms(self) -> torch.Tensor:
        return _log_norms(self._p)

    @cached_property
    def _q_norms(self) -> torch.Tensor:
        return self._p_norms if self._q is self._p else _log_norms(self._q)

    def draws(self, row: int) -> TableDraws:
        """Draws from q without the dropped tokens."""
        masses, ends, _ = self._table
        return TableDraws(masses[row], ends[row])

    def chance(self, row: int) -> Chance:
        """Probability of a token under q without the dropped ones."""
        masses, total = self._table[0][row], float(self._table[1][row, -1])
        return lambda token: float(masses[token]) / total if total > 0 else 0.0

    def greatest(self, row: int) -> float:
        """Probability of the most probable token under q without the dropped ones."""
        masses, ends, _ = self._table
        total = float(ends[row, -1])
        return float(masses[row].amax()) / total if total > 0 else 0.0

    def log_kept(self, row: int) -> float:
        """Log-mass that q has outside the dropped tokens."""
        if self._dropped is None:
            return 0.0
        kept, dropped = float(self._table[1][row, -1]), float(self._table[2][row])
        return math.log(kept / (kept + dropped))

    def log_p(self, row: int, token: int) -> float:
        """Log-probability of a token under p."""
        return float(self._p[row, token]) - float(self._p_norms[row])

    def log_ratio(self, row: int, token: int) -> float:
        """log p - log q of a token, nothing dropped."""
        if self._q is self._p:
            return 0.0
        return self.log_p(row, token) - float(self._q[row, token]) + float(self._q_norms[row])

    def draw_allowed(self, row: int, allowed: torch.Tensor) -> tuple[int, float]:
        """(token, log-mass of the allowed) where the whole constraint is known: a draw from q.

        allowed: bool [vocab] or shorter. (-1, -inf) where nothing allowed has mass.
        """
        tokens = allowed.nonzero().squeeze(-1).to(self._q.device)
        inside = self._q[row, tokens].double() - self._q_norms[row]
        mass = float(inside.logsumexp(-1)) if len(tokens) else -math.inf
        if not mass > -math.inf:
            return -1, -math.inf
        return int(tokens[torch.multinomial((inside - mass).exp(), 1)]), mass


def _log_norms(logits: torch.Tensor) -> torch.Tensor:
    """Log of the sum of exponentials [rows], summed in float64."""
    top = logits.amax(-1, keepdim=True)
    total = (logits - top).exp_().sum(-1, dtype=torch.float64)
    return top.squeeze(-1).double() + total.log()

"""How sure a model was of an answer, and what deferring the least sure answers is worth.

A score is a number per answer, high where the answer is to stand. Chow-Sum, Chow-Average and
Chow-Quantile (arXiv 2404.10136, section 3) make it of the log-probabilities of the answer's tokens.
Deferring the answers of lowest score, from none to all, draws the deferral curve: mean quality
against the share that the large model answered. The area under it (AUC-DF) is one figure for a
score. Equal scores are deferred in random order, so a score that says nothing draws the straight
line between the two models: the curve and its area are expectations over that order, exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pertoken._bootstrap import bootstrap
from pertoken.decode._chart import lines, page
from pertoken.errors import PertokenError
from pertoken.result import Part, Result, cells, figure

__all__ = [
    "ALPHAS",
    "DeferralCurves",
    "chow_average",
    "chow_quantile",
    "chow_sum",
    "deferral_area",
    "deferral_curves",
    "deferral_quality",
    "quantiles",
    "rank_correlation",
]

Floats = NDArray[np.float64]

ALPHAS = tuple(place / 10 for place in range(11))
"""The quantiles that a learned rule reads and "chow-quantile" chooses from (our reading)."""

NO_TOKENS = -100.0  # an answer without a token counts as one of this log-probability
_GRID = tuple(place / 20 for place in range(21))


def _values(logprobs: Sequence[float]) -> Floats:
    """[tokens] from NO_TOKENS up, so that no sum of them is infinite."""
    return np.maximum(np.asarray(logprobs or (NO_TOKENS,), dtype=np.float64), NO_TOKENS)


def chow_sum(logprobs: Sequence[float]) -> float:
    """Log-probability of the answer, nats: Chow-Sum. It falls with every token.

    >>> chow_sum([-0.5, -1.5])
    -2.0
    """
    return float(_values(logprobs).sum())


def chow_average(logprobs: Sequence[float]) -> float:
    """Log-probability per token, nats: Chow-Average.

    >>> chow_average([-0.5, -1.5])
    -1.0
    """
    return float(_values(logprobs).mean())


def chow_quantile(logprobs: Sequence[float], alpha: float) -> float:
    """The `alpha`-quantile of the tokens' log-probabilities, nats: Chow-Quantile.

    alpha: 0 is the least sure token, 1 the surest; between tokens it is interpolated.

    >>> chow_quantile([-0.5, -1.5], 0.0), chow_quantile([-0.5, -1.5], 0.25)
    (-1.5, -1.25)
    """
    return float(_quantiles(logprobs, [alpha])[0])


def quantiles(logprobs: Sequence[float]) -> Floats:
    """The quantiles `ALPHAS` of an answer, [11]: what a learned rule reads."""
    return _quantiles(logprobs, ALPHAS)


def _quantiles(logprobs: Sequence[float], alphas: Sequence[float]) -> Floats:
    values = np.sort(_values(logprobs))
    places = np.asarray(alphas) * (len(values) - 1)
    return np.asarray(np.interp(places, np.arange(len(values)), values))


def deferral_area(scores: Sequence[float], small: Sequence[float], large: Sequence[float]) -> float:
    """Area under the deferral curve: the mean quality over all deferral rates.

    scores, small, large: per question, the score and the quality of each model's answer.
    The answer deferred k-th of n is the large model's in 1 − (k − ½)/n of all rates.

    >>> deferral_area([1.0, 2.0], [0.0, 1.0], [1.0, 0.0])  # the right one is deferred first
    0.75
    >>> deferral_area([1.0, 1.0], [0.0, 1.0], [1.0, 0.0])
    0.5
    """
    places = np.arange(len(scores), dtype=np.float64)[None]
    return float(_areas(places, scores, small, large)[0])


def _areas(
    picks: Floats, scores: Sequence[float], small: Sequence[float], large: Sequence[float]
) -> Floats:
    """Areas [draws] over the questions that each draw took; picks: [draws, questions]."""
    draws, count = picks.shape
    size = len(scores)
    # How often each question was taken, and its tie group's, [draws, questions].
    flat = picks.astype(np.int64) + size * np.arange(draws)[:, None]
    taken = np.bincount(flat.ravel(), minlength=draws * size).reshape(draws, size)
    _, group = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))
    members = np.add.reduceat(taken[:, order], starts, axis=1)
    # The mean place of a group is half its members behind those before it.
    place = (members.cumsum(1) - members / 2)[:, group]
    lower, upper = np.asarray(small, dtype=np.float64), np.asarray(large, dtype=np.float64)
    each = lower + (upper - lower) * (1 - place / count)
    return np.asarray((taken * each).sum(1) / count)


def deferral_quality(
    scores: Sequence[float],
    small: Sequence[float],
    large: Sequence[float],
    rates: Sequence[float] = _GRID,
) -> list[float]:
    """Mean quality at each deferral rate, with the answers of lowest score deferred.

    >>> deferral_quality([1.0, 2.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.5, 1.0])
    [0.5, 1.0, 0.5]
    """
    lower, upper = np.asarray(small, dtype=np.float64), np.asarray(large, dtype=np.float64)
    _, group = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True)
    members = np.bincount(group)
    gained = np.bincount(group, weights=upper - lower)
    # Straight lines between the ends of the tie groups.
    shares = np.concatenate(([0.0], members.cumsum() / len(lower)))
    quality = lower.mean() + np.concatenate(([0.0], gained.cumsum() / len(lower)))
    return [float(each) for each in np.interp(rates, shares, quality)]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where one of them is constant.

    >>> rank_correlation([1, 2, 3], [10, 20, 15])
    0.5
    """
    ranks = []
    for values in (first, second):
        _, group = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)
        members = np.bincount(group)
        ranks.append((members.cumsum() - members / 2)[group])
    spread = float(np.std(ranks[0]) * np.std(ranks[1]))
    if spread == 0:
        return 0.0
    return float(np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())) / spread)


@dataclass(frozen=True)
class DeferralCurves(Result):
    """Deferral curves of several rules on the same questions.

    curves: rule -> mean quality at `rates`; areas: rule -> AUC-DF with its bootstrap interval
    over the questions (95 %); length_bias: rule -> rank correlation of how early an answer is
    deferred with its number of tokens, None without tokens: above 0 long answers are deferred
    first. overhead: rule -> what the rule asks of the large model for every question, as a share
    of a whole answer of it; `charged` areas pay for it. "random" and "oracle" (the questions in
    the order of what deferring them gains) are always there.
    """

    questions: int
    rates: tuple[float, ...]
    curves: dict[str, list[float]]
    areas: dict[str, tuple[float, tuple[float, float]]]
    length_bias: dict[str, float | None]
    overhead: dict[str, float]

    _title = "Deferral curves"

    def area(self, rule: str) -> float:
        """AUC-DF of a rule."""
        return self.areas[rule][0]

    def charged(self, rule: str) -> float:
        """AUC-DF over the large model's work instead of the deferral rate.

        A rule that asks the large model something first starts late: until that is paid for, the
        small model answers everything.
        """
        paid = min(self.overhead.get(rule, 0.0), 1.0)
        if paid == 0:
            return self.area(rule)
        rates = np.linspace(0, 1 - paid, 201)
        curve = np.interp(rates, self.rates, self.curves[rule])
        return float(paid * self.curves[rule][0] + np.trapezoid(curve, rates))

    def rows(self) -> list[dict[str, Any]]:
        """A record per rule: area, interval, gain over random, length bias, quality by rate."""
        straight = self.area("random")
        return [
            {
                "rule": rule,
                "area": area,
                "low": interval[0],
                "high": interval[1],
                "over_random": area / straight - 1 if straight else None,
                "charged_area": self.charged(rule),
                "length_bias": self.length_bias[rule],
                "quality": self.curves[rule],
            }
            for rule, (area, interval) in self.areas.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """The rows, and the deferral rates of their qualities."""
        return {"questions": self.questions, "rates": list(self.rates), "rules": self.rows()}

    def plot(self) -> Any:
        """Quality against deferral rate, a line per rule (extra `plot`)."""
        dash = {"random": "dot", "oracle": "dash"}
        traces = [
            {
                "type": "scatter",
                "name": f"{rule} ({self.area(rule):.3f})",
                "x": list(self.rates),
                "y": curve,
                "line": {"dash": dash.get(rule, "solid")},
            }
            for rule, curve in self.curves.items()
        ]
        return figure(traces, xaxis_title="deferral rate", yaxis_title="mean quality")

    def _page(self) -> str:
        chart = lines("mean quality", self.rates, self.curves, over="deferral rate")
        return page(self, "Over the deferral rate", [chart])

    def _parts(self) -> list[Part]:
        shown = {
            f"at {rate:.0%}": round(rate * (len(self.rates) - 1)) for rate in (0, 0.2, 0.5, 0.8, 1)
        }
        lines = []
        for row in self.rows():
            first = {name: row[name] for name in ("rule", "area", "low", "high", "over_random")}
            if any(self.overhead.values()):
                first["charged_area"] = row["charged_area"]
            first["length_bias"] = row["length_bias"]
            lines.append(first | {name: row["quality"][place] for name, place in shown.items()})
        note = (
            f"{self.questions} questions; area under quality against deferral rate, low and high "
            "its 95 % interval; length bias above 0: long answers are deferred first"
        )
        return [Part("", cells(lines), [note])]


def deferral_curves(
    scores: Mapping[str, Sequence[float]],
    small: Sequence[float],
    large: Sequence[float],
    *,
    lengths: Sequence[int] | None = None,
    overhead: Mapping[str, float] | None = None,
    seed: int = 0,
) -> DeferralCurves:
    """The deferral curves of some scores, with random deferral and the oracle.

    scores: rule -> score per question; small, large: quality of each model's answer per question;
    lengths: tokens of the small model's answers; overhead: see `DeferralCurves`.

    Raises PertokenError without a question, for columns of unlike length, and for scores or
    qualities that are not finite.

    >>> found = deferral_curves({"mine": [3, 1, 2]}, [1, 0, 0], [1, 1, 1])
    >>> {rule: round(found.area(rule), 3) for rule in found.areas}
    {'mine': 0.778, 'random': 0.667, 'oracle': 0.778}
    """
    columns = {**scores, "the small model's quality": small, "the large model's quality": large}
    for name, column in columns.items():
        if len(column) != len(small) or not len(small) or not np.isfinite(column).all():
            raise PertokenError(
                f"{name}: a deferral curve takes one finite number per question, for at least one"
            )
    known: dict[str, Sequence[float]] = {
        **scores,
        "random": [0.0] * len(small),
        "oracle": [low - high for low, high in zip(small, large, strict=True)],
    }
    places = [float(place) for place in range(len(small))]
    areas = {}
    for name, column in known.items():
        statistic = partial(_areas, scores=column, small=small, large=large)
        interval = bootstrap(statistic, places, seed=seed)
        areas[name] = (deferral_area(column, small, large), interval)
    early = {name: [-each for each in column] for name, column in known.items()}
    return DeferralCurves(
        questions=len(small),
        rates=_GRID,
        curves={name: deferral_quality(column, small, large) for name, column in known.items()},
        areas=areas,
        length_bias={
            name: None if lengths is None else rank_correlation(column, lengths)
            for name, column in early.items()
        },
        overhead=dict(overhead or {}),
    )

"""Texts with importance weights, and what can be read from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pertoken._extras import need
from pertoken.result import Part, Result, figure, plain


@dataclass(frozen=True)
class WeightedSamples(Result):
    """Texts with importance weights: together they stand for the constrained distribution.

    ids: new tokens of each particle, without the stop token; log_weights: nats, -inf for particles
    that died; log_marginal: estimate of the log-probability that the model satisfies the constraint
    (and of the critic's mean there), whose exponential is unbiased; checks: questions to the
    constraint; resampled: how often the particles were.

    >>> found = WeightedSamples([[5], [6], [5]], [0.0, 0.0, 0.0], -1.5, checks=7, resampled=0)
    >>> {ids: round(chance, 3) for ids, chance in found.posterior().items()}
    {(5,): 0.667, (6,): 0.333}
    >>> print(found.table())
     66.67%  5
     33.33%  6
    3 particles worth 3.0; log-probability of the constraint -1.50 nats; 7 checks of it
    """

    ids: list[list[int]]
    log_weights: list[float]
    log_marginal: float
    checks: int
    resampled: int
    decode: Callable[[Sequence[int]], str] | None = None

    _title = "Weighted texts"

    @property
    def weights(self) -> list[float]:
        """Weights that sum to 1."""
        return torch.tensor(self.log_weights, dtype=torch.float64).softmax(0).tolist()

    @property
    def effective_sample_size(self) -> float:
        """1 / sum of squared weights: how many equal particles these are worth.

        Resampling makes weights equal and loses texts: what was lost there is not in this number.
        """
        return 1.0 / sum(weight**2 for weight in self.weights)

    def posterior(self) -> dict[tuple[int, ...], float]:
        """Probability by text, the weights of equal texts summed, greatest first."""
        found: dict[tuple[int, ...], float] = {}
        for ids, weight in zip(self.ids, self.weights, strict=True):
            if weight > 0.0:
                found[tuple(ids)] = found.get(tuple(ids), 0.0) + weight
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def rows(self) -> list[dict[str, Any]]:
        """One dict per text, greatest first: text, probability, particles that hold it, ids.

        Without a tokenizer the text is its ids.
        """
        held = [tuple(ids) for ids in self.ids]
        return [
            {
                "text": self.decode(list(ids)) if self.decode else self._shown(ids),
                "probability": chance,
                "particles": held.count(ids),
                "ids": list(ids),
            }
            for ids, chance in self.posterior().items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """The `rows` as posterior, and the particles with their weights.

        Weights are nats, None for particles that died.
        """
        return {
            "posterior": self.rows(),
            "effective_sample_size": self.effective_sample_size,
            "log_marginal": self.log_marginal,
            "checks": self.checks,
            "resampled": self.resampled,
            "ids": self.ids,
            "log_weights": plain(self.log_weights),
        }

    def table(self, most: int = 10) -> str:
        """The most probable texts, a line each, and what the run was worth."""
        # Texts may be long: they stand last.
        lines = [f"{chance:7.2%}  {self._shown(ids)}" for ids, chance in self.posterior().items()]
        if len(lines) > most:
            lines = [*lines[:most], f"         … and {len(lines) - most} more"]
        return "\n".join([*lines, self._worth()])

    def _parts(self) -> list[Part]:
        """A line per text, and what the run was worth."""
        lines = [
            [self._shown(row["ids"]), f"{row['probability']:.2%}", str(row["particles"])]
            for row in self.rows()
        ]
        return [Part("", [["text", "probability", "particles"], *lines], [self._worth()])]

    def plot(self, most: int = 10) -> Any:
        """The most probable texts as horizontal bars, a plotly figure (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        shown = list(self.posterior().items())[:most][::-1]  # plotly draws from below
        chances = [chance for _, chance in shown]
        bars = graph.Bar(x=chances, y=list(range(len(shown))), orientation="h")
        ticks = {
            "tickvals": list(range(len(shown))),
            "ticktext": [self._shown(ids) for ids, _ in shown],
        }
        axis = {"title": "probability", "tickformat": ".0%", "rangemode": "tozero"}
        return figure(bars, title=self._worth(), xaxis=axis, yaxis=ticks)

    def _worth(self) -> str:
        resampled = f", resampled {self.resampled} x" if self.resampled else ""
        return (
            f"{len(self.ids)} particles worth {self.effective_sample_size:.1f}{resampled}; "
            f"log-probability of the constraint {self.log_marginal:.2f} nats; {self.checks} checks "
            "of it"
        )

    def _shown(self, ids: Sequence[int]) -> str:
        return repr(self.decode(list(ids))) if self.decode else " ".join(map(str, ids))

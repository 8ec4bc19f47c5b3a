"""Texts with importance weights, and what can be read from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pertoken._extras import need


@dataclass(frozen=True)
class WeightedSamples:
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

    def table(self, most: int = 10) -> str:
        """The most probable texts, a line each, and what the run was worth."""
        lines = [f"{chance:7.2%}  {self._shown(ids)}" for ids, chance in self.posterior().items()]
        if len(lines) > most:
            lines = [*lines[:most], f"         … and {len(lines) - most} more"]
        return "\n".join([*lines, self._worth()])

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

    def to_dataframe(self) -> Any:
        """The `rows` as a pandas DataFrame (extra `dataframe`)."""
        return need("pandas", "dataframe").DataFrame(self.rows())

    def to_json(self) -> str:
        """Everything as JSON: the `rows` as posterior, and the particles with their weights.

        Weights are nats, null for particles that died.
        """
        data = {
            "posterior": self.rows(),
            "effective_sample_size": self.effective_sample_size,
            "log_marginal": self.log_marginal,
            "checks": self.checks,
            "resampled": self.resampled,
            "ids": self.ids,
            "log_weights": [w if w > -math.inf else None for w in self.log_weights],
        }
        return json.dumps(data, ensure_ascii=False, allow_nan=False)

    def plot(self, most: int = 10) -> Any:
        """The most probable texts as horizontal bars, a plotly figure (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        shown = list(self.posterior().items())[:most][::-1]  # plotly draws from below
        bars = graph.Bar(
            x=[chance for _, chance in shown],
            y=list(range(len(shown))),
            orientation="h",
        )
        figure = graph.Figure(bars)
        figure.update_layout(title=self._worth(), template="plotly_white")
        figure.update_xaxes(title="probability", tickformat=".0%", rangemode="tozero")
        figure.update_yaxes(
            tickvals=list(range(len(shown))), ticktext=[self._shown(ids) for ids, _ in shown]
        )
        return figure

    def _worth(self) -> str:
        resampled = f", resampled {self.resampled} x" if self.resampled else ""
        return (
            f"{len(self.ids)} particles worth {self.effective_sample_size:.1f}{resampled}; "
            f"log-probability of the constraint {self.log_marginal:.2f} nats; {self.checks} checks "
            "of it"
        )

    def _shown(self, ids: Sequence[int]) -> str:
        return repr(self.decode(list(ids))) if self.decode else " ".join(map(str, ids))

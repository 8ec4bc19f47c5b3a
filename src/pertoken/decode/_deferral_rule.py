"""A deferral rule by name: what it learns from calibration data, its scores and its thresholds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pertoken.decode._learned import Learned, fit
from pertoken.decode._pairs import Pair
from pertoken.decode.deferral import (
    ALPHAS,
    chow_average,
    chow_quantile,
    chow_sum,
    deferral_area,
    quantiles,
)
from pertoken.errors import PertokenError, nearest

__all__ = ["RULES", "Rule", "qualities"]

RULES = (
    "chow-average",
    "chow-quantile",
    "chow-sum",
    "post-hoc-embed-1",
    "post-hoc-embed-1+2",
    "post-hoc-quantile",
    "random",
)
"""The rules by name; "chow-quantile-0.2" and the like have their quantile in the name."""

FEWEST = 20  # questions that a rule can be learned from


class Rule:
    """One of `RULES`, and what `fit` found for it.

    alpha: the quantile of a Chow-Quantile rule; learned: of a learned one; calibration: the scores
    of the calibration data, ascending.
    """

    def __init__(self, name: str, net: str = "logistic", seed: int = 0) -> None:
        self.name, self.net, self.seed = name, net, seed
        self.alpha = _alpha(name)
        self.learns = name.startswith("post-hoc")
        self.reads_small = name.startswith("post-hoc-embed")
        self.reads_large = name == "post-hoc-embed-1+2"
        self.learned: Learned | None = None
        self.calibration: list[float] = []
        if net not in ("logistic", "mlp"):
            raise PertokenError(f"a learned rule is 'logistic' or 'mlp', not {net!r}")

    def fit(self, pairs: Sequence[Pair]) -> None:
        """See `Cascade.fit`."""
        self.refuse_few(len(pairs))
        if self.learns:
            gains = torch.tensor(_gains(pairs, self.name), dtype=torch.float64)
            self.learned, apart = fit(self._features(pairs), gains, self.net, self.seed)
            scores = (-apart).tolist()
        else:
            if self.name == "chow-quantile":
                self.alpha = _best_alpha(pairs)
            scores = self.scores(pairs)
        self.calibration = sorted(scores)

    def refuse_few(self, questions: int) -> None:
        """PertokenError for fewer questions than the rule can be fitted on."""
        if not questions:
            raise PertokenError("there are no calibration data: give some questions to fit on")
        fewest = FEWEST if self.learns else 2 if self.name == "chow-quantile" else 1
        if questions < fewest:
            raise PertokenError(f"{self.name} takes {fewest} questions or more, got {questions}")

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """A number per question, lowest where deferring is worth most."""
        if self.learns:
            if self.learned is None:
                raise PertokenError(f"{self.name} is not learned yet: call fit first")
            return (-self.learned(self._features(pairs))).tolist()
        if self.name == "random":
            return [self.draw("random", pair.prompt) for pair in pairs]
        answers = [pair.small.logprobs for pair in pairs]
        if self.name == "chow-sum":
            return [chow_sum(each) for each in answers]
        if self.name == "chow-average":
            return [chow_average(each) for each in answers]
        if self.alpha is None:
            raise PertokenError("chow-quantile has not chosen its quantile yet: call fit first")
        return [chow_quantile(each, self.alpha) for each in answers]

    def threshold(self, rate: float) -> tuple[float, float]:
        """See `Cascade.threshold`."""
        if not 0 <= rate <= 1:
            raise PertokenError(f"a deferral rate is a share from 0 to 1, got {rate}")
        if not self.calibration:
            raise PertokenError("no scores to take a deferral rate from: call fit first")
        if rate in (0, 1):
            return (float("inf") if rate else float("-inf")), 0.0
        scores = np.asarray(self.calibration)
        wanted = rate * len(scores)
        score = float(scores[min(int(wanted), len(scores) - 1)])
        below, upto = np.searchsorted(scores, score), np.searchsorted(scores, score, "right")
        return score, float((wanted - below) / (upto - below))

    def defers(self, pairs: Sequence[Pair], scores: Sequence[float], rate: float) -> list[bool]:
        """Which questions are deferred; among equal scores each by a draw of its own."""
        score, share = self.threshold(rate)
        return [
            each < score or (each == score and self.draw("tie", pair.prompt) < share)
            for pair, each in zip(pairs, scores, strict=True)
        ]

    def draw(self, what: str, prompt: str) -> float:
        """A number in [0, 1) that is the prompt's own, whatever is asked beside it."""
        return random.Random(f"{what} {self.seed} {prompt}").random()

    def to_dict(self) -> dict[str, Any]:
        """What `fit` found, as plain values."""
        learned = None if self.learned is None else self.learned.to_list()
        return {"alpha": self.alpha, "learned": learned, "calibration": self.calibration}

    def restore(self, state: dict[str, Any]) -> None:
        """What `to_dict` gave."""
        self.alpha = state["alpha"]
        self.learned = None if state["learned"] is None else Learned.from_list(state["learned"])
        self.calibration = [float(each) for each in state["calibration"]]

    def _features(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """[questions, features], float64."""
        if self.reads_small and not all(pair.small.state for pair in pairs):
            raise PertokenError(
                f"{self.name} reads the small model's layers, of which its answers have none: "
                "ask with this very cascade, and a small model that is no endpoint or function"
            )
        if self.reads_large and not all(pair.early for pair in pairs):
            raise PertokenError(f"{self.name} reads the large model: ask with this very cascade")
        rows = [
            (
                *quantiles(pair.small.logprobs),
                *(pair.small.state if self.reads_small else ()),
                *(pair.early if self.reads_large else ()),
            )
            for pair in pairs
        ]
        return torch.tensor(np.array(rows), dtype=torch.float64)


def qualities(pairs: Sequence[Pair], what: str) -> tuple[list[float], list[float]]:
    """Of the small and the large model's answers; PertokenError where they were not judged."""
    small = [pair.small_quality for pair in pairs if pair.small_quality is not None]
    large = [pair.large_quality for pair in pairs if pair.large_quality is not None]
    if len(small) < len(pairs) or len(large) < len(pairs):
        raise PertokenError(f"{what} needs judged answers: ask with references")
    return small, large


def _gains(pairs: Sequence[Pair], what: str) -> list[float]:
    """What deferring each question gains; PertokenError where nothing can be learned from it."""
    small, large = qualities(pairs, what)
    gains = [high - low for low, high in zip(small, large, strict=True)]
    if max(gains) <= 0 or min(gains) == max(gains):
        seen = "never better than" if max(gains) <= 0 else "always better by as much than"
        raise PertokenError(
            f"calibration data of one class: the large model's answer is {seen} the small one's "
            f"in {len(pairs)} questions, so there is nothing to choose; give other questions"
        )
    return gains


def _best_alpha(pairs: Sequence[Pair]) -> float:
    _gains(pairs, "chow-quantile")
    small, large = qualities(pairs, "chow-quantile")

    def area(alpha: float) -> float:
        scores = [chow_quantile(pair.small.logprobs, alpha) for pair in pairs]
        return deferral_area(scores, small, large)

    return max(ALPHAS, key=area)


def _alpha(rule: str) -> float | None:
    """The quantile in a rule's name; PertokenError for a name that is none.

    >>> _alpha("chow-quantile-0.2"), _alpha("chow-sum")
    (0.2, None)
    """
    head, _, tail = rule.rpartition("-")
    if rule in RULES or head != "chow-quantile":
        if rule not in RULES:
            hint = nearest(rule, RULES)
            raise PertokenError(f"unknown rule {rule!r}{hint}: there are {', '.join(RULES)}")
        return None
    try:
        alpha = float(tail)
    except ValueError:
        alpha = -1.0
    if not 0 <= alpha <= 1:
        raise PertokenError(f"{rule}: a quantile is a number from 0 to 1, as in chow-quantile-0.2")
    return alpha

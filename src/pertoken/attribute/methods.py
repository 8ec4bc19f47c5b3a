"""The methods by name, with what they need and what they cost."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pertoken.attribute._question import Question
from pertoken.attribute._scores import Scores
from pertoken.attribute.attention import attention, attention_last, attention_rollout
from pertoken.attribute.decompx import rate as decompx
from pertoken.attribute.globenc import rate as globenc
from pertoken.attribute.gradients import (
    gradient_norm,
    gradient_shap,
    input_x_gradient,
    integrated_gradients,
)
from pertoken.attribute.perturb import lime, occlusion
from pertoken.attribute.reagent import reagent
from pertoken.errors import PertokenError, nearest

Run = Callable[..., Scores]
"""`(question, quantity, *, seed, **options) -> Scores`."""
Rows = Callable[[Question, dict[str, Any]], tuple[int, int]]
"""Rows of text that go through the model, at least and at most, given all options."""


@dataclass(frozen=True)
class Method:
    """One way to rate tokens.

    unit: what its values are. backward: does a row cost a gradient too.
    """

    name: str
    run: Run
    rows: Rows
    unit: str
    backward: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Its options and their defaults."""
        parameters = inspect.signature(self.run).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def filled(self, options: dict[str, Any]) -> dict[str, Any]:
        """All options with their values; PertokenError for one the method does not have."""
        for name in options:
            if name in self.options:
                continue
            known = [option for option in self.options if option != "seed"]
            raise PertokenError(
                f"the method {self.name!r} has no option {name!r}{nearest(name, known)}; "
                + (f"it has: {', '.join(known)}" if known else "it has none")
            )
        return {**self.options, **options}

    def __call__(self, question: Question, quantity: Any, **options: Any) -> Scores:
        """Scores of the question; PertokenError for an option the method does not have, and NaN."""
        scores = self.run(question, quantity, **self.filled(options))
        for values, place in zip(scores.values, question.places, strict=True):
            if bool(values[:place][question.free[:place].cpu()].isnan().any()):
                name = type(question.model).__name__
                raise PertokenError(f"a score of {self.name} is NaN: load {name} in float32")
        return scores


def find(name: str) -> Method:
    """The method of a name; PertokenError, with the nearest names, where there is none.

    >>> find("lime").options["samples"]
    200
    """
    if name not in METHODS:
        raise PertokenError(
            f"unknown attribution method {name!r}{nearest(name, METHODS)}; there is: "
            f"{', '.join(METHODS)}"
        )
    return METHODS[name]


def _reagent(question: Question, options: dict[str, Any]) -> tuple[int, int]:
    runs = options["probes"] * len(question.places)
    start = len(question.places)
    return start + 2 * runs, start + 2 * runs * options["max_steps"]


def _one(question: Question, options: dict[str, Any]) -> tuple[int, int]:
    return 1, 1


def _per_target(option: str | None, more: int = 0) -> Rows:
    def rows(question: Question, options: dict[str, Any]) -> tuple[int, int]:
        count = len(question.places) * ((options[option] if option else 1) + more)
        return count, count

    return rows


def _occlusion(question: Question, options: dict[str, Any]) -> tuple[int, int]:
    before = question.free.cumsum(0).tolist()
    count = sum(1 + options["draws"] * before[place - 1] for place in question.places)
    return count, count


_WEIGHT, _CHANGE = "share of attention", "in the quantity's unit"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("reagent", reagent, _reagent, "importance, sums to 1"),
        Method("attention", attention, _one, _WEIGHT),
        Method("attention-last", attention_last, _one, _WEIGHT),
        Method("attention-rollout", attention_rollout, _one, _WEIGHT),
        Method(
            "input-x-gradient",
            input_x_gradient,
            _per_target(None),
            _CHANGE,
            backward=True,
        ),
        Method(
            "gradient-norm",
            gradient_norm,
            _per_target(None),
            "length of the gradient",
            backward=True,
        ),
        Method(
            "integrated-gradients",
            integrated_gradients,
            _per_target("steps", 2),
            _CHANGE,
            backward=True,
        ),
        Method(
            "gradient-shap",
            gradient_shap,
            _per_target("samples"),
            _CHANGE,
            backward=True,
        ),
        Method("decompx", decompx, _per_target(None), _CHANGE, backward=True),
        Method("globenc", globenc, _one, "length of a vector"),
        Method("occlusion", occlusion, _occlusion, _CHANGE),
        Method("lime", lime, _per_target("samples"), _CHANGE),
    )
}
"""All methods by name."""

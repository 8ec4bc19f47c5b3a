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
from pertoken.attribute.quantity import QUANTITIES
from pertoken.attribute.reagent import reagent
from pertoken.errors import PertokenError, nearest

Run = Callable[..., Scores]
"""`(question, quantity, *, seed, **options) -> Scores`."""
Rows = Callable[[Question, dict[str, Any]], tuple[int, int]]
"""Rows of text that go through the model, at least and at most, given all options."""


@dataclass(frozen=True)
class Method:
    """One way to rate tokens.

    backward: does a row cost a gradient too. aims: do its values depend on the quantity and the
    target, or on the place alone.
    """

    name: str
    run: Run
    rows: Rows
    backward: bool = False
    aims: bool = True

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
        if not self.aims and quantity is not QUANTITIES["probability"]:
            note = f"{self.name} is the same for every quantity: it depends on the place alone"
            return Scores(scores.values, (*scores.notes, note))
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


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("reagent", reagent, _reagent),
        Method("attention", attention, _one, aims=False),
        Method("attention-last", attention_last, _one, aims=False),
        Method("attention-rollout", attention_rollout, _one, aims=False),
        Method("input-x-gradient", input_x_gradient, _per_target(None), backward=True),
        Method("gradient-norm", gradient_norm, _per_target(None), backward=True),
        Method(
            "integrated-gradients", integrated_gradients, _per_target("steps", 2), backward=True
        ),
        Method("gradient-shap", gradient_shap, _per_target("samples"), backward=True),
        Method("decompx", decompx, _per_target(None), backward=True),
        Method("globenc", globenc, _one, aims=False),
        Method("occlusion", occlusion, _occlusion),
        Method("lime", lime, _per_target("samples")),
    )
}
"""All methods by name."""

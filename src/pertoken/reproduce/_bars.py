"""A bar is text such as ``">= 1.12"``; here it is read and judged."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pertoken.errors import PertokenError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_BAR = re.compile(rf"\s*(>=|<=|==|>|<)\s*({_NUMBER})\s*")


@dataclass(frozen=True)
class Bar:
    """One comparison against a number.

    >>> Bar.parse(">= 1.12").holds(1.2)
    True
    >>> Bar.parse("<= 0.08").holds(float("nan"))
    False
    """

    text: str
    operator: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Bar:
        """Read ``OP NUMBER`` with OP one of >= <= == > <; anything behind the number is refused.

        A unit behind the number would make the figure ambiguous ("1.5 x" of what?), so the unit
        belongs in the row and the compared figure in the row's `here`.
        """
        match = _BAR.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise PertokenError(
                f"bar {text!r} is not readable: write an operator and a number, such as '>= 1.12'"
            )
        return cls(text.strip(), match[1], float(match[2]))

    def holds(self, figure: float | None) -> bool:
        """Whether `figure` meets the bar; a missing figure, NaN or infinity never does."""
        if figure is None or not math.isfinite(figure):
            return False
        return _OPERATORS[self.operator](figure, self.value)


def of_each(labels: Mapping[str, str], said: Mapping[str, str]) -> dict[str, str]:
    """What is said of a metric, said of it for every model: a label stands behind the metric.

    >>> of_each({"first": "", "second": ", other"}, {"loss": "< 1"})
    {'loss': '< 1', 'loss, other': '< 1'}
    """
    return {metric + label: text for label in labels.values() for metric, text in said.items()}


def freeze(bars: object, where: str) -> dict[str, Bar]:
    """The declared bars, metric -> Bar, as they stood before the run.

    Raises PertokenError where `bars` (the ``BARS`` of the file `where`) is not a mapping from
    metric to readable bar.
    """
    if not isinstance(bars, dict) or not all(isinstance(metric, str) for metric in bars):
        raise PertokenError(f"{where} must declare BARS, a dict of metric to bar ('>= 1.12')")
    frozen = {}
    for metric, text in bars.items():
        try:
            frozen[metric] = Bar.parse(text)
        except PertokenError as error:
            raise PertokenError(f"{where}: {metric!r}: {error}") from None
    return frozen

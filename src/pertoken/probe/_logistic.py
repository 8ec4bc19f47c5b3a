"""Logistic regression of right and wrong on a few numbers, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["logistic"]

_STEPS = 50
_FLAT = 1e-9
Z = 1.959963984540054  # of a 95 % interval


def logistic(
    right: Sequence[bool], columns: Mapping[str, Sequence[float]]
) -> dict[str, tuple[float, float, float]]:
    """(coefficient, low, high) of each column: log-odds of right per standard deviation.

    Maximum likelihood by Newton's method, with 95 % intervals of Wald. Columns without variance
    are left out; empty where there is no maximum (all right, all wrong, a perfect split, or columns
    that follow from each other).

    >>> found = logistic([True, False, True, False], {"x": [3, 2, 1, 0], "flat": [1, 1, 1, 1]})
    >>> list(found), round(found["x"][0], 3)
    (['x'], 1.015)
    """
    used = {name: np.asarray(column, float) for name, column in columns.items()}
    used = {name: column for name, column in used.items() if column.std() > _FLAT}
    y = np.asarray(right, float)
    if not used or y.min() == y.max():
        return {}
    x = np.stack([np.ones_like(y), *[(c - c.mean()) / c.std() for c in used.values()]], -1)
    weight = np.zeros(x.shape[1])
    for _ in range(_STEPS):
        gradient, hessian = _slopes(x, y, weight)
        if np.linalg.cond(hessian) > 1 / _FLAT:
            return {}
        step = np.linalg.solve(hessian, gradient)
        weight = weight + step
        if np.abs(step).max() < _FLAT:
            errors = np.sqrt(np.diag(np.linalg.inv(hessian)))
            ends = zip(weight[1:], errors[1:], strict=True)
            return {
                name: (float(w), float(w - Z * error), float(w + Z * error))
                for name, (w, error) in zip(used, ends, strict=True)
            }
    return {}


def _slopes(
    x: NDArray[np.float64], y: NDArray[np.float64], weight: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gradient of the log-likelihood and minus its Hessian."""
    chance = 1 / (1 + np.exp(-np.clip(x @ weight, -500, 500)))
    return x.T @ (y - chance), (x * (chance * (1 - chance))[:, None]).T @ x

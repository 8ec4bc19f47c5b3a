"""Percentile bootstrap over prompts: how far a figure would move with other prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pertoken.errors import PertokenError

Interval = tuple[float, float]
Floats = NDArray[np.float64]


def bootstrap(
    statistic: Callable[..., Floats],
    *columns: Sequence[float],
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of ``statistic(*columns)`` over resampled prompts.

    Each column holds one number per prompt, `[prompts]`; a draw takes the same prompts from every
    column, so pairs stay pairs. `statistic` receives arrays `[draws, prompts]` and reduces the
    last axis. Draws whose statistic is not finite (an empty denominator) are left out; with none
    left the interval is (nan, nan).

    >>> bootstrap(lambda x: x.mean(-1), [2.0, 2.0, 2.0])
    (2.0, 2.0)
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    count = arrays[0].shape[0] if arrays else 0
    if count == 0 or any(array.shape != (count,) for array in arrays):
        raise PertokenError(
            "bootstrap needs columns of one number per prompt, all of the same length; got "
            f"lengths {[array.size for array in arrays]}"
        )
    picks = np.random.default_rng(seed).integers(0, count, size=(draws, count))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.asarray(statistic(*(array[picks] for array in arrays)))
    values = values[np.isfinite(values)]
    if values.size == 0:
        return (float("nan"), float("nan"))
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return (float(low), float(high))


def bootstrap_mean(values: Sequence[float], seed: int = 0, **options: int) -> Interval:
    """Interval of the mean of one number per prompt.

    >>> low, high = bootstrap_mean([1.0, 2.0, 3.0, 4.0])
    >>> low < 2.5 < high
    True
    """
    return bootstrap(lambda x: x.mean(-1), values, seed=seed, **options)


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], seed: int = 0, **options: int
) -> Interval:
    """Interval of ``sum(numerators) / sum(denominators)``, for instance tokens per forward.

    >>> bootstrap_ratio([2, 4, 6], [1, 2, 3])
    (2.0, 2.0)
    """
    return bootstrap(
        lambda top, bottom: top.sum(-1) / bottom.sum(-1),
        numerators,
        denominators,
        seed=seed,
        **options,
    )


def bootstrap_ratio_of_ratios(
    first: tuple[Sequence[float], Sequence[float]],
    second: tuple[Sequence[float], Sequence[float]],
    seed: int = 0,
    **options: int,
) -> Interval:
    """Interval of one ratio of sums over another on the same prompts.

    `first` and `second` are (numerators, denominators), for instance (tokens, forwards) of two
    drafters.

    >>> bootstrap_ratio_of_ratios(([4, 8], [1, 2]), ([2, 4], [1, 2]))
    (2.0, 2.0)
    """
    return bootstrap(
        lambda a, b, c, d: (a.sum(-1) / b.sum(-1)) / (c.sum(-1) / d.sum(-1)),
        *first,
        *second,
        seed=seed,
        **options,
    )

"""Intervals cover what they should, follow their seed, and refuse what has no meaning."""

import math

import numpy as np
import pytest

from pertoken._bootstrap import (
    bootstrap,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_ratio_of_ratios,
)
from pertoken.errors import PertokenError


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(1).normal(10, 2, size=400)
    low, high = bootstrap_mean(values.tolist(), draws=4000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_a_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    # mean of ratios would be (10 + 1) / 2; ratio of sums is 110 / 101 at these weights
    low, high = bootstrap_ratio([10, 100] * 200, [1, 100] * 200, draws=500)
    assert low < 110 / 101 < high < 1.2


def test_prompts_stay_pairs() -> None:
    # every prompt has twice the tokens per forward, however much prompts differ among themselves
    tokens, forwards = [2.0, 50.0, 7.0], [1.0, 5.0, 3.0]
    twice = [2 * value for value in tokens]
    assert bootstrap_ratio_of_ratios((twice, forwards), (tokens, forwards)) == (2.0, 2.0)


def test_the_seed_fixes_the_interval() -> None:
    values = np.random.default_rng(2).normal(size=50).tolist()
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_an_empty_denominator_gives_nan_not_a_crash() -> None:
    assert all(map(math.isnan, bootstrap_ratio([1, 2], [0, 0])))


@pytest.mark.parametrize("columns", [([],), ([1, 2], [1]), ()])
def test_columns_must_match(columns: tuple[list[float], ...]) -> None:
    with pytest.raises(PertokenError, match="same length"):
        bootstrap(lambda *arrays: arrays[0].mean(-1), *columns)

"""Both unconstrained forms have the optimum of the linear program, and are nowhere above it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from pertoken.errors import PertokenError
from pertoken.train import apc_clip, tv_trpo_penalty

numbers = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))
problems = st.lists(numbers, min_size=1, max_size=7).flatmap(
    lambda advantages: st.tuples(
        st.just(advantages),
        st.floats(0.01, 6).map(lambda x: round(x, 3)),
        st.lists(
            st.lists(
                st.floats(0, 5).map(lambda x: round(x, 3)),
                min_size=len(advantages),
                max_size=len(advantages),
            ),
            min_size=1,
            max_size=5,
        ),
    )
)


def optimum(advantages: np.ndarray, budget: float) -> tuple[float, np.ndarray]:
    """max A r with sum |r - 1| <= budget and r >= 0, d = up - down."""
    n = len(advantages)
    result = linprog(
        np.concatenate([-advantages, advantages]),
        A_ub=np.ones((1, 2 * n)),
        b_ub=[budget],
        bounds=[(0, None)] * n + [(0, 1)] * n,
        method="highs",
    )
    assert result.status == 0
    drift = result.x[:n] - result.x[n:]
    return float(advantages.sum() - result.fun), 1 + drift


@given(problems)
@settings(max_examples=150, deadline=None)
def test_both_forms_have_the_optimum_of_the_linear_program(
    problem: tuple[list[float], float, list[list[float]]],
) -> None:
    numbers, budget, points = problem
    best, solution = optimum(np.array(numbers), budget)
    advantages = torch.tensor(numbers, dtype=torch.float64)
    at = torch.tensor(solution, dtype=torch.float64)
    ratios = torch.tensor(points, dtype=torch.float64)
    everywhere = advantages.expand_as(ratios)
    for form in (apc_clip, tv_trpo_penalty):
        assert abs(float(form(at, advantages, budget)) - best) <= 1e-9
        assert bool((form(ratios, everywhere, budget) <= best + 1e-9).all())


@given(problems)
@settings(max_examples=100, deadline=None)
def test_over_the_budget_the_clip_is_the_value_of_a_feasible_point(
    problem: tuple[list[float], float, list[list[float]]],
) -> None:
    numbers, budget, points = problem
    advantages = torch.tensor(numbers, dtype=torch.float64)
    ratios = torch.tensor(points, dtype=torch.float64)
    drift = ratios - 1
    excess = (drift.abs().sum(-1, keepdim=True) - budget).clamp(min=0)
    shrunk = drift.sign() * (drift.abs() - excess).clamp(min=0)
    assert bool((shrunk.abs().sum(-1) <= budget + 1e-12).all())
    torch.testing.assert_close(
        apc_clip(ratios, advantages.expand_as(ratios), budget),
        (advantages * (1 + shrunk)).sum(-1),
        rtol=0,
        atol=1e-9,
    )


def test_a_smaller_penalty_would_not_be_exact() -> None:
    advantages = torch.tensor([1.0, 2.0], dtype=torch.float64)
    far = torch.tensor([1.0, 50.0], dtype=torch.float64)
    best, _ = optimum(advantages.numpy(), 1.0)
    gain = float((advantages * far).sum() - 1.9 * (49 - 1))
    assert gain > best + 1
    with pytest.raises(PertokenError, match="exact for a weight of at least"):
        tv_trpo_penalty(far, advantages, 1.0, weight=1.9)
    assert float(tv_trpo_penalty(far, advantages, 1.0, weight=2.5)) < best


def test_the_radius_carries_gradient() -> None:
    """A sample over the budget is charged for closing the others."""
    ratio = torch.tensor([3.0, 1.2], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, 1.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(apc_clip(ratio, advantages, 2.1), ratio)
    torch.testing.assert_close(gradient, torch.tensor([-1.0, -1.0], dtype=torch.float64))


def test_mistakes_are_named() -> None:
    with pytest.raises(PertokenError, match="budget"):
        apc_clip(torch.ones(2), torch.ones(2), 0.0)
    with pytest.raises(PertokenError, match="share a shape"):
        tv_trpo_penalty(torch.ones(2), torch.ones(3), 1.0)

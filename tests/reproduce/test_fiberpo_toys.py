"""The toys of the FiberPO reproduction: the true gradient is true, the stresses stress."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from pertoken.reproduce import _fiberpo_algebra as algebra
from pertoken.reproduce import _fiberpo_containment as containment
from pertoken.reproduce import _fiberpo_toy as toy
from pertoken.reproduce._fiberpo_methods import FIBERPO, PEERS, losses

OBJECTIVES = losses((math.exp(-0.5), math.exp(0.5)), 0.3)


def test_every_objective_has_a_name() -> None:
    assert set(OBJECTIVES) == {*PEERS, *FIBERPO}


def test_the_true_gradient_is_that_of_the_expected_reward() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, toy.STEPS, toy.SYMBOLS, generator=generator, dtype=torch.float64)

    def expected(table: torch.Tensor) -> float:
        """Chance of at least GOAL targets, by adding one step after another."""
        chances = table.softmax(-1)[:, 0].tolist()
        count = [1.0] + [0.0] * toy.STEPS
        for chance in chances:
            count = [
                count[k] * (1 - chance) + (count[k - 1] * chance if k else 0.0)
                for k in range(toy.STEPS + 1)
            ]
        return sum(count[toy.GOAL :])

    found = toy.true_gradient(logits)
    for seed, step, symbol in product(range(2), (0, 3), range(toy.SYMBOLS)):
        nudge = torch.zeros_like(logits[0])
        nudge[step, symbol] = 1e-6
        slope = (expected(logits[seed] + nudge) - expected(logits[seed] - nudge)) / 2e-6
        assert float(found[seed, step, symbol]) == pytest.approx(slope, abs=1e-8)


def test_on_policy_all_objectives_point_the_same_way() -> None:
    cosines = toy.update_cosines(OBJECTIVES, ("ascent", 0), seeds=3, first_seed=5)
    for name, values in cosines.items():
        torch.testing.assert_close(values, cosines["policy gradient"], msg=name)
    assert bool((cosines["FiberPO"] > 0.3).all())


def test_a_seed_does_not_depend_on_its_companions() -> None:
    many = toy.update_cosines(OBJECTIVES, ("mixed", 4), seeds=3, first_seed=5)
    one = toy.update_cosines(OBJECTIVES, ("mixed", 4), seeds=1, first_seed=7)
    for name in OBJECTIVES:
        torch.testing.assert_close(many[name][2:], one[name])


def test_the_identities_hold_on_a_batch_of_their_own() -> None:
    found = algebra.errors(seed=3, batches=2)
    assert found.pop("sum of the coefficients") <= 1e-7  # finite differences
    assert all(error <= 1e-9 for error in found.values()), found
    assert algebra.first_order(seed=3) == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("stress", containment.STRESSES)
def test_the_unclipped_objective_leaves_both_budgets_behind(stress: str) -> None:
    budgets = (math.log(0.8), math.log(1.28))
    some = {"policy gradient": OBJECTIVES["policy gradient"]}
    found = containment.contained(some, stress, 0, 1e-4, budgets, 0.1, steps=3)
    token, trajectory = found["policy gradient"]
    if stress == "common drift":
        assert trajectory > 1
        assert abs(token) < 1e-6
    else:
        assert token > 1 > trajectory

"""Balanced trees: the same guesses as Goose, k below every node, level by level."""

from __future__ import annotations

from collections import Counter
from itertools import count
from typing import Any

import pytest

from pertoken.decode import Balanced
from pertoken.errors import PertokenError


def started(k: int, **options: Any) -> Balanced:
    """Ten guesses behind every context that a draft can reach, all tokens new."""
    drafter = Balanced(k=k, **options)
    drafter.contexts = [[1, 2, 3]]
    drafter.begin(1000)
    fresh, level = count(100), [3]
    for _ in range(7):
        below: list[int] = []
        for token in level:
            guesses = [next(fresh) for _ in range(10)]
            drafter._table.tiers[0][(token,)] = (guesses, [0.1] * 10)
            below += guesses[:k]
        level = below[:60]
    return drafter


@pytest.mark.parametrize(
    ("k", "levels"),
    [
        (3, {1: 3, 2: 9, 3: 27, 4: 20}),
        (5, {1: 5, 2: 25, 3: 29}),
        (1, dict.fromkeys(range(1, 7), 1)),  # never deeper than six
    ],
)
def test_the_shape(k: int, levels: dict[int, int]) -> None:
    drafter = started(k)
    assert drafter.default_budget == 59  # 60 nodes with the root
    tree = drafter.propose(0, 59, 99)
    assert Counter(tree.depths[1:]) == levels
    for node in range(len(tree)):
        children = tree.children(node)
        guesses = drafter._table.tiers[0].get((tree.tokens[node],), ([], []))[0]
        assert [tree.tokens[child] for child in children] == guesses[: len(children)]
    assert set(tree.sources[1:]) == {"table"}


def test_budget_and_room_are_kept() -> None:
    drafter = started(3)
    assert drafter.propose(0, 7, 99).size == 7
    assert max(drafter.propose(0, 59, 2).depths) == 2


def test_the_pair_is_asked_first_and_poor_guesses_are_left_out() -> None:
    drafter = started(3)
    drafter._table.tiers[1][(2, 3)] = ([50, 51, 52], [0.9, 0.05, 0.009])
    tree = drafter.propose(0, 59, 99)
    assert [tree.tokens[i] for i in tree.children(0)] == [50, 51]


@pytest.mark.parametrize("k", [0, -1, 11])
def test_a_wrong_number_of_children_is_refused(k: int) -> None:
    with pytest.raises(PertokenError, match=f"not {k}"):
        Balanced(k=k)

"""Every estimator against exact enumeration of all its random choices."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from pertoken.decode.rejection import (
    Drawn,
    NextTokens,
    TableDraws,
    geometric,
    paper,
    recursive,
    unweighted,
)
from pertoken.testing import outcomes

ESTIMATORS: dict[str, Callable[..., Drawn]] = {
    "recursive": recursive,
    "geometric": geometric,
    "geometric, 3 accepts": partial(geometric, max_accepts=3),
    "geometric, 5 accepts": partial(geometric, max_accepts=5),
    "paper": paper,
}


def cases(seed: int, count: int) -> Iterator[tuple[list[float], set[int]]]:
    """Distributions over four tokens, some without mass, and what is accepted."""
    draw = random.Random(seed)
    for _ in range(count):
        raw = [draw.choice([0.0, 0.02, 0.3, 1.0, 4.0]) * draw.random() for _ in range(4)]
        if sum(raw) > 0:
            allowed = {token for token in range(4) if draw.random() < 0.5}
            yield [x / sum(raw) for x in raw], allowed


def expectation(
    estimate: Callable[..., Drawn], probs: list[float], allowed: set[int], cap: int
) -> dict[int, float]:
    """Exact expectation of the weight by token."""
    found: dict[int, float] = defaultdict(float)
    total = 0.0
    for chance, drawn in outcomes(estimate, probs, allowed, cap):
        found[drawn.token] += chance * drawn.weight
        total += chance
    assert total == pytest.approx(1.0, abs=1e-12)
    return found


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("cap", [2, 3, 4])
def test_weights_are_unbiased_for_every_token(name: str, cap: int) -> None:
    for probs, allowed in cases(cap, 6 if "5" in name else 12):
        found = expectation(ESTIMATORS[name], probs, allowed, cap)
        for token in range(4):
            expected = probs[token] if token in allowed else 0.0
            assert found[token] == pytest.approx(expected, abs=1e-12)


def test_more_accepts_vary_less() -> None:
    def variance(accepts: int) -> float:
        found = outcomes(partial(geometric, max_accepts=accepts), [0.4, 0.3, 0.3], {0, 2}, 6)
        values = [(chance, drawn.weight) for chance, drawn in found]
        mean = sum(chance * weight for chance, weight in values)
        return sum(chance * (weight - mean) ** 2 for chance, weight in values)

    assert variance(4) < variance(3) < variance(2)


def test_the_first_accept_without_weight_is_what_a_mask_samples() -> None:
    for probs, allowed in cases(0, 12):
        mass = sum(probs[token] for token in allowed)
        found = expectation(unweighted, probs, allowed, 4)
        for token in range(4):
            share = probs[token] / mass if mass and token in allowed else 0.0
            assert found[token] == pytest.approx(share, abs=1e-12)
        if not mass:
            assert found[-1] == 0.0


@pytest.mark.parametrize(
    "probs", [[0.5, 0.3, 0.2, 0.0], [0.9, 0.09, 0.0095, 0.0005], [0.25, 0.25, 0.25, 0.25]]
)
def test_draws_without_replacement_follow_the_probabilities(probs: list[float]) -> None:
    torch.manual_seed(0)
    masses = 7.0 * torch.tensor(probs)
    draws = TableDraws(masses, masses.cumsum(-1, dtype=torch.float64))
    counts = Counter(tuple(draws.order(())) for _ in range(4000))
    assert set(map(len, counts)) == {sum(p > 0 for p in probs)}  # no mass: it never comes
    for order, count in counts.items():
        left, expected = 1.0, 4000.0
        for token in order:
            expected *= probs[token] / left
            left -= probs[token]
        assert abs(count - expected) < 5 * max(expected, 1.0) ** 0.5
    assert sum(counts.values()) == 4000


def test_draws_leave_out_the_rejected_and_count_the_skipped() -> None:
    torch.manual_seed(0)
    masses = torch.tensor([0.5, 0.3, 0.2, 0.0])
    draws = TableDraws(masses, masses.cumsum(-1, dtype=torch.float64))
    assert list(draws.order({0, 2})) == [1]
    assert list(draws.order({0, 1, 2})) == []
    skipped = sum(draws.skipped(0.75) for _ in range(4000)) / 4000
    assert skipped == pytest.approx(3.0, abs=0.3)
    assert draws.skipped(0.0) == 0


def test_a_long_order_is_whole_and_one_without_numbers_ends() -> None:
    masses = torch.full((500,), 1 / 500)
    draws = TableDraws(masses, masses.cumsum(-1, dtype=torch.float64))
    assert sorted(draws.order({7})) == [n for n in range(500) if n != 7]
    for broken in (torch.zeros(3), torch.full((3,), math.nan)):
        assert list(TableDraws(broken, broken.cumsum(-1, dtype=torch.float64)).order(())) == []


@pytest.mark.parametrize("proposed", [False, True])
@pytest.mark.parametrize("dropped", [None, [1], [1, 3]])
def test_weights_count_the_proposal_and_what_was_dropped(
    proposed: bool, dropped: list[int] | None
) -> None:
    torch.manual_seed(1)
    logits = torch.randn(2, 5)
    drafts = torch.randn(2, 5) if proposed else None
    found = NextTokens(logits, drafts, None if dropped is None else torch.tensor(dropped))
    for row in range(2):
        p = logits[row].double().softmax(-1).tolist()
        chances = [found.chance(row)(token) for token in range(5)]
        assert sum(chances) == pytest.approx(1.0)
        assert found.greatest(row) == pytest.approx(max(chances))
        allowed = {0, 2, 4}
        weights = expectation(recursive, chances, allowed, 9)
        for token in allowed:
            factor = math.exp(found.log_kept(row) + found.log_ratio(row, token))
            assert weights[token] * factor == pytest.approx(p[token], rel=1e-6)
        assert found.log_p(row, 3) == pytest.approx(math.log(p[3]))


def test_a_known_mask_gives_the_exact_mass_and_its_own_tokens() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 6)
    found = NextTokens(logits)
    allowed = torch.tensor([True, False, True, True])  # shorter: the rest is not allowed
    p = logits[1].double().softmax(-1)[[0, 2, 3]]
    drawn = [found.draw_allowed(1, allowed) for _ in range(4000)]
    assert all(mass == pytest.approx(float(p.sum().log()), abs=1e-6) for _, mass in drawn)
    counts = Counter(token for token, _ in drawn)
    for token, share in zip((0, 2, 3), (p / p.sum()).tolist(), strict=True):
        assert abs(counts[token] / 4000 - share) < 5 * (share / 4000) ** 0.5
    assert found.draw_allowed(0, torch.zeros(6, dtype=torch.bool)) == (-1, -math.inf)
    cut = NextTokens(torch.tensor([[0.0, -math.inf]]))
    assert cut.draw_allowed(0, torch.tensor([False, True])) == (-1, -math.inf)
    faint = NextTokens(torch.tensor([[0.0, -200.0]]))  # e^-200 is no float32
    token, mass = faint.draw_allowed(0, torch.tensor([False, True]))
    assert (token, mass) == (1, pytest.approx(-200.0))

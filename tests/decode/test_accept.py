"""Recursive rejection keeps the model's distribution: exact enumeration, not sampling."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.decode.accept import acceptance, recursive_rejection


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, list[int]]:
    weights = draw(
        st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1.0)), min_size=1, max_size=9).filter(any)
    )
    children = draw(st.lists(st.integers(0, len(weights) - 1), unique=True))
    probs = torch.tensor(weights, dtype=torch.float64)
    return probs / probs.sum(), children


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_every_token_comes_out_with_the_models_probability(
    case: tuple[torch.Tensor, list[int]],
) -> None:
    probs, children = case
    accept, rest = acceptance(probs, torch.tensor(children, dtype=torch.long))
    assert bool(((accept >= 0) & (accept <= 1)).all())
    out = torch.zeros_like(probs)
    reached = 1.0
    for chance, token in zip(accept.tolist(), children, strict=True):
        out[token] += reached * chance
        reached *= 1.0 - chance
    out += reached * rest
    assert float((out - probs).abs().max()) < 1e-9
    # The residual is a distribution, unless nothing is left for it.
    left = 1.0 - float(probs[children].sum())
    if left > 1e-12:
        assert float(rest.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(rest[children].sum()) == 0.0


def test_no_children_leave_the_distribution() -> None:
    probs = torch.tensor([0.2, 0.8], dtype=torch.float64)
    accept, rest = acceptance(probs, torch.tensor([], dtype=torch.long))
    assert len(accept) == 0
    assert torch.equal(rest, probs)


def test_a_point_mass() -> None:
    probs = torch.tensor([0.0, 1.0, 0.0])
    accept, rest = acceptance(probs, torch.tensor([0, 1, 2]))
    assert accept[:2].tolist() == [0.0, 1.0]
    assert not rest.any()
    for _ in range(20):
        assert recursive_rejection(probs, torch.tensor([0, 1])) == (1, 1)
        assert recursive_rejection(probs, torch.tensor([0, 2])) == (1, -1)


def test_children_with_all_the_mass_are_never_left() -> None:
    torch.manual_seed(0)
    probs = torch.tensor([0.1, 0.2, 0.7])
    for _ in range(200):
        token, place = recursive_rejection(probs, torch.tensor([2, 0, 1]))
        assert place >= 0
        assert [2, 0, 1][place] == token


def test_rounding_that_rejects_all_children_still_gives_a_possible_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probs = torch.tensor([0.3, 0.7])
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, 2.0))
    assert recursive_rejection(probs, torch.tensor([0, 1])) == (1, 1)


def test_unnormalised_weights_count_as_probabilities() -> None:
    accept, rest = acceptance(torch.tensor([2.0, 2.0, 4.0]), torch.tensor([0]))
    assert accept.tolist() == [0.25]
    assert rest.tolist() == pytest.approx([0.0, 1 / 3, 2 / 3])


def test_draws_follow_the_acceptance() -> None:
    torch.manual_seed(1)
    probs = torch.tensor([0.15, 0.35, 0.3, 0.2], dtype=torch.float64)
    children = torch.tensor([2, 0])
    draws = 8000
    seen = torch.zeros(4)
    places = torch.zeros(3)
    for _ in range(draws):
        token, place = recursive_rejection(probs, children)
        seen[token] += 1
        places[place] += 1  # -1 is the last entry
    spread = (probs * (1 - probs) / draws).sqrt()
    assert bool(((seen / draws - probs).abs() < 4.5 * spread).all())
    accept, _ = acceptance(probs, children)
    wanted = torch.tensor([accept[0], (1 - accept[0]) * accept[1]])
    assert torch.allclose(places[:2].double() / draws, wanted, atol=0.025)

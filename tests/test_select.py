"""Keep rules against slow loops that say the same thing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pertoken import select
from pertoken.errors import PertokenError

SEEDS = st.integers(0, 10_000)


def draw(seed, batch=3, time=9, hidden=4):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (batch, time), generator=generator).double() / 4  # with ties
    features = torch.randn(batch, time, hidden, generator=generator, dtype=torch.float64)
    candidates = torch.rand(batch, time, generator=generator) < 0.7
    return scores, features, candidates


def row_sets(kept):
    return [set(row.nonzero().flatten().tolist()) for row in kept]


@given(SEEDS, st.integers(1, 12))
def test_top_k(seed, budget):
    scores, _, candidates = draw(seed)
    scores[0, 0] = -math.inf
    for row, found in enumerate(row_sets(select.top_k(scores, budget, candidates))):
        places = candidates[row].nonzero().flatten().tolist()
        best = sorted(places, key=lambda i: (-scores[row, i].item(), i))[:budget]
        assert found == set(best)


@given(SEEDS, st.floats(0.01, 1.0))
def test_top_p(seed, mass):
    scores, _, candidates = draw(seed)
    for row, found in enumerate(row_sets(select.top_p(scores, mass, candidates))):
        places = candidates[row].nonzero().flatten().tolist()
        order = sorted(places, key=lambda i: (-scores[row, i].item(), i))
        total = sum(scores[row, i].item() for i in places)
        held, best = 0.0, set()
        for place in order:
            if held >= mass * total * (1 - 1e-12) and total > 0:
                break
            best.add(place)
            held += scores[row, place].item()
        assert found == best


@given(SEEDS, st.integers(1, 12), st.sampled_from([0.0, 0.3, 1.0]))
def test_mmr(seed, budget, weight):
    scores, features, candidates = draw(seed)
    unit = features / features.norm(dim=-1, keepdim=True)
    kept = select.mmr(scores, features, budget, weight=weight, candidates=candidates)
    for row, found in enumerate(row_sets(kept)):
        chosen = []
        places = candidates[row].nonzero().flatten().tolist()
        while places and len(chosen) < budget:

            def gain(i, row=row, chosen=chosen):
                like = max((float(unit[row, i] @ unit[row, j]) for j in chosen), default=None)
                own = weight * scores[row, i].item()
                return own if like is None else own - (1 - weight) * like

            best = max(places, key=lambda i: (round(gain(i), 9), -i))
            places.remove(best)
            chosen.append(best)
        assert found == set(chosen)


@given(SEEDS, st.integers(1, 12))
def test_farthest_points(seed, budget):
    scores, features, candidates = draw(seed)
    unit = features / features.norm(dim=-1, keepdim=True)
    for rule in ("k_center", "max_min"):
        if rule == "k_center":
            kept = select.k_center(scores, features, budget, candidates=candidates)
        else:
            kept = select.max_min(features, budget, candidates=candidates)
        for row, found in enumerate(row_sets(kept)):
            places = candidates[row].nonzero().flatten().tolist()
            cosine = unit[row] @ unit[row].T
            chosen = []
            while places and len(chosen) < budget:
                others = chosen or candidates[row].nonzero().flatten().tolist()

                def gain(i, row=row, chosen=chosen, others=others, cosine=cosine, rule=rule):
                    if not chosen and rule == "k_center":
                        return scores[row, i].item()
                    like = [float(cosine[i, j]) for j in others if j != i]
                    return -max(like, default=-math.inf)

                best = max(places, key=lambda i: (round(gain(i), 9), -i))
                places.remove(best)
                chosen.append(best)
            assert found == set(chosen)


@given(SEEDS, st.integers(1, 12))
def test_counts_and_spread(seed, budget):
    _, _, candidates = draw(seed)
    for kept in (select.random(candidates, budget, seed=seed), select.grid(candidates, budget)):
        assert not (kept & ~candidates).any()
        assert torch.equal(kept.sum(1), candidates.sum(1).clamp(max=budget))
    for row in range(len(candidates)):
        places = candidates[row].nonzero().flatten().tolist()
        numbers = [n for n, p in enumerate(places) if select.grid(candidates, budget)[row, p]]
        gaps = [b - a for a, b in itertools.pairwise(numbers)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_random_is_even_and_repeats():
    all_of = torch.ones(2000, 5, dtype=torch.bool)
    kept = select.random(all_of, 2, seed=1)
    assert torch.equal(kept, select.random(all_of, 2, seed=1))
    # 2,000 draws of probability 0.4: five standard deviations are 0.055.
    assert (kept.double().mean(0) - 0.4).abs().max() < 0.055


def test_chunks_change_nothing(monkeypatch):
    _, features, _ = draw(0, time=20)
    whole = select.max_min(features, 6)
    monkeypatch.setattr(select, "_CHUNK", 3)
    assert torch.equal(select.max_min(features, 6), whole)


def test_half_precision_features():
    scores, features, _ = draw(3)
    assert select.mmr(scores, features.bfloat16(), 3).sum(1).tolist() == [3, 3, 3]


def test_indices():
    kept = torch.tensor([[True, False], [True, True]])
    with pytest.raises(PertokenError, match="1 to 2"):
        select.indices(kept)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, f: select.top_k(s, 0), "budget must be 1"),
        (lambda s, f: select.top_k(s[0], 1), r"\[batch, time\]"),
        (lambda s, f: select.top_k(s.log(), 1), "NaN"),
        (lambda s, f: select.top_p(-s, 0.5), "at least 0"),
        (lambda s, f: select.top_p(s, 0.0), "above 0"),
        (lambda s, f: select.budget_of(3, 1.5), "at most 1"),
        (lambda s, f: select.mmr(s, f[:, :2], 1), "features must be"),
        (lambda s, f: select.mmr(s, f * math.nan, 1), "NaN or infinite"),
        (lambda s, f: select.mmr(s, f, 1, weight=2), "0 to 1"),
        (lambda s, f: select.threshold(s, 0.1, s[:, :2] > 0), "do not fit"),
    ],
)
def test_mistakes_are_named(call, words):
    scores, features, _ = draw(0)
    scores[0, 0] = -1.0 if words == "NaN" else 0.5
    with pytest.raises(PertokenError, match=words):
        call(scores, features)


def test_a_nan_that_is_no_candidate_is_not_read():
    scores = torch.tensor([[math.nan, 1.0, 2.0]])
    assert select.top_k(scores, 1, ~scores.isnan()).int().tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("share", [0.05, 0.55, 0.6, 1.0])
def test_a_share_is_rounded_up_for_each_row(share):
    scores = torch.rand(6, 20, generator=torch.Generator().manual_seed(0))
    candidates = torch.arange(20) < torch.tensor([[20], [3], [0], [1], [10], [7]])
    kept = select.top_share(scores, share, candidates)
    for row in range(6):
        n = int(candidates[row].sum())
        wanted = math.ceil(round(share * n, 9))
        order = scores[row, :n].argsort(descending=True)[:wanted]
        assert sorted(order.tolist()) == kept[row].nonzero()[:, 0].tolist()
    with pytest.raises(PertokenError, match="the share to keep must be above 0"):
        select.top_share(scores, 0.0)

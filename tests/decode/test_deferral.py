"""Scores and curves of deferral, against brute force over every order of ties."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from pertoken.decode import _learned
from pertoken.decode._learned import DECAYS, Learned, _logistic, fit
from pertoken.decode.deferral import (
    _areas,
    chow_average,
    chow_quantile,
    chow_sum,
    deferral_area,
    deferral_curves,
    deferral_quality,
    quantiles,
    rank_correlation,
)
from pertoken.errors import PertokenError

QUESTIONS = st.lists(
    st.tuples(
        st.integers(0, 2).map(float), st.sampled_from([0.0, 0.25, 1.0]), st.floats(0, 1, width=16)
    ),
    min_size=1,
    max_size=5,
)


def brute_force(questions: list[tuple[float, float, float]]) -> np.ndarray:
    """Mean quality with the k least sure deferred, k = 0 … n, averaged over the orders of ties."""
    found = []
    for order in permutations(questions):
        scores = [score for score, _, _ in order]
        if scores == sorted(scores):
            values = [
                [large if place < k else small for place, (_, small, large) in enumerate(order)]
                for k in range(len(order) + 1)
            ]
            found.append(np.mean(values, axis=1))
    return np.mean(found, axis=0)


@settings(max_examples=60, deadline=None)
@given(QUESTIONS)
def test_curve_and_area_are_the_mean_over_all_orders_of_ties(
    questions: list[tuple[float, float, float]],
) -> None:
    scores, small, large = map(list, zip(*questions, strict=True))
    expected = brute_force(questions)
    rates = np.linspace(0, 1, len(questions) + 1)
    assert deferral_quality(scores, small, large, rates) == pytest.approx(expected)
    assert deferral_area(scores, small, large) == pytest.approx(np.trapezoid(expected, rates))


def test_a_bootstrap_draw_is_the_area_of_the_questions_it_took() -> None:
    rng = np.random.default_rng(0)
    scores, small, large = rng.integers(0, 4, 12).tolist(), rng.random(12), rng.random(12)
    picks = rng.integers(0, 12, (5, 12)).astype(float)
    for row, area in zip(picks.astype(int), _areas(picks, scores, small, large), strict=True):
        taken = [np.asarray(column)[row].tolist() for column in (scores, small, large)]
        assert area == pytest.approx(deferral_area(*taken))


def test_the_scores_are_those_of_the_paper() -> None:
    logprobs = [-3.0, -0.5, -0.25, -1.0]
    assert chow_sum(logprobs) == -4.75
    assert chow_average(logprobs) == pytest.approx(-4.75 / 4)
    assert chow_quantile(logprobs, 0.0) == -3.0
    assert chow_quantile(logprobs, 1.0) == -0.25
    assert chow_quantile(logprobs, 0.3) == pytest.approx(np.quantile(logprobs, 0.3))
    assert quantiles(logprobs).tolist() == pytest.approx(
        [chow_quantile(logprobs, place / 10) for place in range(11)]
    )


def test_an_answer_without_tokens_is_as_unsure_as_can_be() -> None:
    for score in (chow_sum, chow_average, lambda each: chow_quantile(each, 0.5)):
        assert score([]) == score([-float("inf")]) == -100


def test_random_and_oracle_are_the_ends_of_the_scale() -> None:
    rng = np.random.default_rng(1)
    small, large = rng.integers(0, 2, 40).astype(float), rng.integers(0, 2, 40).astype(float)
    scores = {"mine": rng.random(40).tolist()}
    found = deferral_curves(scores, small, large, lengths=list(range(40)), overhead={"mine": 0.25})
    assert found.area("random") == pytest.approx((small.mean() + large.mean()) / 2)
    assert found.area("random") < found.area("oracle")
    assert found.areas["random"][1][0] < found.area("random") < found.areas["random"][1][1]
    # Work of a quarter of an answer is paid before the first one is deferred.
    grid = np.linspace(0, 0.75, 2000)
    paid = np.trapezoid(deferral_quality(scores["mine"], small, large, grid), grid)
    assert found.charged("mine") == pytest.approx(0.25 * small.mean() + paid, abs=2e-3)
    assert found.charged("oracle") == found.area("oracle")
    assert "mine" in found.table()
    assert [each.name.split()[0] for each in found.plot().data] == ["mine", "random", "oracle"]
    assert {row["rule"] for row in found.rows()} == {"mine", "random", "oracle"}


def test_the_page_draws_a_line_per_rule() -> None:
    found = deferral_curves({"<mine>": [3, 1, 2]}, [1, 0, 0], [1, 1, 1])
    page = found.to_html()
    assert page.count("<polyline") == len(found.curves) == 3
    assert page.count("<circle") == 3 * len(found.rates)
    assert '<span class="key of0">&lt;mine&gt;</span>' in page
    assert "<mine>" not in page


def test_length_bias_is_the_rank_correlation_with_the_tokens() -> None:
    lengths, scores = [3, 1, 4, 1, 5], [0.5, 0.1, 0.4, 0.4, 0.2]
    assert rank_correlation(lengths, scores) == pytest.approx(spearmanr(lengths, scores)[0])
    assert rank_correlation([1, 1], [2, 3]) == 0
    found = deferral_curves({"mine": [-n for n in lengths]}, [0] * 5, [1] * 5, lengths=lengths)
    assert found.length_bias["mine"] == pytest.approx(1)
    assert rankdata(lengths).tolist() == [3, 1.5, 4, 1.5, 5]


def test_a_curve_needs_finite_numbers_for_every_question() -> None:
    for scores in ([1.0], [1.0, float("nan")]):
        with pytest.raises(PertokenError, match="mine: a deferral curve takes one finite number"):
            deferral_curves({"mine": scores}, [0, 1], [1, 1])
    with pytest.raises(PertokenError, match="at least one"):
        deferral_curves({}, [], [])


def test_the_logistic_rule_is_the_minimum_with_more_features_than_items() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 30, dtype=torch.float64, generator=generator)
    targets = torch.tensor([0.0, 0.5, 1.0] * 4, dtype=torch.float64)
    for decay, [(weight, bias)] in zip(DECAYS, _logistic(inputs, targets), strict=True):
        weight, bias = weight.requires_grad_(), bias.requires_grad_()
        score = (inputs @ weight.T + bias)[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(score, targets)
        (loss + decay / 2 * weight.square().sum()).backward()
        for part in (weight, bias):
            assert part.grad is not None
            assert float(part.grad.abs().max()) < 1e-8


@pytest.mark.parametrize("net", ["logistic", "mlp"])
def test_a_learned_rule_finds_the_order_of_the_gains(
    net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_learned, "STEPS", (10, 25))  # enough here
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 3, dtype=torch.float64, generator=generator)
    features[:, 2] = 7.0  # says nothing, and has no spread to divide by
    chance = torch.sigmoid(2 * features[:, 0])
    gains = torch.bernoulli(chance, generator=generator) - torch.bernoulli(
        1 - chance, generator=generator
    )
    before = torch.random.get_rng_state()
    rule, apart = fit(features, gains, net, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert rank_correlation(apart.tolist(), features[:, 0].tolist()) > 0.9
    again = Learned.from_list(rule.to_list())
    assert torch.equal(again(features), rule(features))
    other = features.clone()
    other[:, 2] = -50.0
    assert torch.equal(rule(other), rule(features))

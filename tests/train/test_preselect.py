"""Predictive strength, its labels, what is kept, and the pipeline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, tiny_model
from pertoken.train import (
    bits_per_character,
    label_extremes,
    predictive_strength,
    preselect,
    select,
)


def test_strength_is_one_in_order_none_reversed_and_half_at_random() -> None:
    ability = [5.0, 4.0, 3.0, 2.0, 1.0]
    rising = np.arange(5.0)[:, None]
    assert predictive_strength(rising, ability).tolist() == [1.0]
    assert predictive_strength(-rising, ability).tolist() == [0.0]
    drawn = np.random.default_rng(0).normal(size=(5, 4000))
    strength = predictive_strength(drawn, ability)
    assert abs(strength.mean() - 0.5) < 4 * strength.std() / math.sqrt(4000)


def test_strength_is_kendalls_tau_and_spearmans_rho() -> None:
    draw = np.random.default_rng(1)
    ability = draw.permutation(6).astype(float)
    losses = draw.normal(size=(6, 50))
    tau = [stats.kendalltau(ability, -own).statistic for own in losses.T]
    np.testing.assert_allclose(predictive_strength(losses, ability), (np.array(tau) + 1) / 2)
    tied = losses.round(0)
    tied[:2] += [[0.5], [1.0]]  # no document has all losses alike
    rho = [stats.spearmanr(ability, -own).statistic for own in tied.T]
    np.testing.assert_allclose(predictive_strength(tied, ability, method="spearman"), rho)


def test_scale_and_length_of_a_document_do_not_matter() -> None:
    draw = np.random.default_rng(2)
    losses, scale = draw.uniform(1, 2, (4, 30)), draw.uniform(0.1, 9, 30)
    ability = [1.0, 2.0, 3.0, 4.0]
    same = predictive_strength(losses * scale, ability)
    assert (same == predictive_strength(losses, ability)).all()


def test_near_ties_of_ability_do_not_count() -> None:
    losses = [[1.0], [2.0], [1.5]]  # the second model is worse than the third
    assert predictive_strength(losses, [0.9, 0.52, 0.5]).tolist() == [pytest.approx(2 / 3)]
    assert predictive_strength(losses, [0.9, 0.52, 0.5], margin=0.05).tolist() == [1.0]
    assert predictive_strength([[1.0], [1.0]], [2.0, 1.0]).tolist() == [0.0]  # equal is not lower


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.2, 0.4, 1.0]), min_size=2, max_size=20))
def test_labels_are_the_perfect_and_as_many_of_the_worst(strength: list[float]) -> None:
    values = np.array(strength)
    perfect = values == 1
    if perfect.all() or not perfect.any():
        with pytest.raises(PertokenError, match=r"orders? (all|the) models rightly"):
            label_extremes(values)
        return
    labels = label_extremes(values)
    assert ((labels == 1) == perfect).all()
    assert (labels == 0).sum() == min(perfect.sum(), (~perfect).sum())
    left = values[labels == -1]
    assert not left.size or values[labels == 0].max() <= left.min()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1), st.floats(0.01, 1.0))
def test_selection_keeps_the_share_up_to_one_document(
    pool: list[tuple[int, int]], keep: float
) -> None:
    texts, scores = ["x" * size for size, _ in pool], [score / 4 for _, score in pool]
    total = sum(map(len, texts))
    if not total:
        with pytest.raises(PertokenError, match="no document has a character"):
            select(texts, scores, keep)
        return
    kept = select(texts, scores, keep)
    sizes = np.array([len(text) for text in texts])
    assert sizes[kept].sum() >= keep * total - 1e-9
    least = min(np.array(scores)[kept])
    last = max(n for n in np.flatnonzero(kept) if scores[n] == least)
    assert sizes[kept].sum() - sizes[last] < keep * total
    assert all(scores[n] <= least for n in np.flatnonzero(~kept))


def test_bits_are_those_of_one_pass_where_the_document_fits() -> None:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).double()
    text = "ça va, and you?"
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text)]])
    with torch.no_grad():
        chances = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    nats = -float(chances.gather(-1, ids[0, 1:, None]).sum())
    [bits] = bits_per_character(model, tokenizer, [text])
    assert bits == pytest.approx(nats / math.log(2) / len(text), abs=1e-9)
    [strided] = bits_per_character(model, tokenizer, [text], block=8, stride=2)
    assert strided != pytest.approx(bits, abs=1e-6)  # short blocks have less in front
    [whole] = bits_per_character(model, tokenizer, [text], block=40, stride=2)
    assert whole == pytest.approx(bits, abs=1e-9)
    model.config.max_position_embeddings = 9  # one for the token in front
    [small] = bits_per_character(model, tokenizer, [text])
    assert small == pytest.approx(strided, abs=1e-9)  # 8 * 512 // 1900 = 2


def narrow(model: Any, marks: str, by: float) -> Any:
    """The model made to expect bytes of `marks` more than others, wherever it is."""
    tokenizer = ByteTokenizer()
    with torch.no_grad():
        for token in {token for mark in marks for token in tokenizer.encode(mark)}:
            model.lm_head.bias[token] += by
    return model


@pytest.fixture(scope="module")
def models() -> list[tuple[Any, Any]]:
    """Three models that like digits more and more, and letters all alike."""
    tokenizer = ByteTokenizer()
    found = []
    for by in (0.0, 1.0, 2.0):
        model = tiny_model("llama", vocab_size=len(tokenizer), scale=0.0)
        head = torch.nn.Linear(model.config.hidden_size, len(tokenizer))
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        model.lm_head = head.to(model.dtype)
        found.append((narrow(model, "0123456789", by), tokenizer))
    return found


def test_the_pipeline_finds_what_the_able_models_are_better_at(
    models: list[tuple[Any, Any]], tmp_path: Path
) -> None:
    sums = [f"{n} {n + 3} {2 * n + 3}" for n in range(20)]
    words = [f"so it goes on, {'again and ' * (n % 4)}again" for n in range(20)]  # 4 of them
    found = preselect(models, [0.1, 0.5, 0.9], sums + words, epochs=20, folder=tmp_path)
    assert found.strength[:20].tolist() == [1.0] * 20
    assert found.labels.tolist() == [1] * 20 + [0] * 20
    scores = found.scorer.score(["1 2 3", "and again, so it goes"])
    assert scores[0] > scores[1]
    assert [row["documents"] for row in found.rows()] == [20, 20]
    assert "speaks for" in found.table()
    assert found.to_html().startswith("<!DOCTYPE html>")
    assert sum(1 for one in tmp_path.glob("*.jsonl") for _ in one.open()) == 3 * 24

    line = next(tmp_path.glob("*.jsonl")).read_bytes()[:-3]  # as a kill may leave it
    next(tmp_path.glob("*.jsonl")).write_bytes(line)
    again = preselect(models, [0.1, 0.5, 0.9], sums + words, epochs=20, folder=tmp_path)
    assert (again.losses == found.losses).all()


def test_an_order_without_meaning_is_refused(models: list[tuple[Any, Any]]) -> None:
    with pytest.raises(PertokenError, match="one model has no order"):
        preselect(models[:1], [1.0], ["a"])
    with pytest.raises(PertokenError, match="no two of the 3 models differ in ability"):
        preselect(models, [1.0, 1.0, 1.0], ["a"])
    with pytest.raises(PertokenError, match="3 models and 2 abilities"):
        preselect(models, [1.0, 2.0], ["a"])
    with pytest.raises(PertokenError, match="document 1 is empty"):
        preselect(models, [1.0, 2.0, 3.0], ["a", " "])
    with pytest.raises(PertokenError, match="the loss of model 1 on document 0 is no number"):
        predictive_strength([[1.0], [math.nan]], [1.0, 2.0])
    with pytest.raises(PertokenError, match="ability 1 is no number"):
        predictive_strength([[1.0], [2.0]], [1.0, math.nan])
    with pytest.raises(PertokenError, match="the score of document 1 is no number"):
        select(["a", "b"], [0.1, math.nan], 0.5)
    with pytest.raises(PertokenError, match="at most 1, got 0"):
        select(["a"], [0.1], 0)

"""The classifier of documents: its features, its steps, and what it writes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.errors import PertokenError
from pertoken.train import NgramScorer, ngram_scorer

WEIGHTS = np.random.default_rng(0).normal(size=ngram_scorer.PLACES).astype(np.float32)
TEXTS = st.lists(st.text(alphabet="ab \n\té€", max_size=30), min_size=1, max_size=6)


def bag(text: str) -> list[str]:
    """Features of one text, by the definition: words, the end, and pairs of neighbours."""
    blanks = dict.fromkeys(map(ord, "\n\t\v\f\r\0"), " ")
    words = [word for word in text.translate(blanks).split(" ") if word] + ["\n"]
    return words + [f"{one} {two}" for one, two in itertools.pairwise(words)]


def place(feature: str) -> int:
    """A feature's place of the table, one at a time."""
    hashes = []
    for word in feature.split(" "):
        raw = [
            (byte + 1) * pow(0x100000001B3, at, 1 << 64) for at, byte in enumerate(word.encode())
        ]
        hashes.append(sum(raw) % (1 << 64))
    mixed = hashes[0]
    if len(hashes) == 2:
        mixed = (hashes[0] * 0x9E3779B97F4A7C15 + hashes[1]) % (1 << 64)
    mixed = (mixed ^ (mixed >> 32)) * 0x9E3779B97F4A7C15 % (1 << 64)
    return mixed >> 43


@settings(max_examples=25, deadline=None)
@given(TEXTS)
def test_scores_are_means_over_words_and_pairs(texts: list[str]) -> None:
    weights = WEIGHTS
    found = NgramScorer(weights, ([], [])).score(texts)
    for text, score in zip(texts, found, strict=True):
        odds = np.mean([weights[place(feature)] for feature in bag(text)])
        assert score == pytest.approx(1 / (1 + math.exp(-odds)), rel=1e-5)


def test_scores_do_not_depend_on_the_company(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(1).normal(size=ngram_scorer.PLACES).astype(np.float32)
    scorer = NgramScorer(weights, ([], []))
    texts = ["one two  three", "", "x" * 3000, "a\nb", "€ é"] * 3
    alone = [float(scorer.score([text])[0]) for text in texts]
    monkeypatch.setattr(ngram_scorer, "AT_ONCE", 40)
    assert scorer.score(texts).tolist() == pytest.approx(alone, rel=1e-6)


def test_training_takes_the_steps_of_a_softmax_over_two_vectors() -> None:
    """Against fastText's form written out: two output vectors, mean of the inputs, falling rate."""
    texts, labels = ["a b", "b c c", "c", "a d"], [1, 0, 0, 1]
    scorer = NgramScorer.fit(texts, labels, epochs=2, learning_rate=0.5, dim=3, seed=4)
    features = sorted({place(one) for text in texts for one in bag(text)})
    draw = np.random.default_rng(4)
    vectors = draw.uniform(-1 / 3, 1 / 3, (len(features), 3))
    outputs = np.zeros((2, 3))
    total = 2 * sum(len(bag(text)) for text in texts)
    done = 0
    for _ in range(2):
        for n in draw.permutation(4):
            own = [features.index(place(one)) for one in bag(texts[n])]
            hidden = vectors[own].mean(0)
            chances = np.exp(outputs @ hidden) / np.exp(outputs @ hidden).sum()
            step = 0.5 * (1 - done / total) * (np.eye(2)[labels[n]] - chances)
            gradient = step @ outputs / len(own)
            outputs += np.outer(step, hidden)
            for one in own:
                vectors[one] += gradient
            done += len(own)
    wanted = vectors @ (outputs[1] - outputs[0])
    np.testing.assert_allclose(scorer.weights[features], wanted, atol=1e-6)
    assert np.count_nonzero(scorer.weights) == len(features)


def test_a_scorer_tells_what_it_learned_apart_and_survives_saving(tmp_path: Path) -> None:
    texts = [f"the sum of {n} and {n + 1} is {2 * n + 1}" for n in range(40)]
    others = [f"the sea has {n} waves and no end" for n in range(40)]
    scorer = NgramScorer.fit(texts + others, [1] * 40 + [0] * 40, epochs=30)
    one, two = scorer.score(["the sum of 90 and 9", "no waves and the sea"])
    assert one > 0.5
    assert two < 0.5
    for_it, against = scorer.top_features(6)
    assert {"sum", "sum of", "is"} & {name for name, _ in for_it}
    assert {"sea", "no end", "waves"} & {name for name, _ in against}
    assert all(a >= b > 0 for (_, a), (_, b) in itertools.pairwise(for_it))
    scorer.save(tmp_path / "scorer")
    again = NgramScorer.load(tmp_path / "scorer")
    assert again.sha256 == scorer.sha256
    assert again.features == scorer.features
    assert repr(again) == repr(scorer)


def test_what_is_no_scorer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PertokenError, match="there is no file"):
        NgramScorer.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello, this is not one")
    with pytest.raises(PertokenError, match="no scorer of documents"):
        NgramScorer.load(tmp_path / "text")
    with pytest.raises(PertokenError, match="all 2 texts have the same label"):
        NgramScorer.fit(["a", "b"], [1, 1])
    with pytest.raises(PertokenError, match="a document is int, not text"):
        NgramScorer.fit(["a", 3], [1, 0])  # type: ignore[list-item]
    with pytest.raises(PertokenError, match="labels must be 1 and 0"):
        NgramScorer.fit(["a", "b"], [1, -1])

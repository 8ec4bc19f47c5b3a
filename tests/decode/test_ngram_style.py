"""The n-gram style prior: the dense formula by brute force, identity at 0, files, refusals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pertoken.decode.ngram_style import NGramStyle
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, tiny_model
from pertoken.testing.text_laws import tiny_tokenizer

WEIGHTS = (0.1, 0.3, 0.6)
CORPUS = ["to be or not to be", "o", "be the bee", "nobody"]
VOCAB = 258
SMOOTHINGS = ("add-k", "jelinek-mercer")


def style(**settings: Any) -> NGramStyle:
    return NGramStyle.train(CORPUS, ByteTokenizer(), **settings)


def ids_of(text: str) -> list[int]:
    return ByteTokenizer().encode(text)


class Brute:
    """The dense distributions, counted in Python dicts."""

    def __init__(self, smoothing: str, k: float = 0.01, gamma: float = 0.3) -> None:
        self.smoothing, self.k, self.gamma = smoothing, k, gamma
        self.counts: Counter[tuple[int, ...]] = Counter()
        self.contexts: Counter[tuple[int, ...]] = Counter()
        for text in CORPUS:
            ids = ids_of(text)
            for order in (1, 2, 3):
                for start in range(len(ids) - order + 1):
                    gram = tuple(ids[start : start + order])
                    self.counts[gram] += 1
                    self.contexts[gram[:-1]] += 1

    def seen(self, order: int, ids: Sequence[int]) -> bool:
        return len(ids) >= order - 1 and self.context(order, ids) in self.contexts

    def context(self, order: int, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(ids[len(ids) - order + 1 :]) if order > 1 else ()

    def chance(self, order: int, ids: Sequence[int], token: int) -> float:
        context = self.context(order, ids)
        count, total = self.counts[(*context, token)], self.contexts[context]
        if self.smoothing == "add-k":
            return (count + self.k) / (total + self.k * VOCAB)
        lower = self.chance(order - 1, ids, token) if order > 1 else 1 / VOCAB
        return (1 - self.gamma) * count / total + self.gamma * lower

    def orders(self, ids: Sequence[int]) -> list[int]:
        return [order for order in (1, 2, 3) if self.seen(order, ids)]

    def bias(self, ids: Sequence[int]) -> torch.Tensor:
        """Σ w_n log p_n over the matching orders, [vocab]."""
        orders = self.orders(ids)
        whole = sum(WEIGHTS[order - 1] for order in orders)
        return torch.tensor(
            [
                sum(WEIGHTS[n - 1] / whole * math.log(self.chance(n, ids, token)) for n in orders)
                for token in range(VOCAB)
            ],
            dtype=torch.float64,
        )

    def log_prob(self, ids: Sequence[int], token: int) -> float:
        orders = self.orders(ids)
        if self.smoothing != "add-k":
            return math.log(self.chance(orders[-1], ids, token))
        whole = sum(WEIGHTS[n - 1] for n in orders)
        return math.log(sum(WEIGHTS[n - 1] / whole * self.chance(n, ids, token) for n in orders))


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("text", ["", "b", "to", "nobody knows be", "zb", "zz", "to b", "yo", "y"])
def test_the_sparse_sum_is_the_dense_formula(smoothing: str, text: str) -> None:
    made, brute = style(smoothing=smoothing), Brute(smoothing)
    ids = ids_of(text)
    scores = torch.randn(1, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores[0, 7] = -torch.inf
    found = made(strength=0.4)(torch.tensor([ids], dtype=torch.long), scores)
    dense = scores + 0.4 * brute.bias(ids)
    gap = found.log_softmax(-1) - dense.log_softmax(-1)
    assert float(gap.nan_to_num().abs().max()) < 1e-12
    assert found[0, 7] == -torch.inf


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_chances_sum_to_one_and_are_the_mixture_of_the_orders(smoothing: str) -> None:
    made, brute = style(smoothing=smoothing), Brute(smoothing)
    ids = ids_of("to bet nobody, be")
    found = made.log_probs(ids)
    for place, token in enumerate(ids):
        assert found[place] == pytest.approx(brute.log_prob(ids[:place], token), abs=1e-12)
    assert made.perplexity(ids) == pytest.approx(math.exp(-found.mean()))
    for start in ("be", "zz", ""):
        law = [made.log_probs([*ids_of(start), token])[-1] for token in range(VOCAB)]
        assert np.exp(law).sum() == pytest.approx(1)


def test_no_ngram_reaches_from_one_text_into_the_next() -> None:
    joined = NGramStyle.train("ab", ByteTokenizer())
    apart = NGramStyle.train(["a", "b"], ByteTokenizer())
    found = joined.corpus.tables[1].behind(ids_of("a"))
    assert found is not None
    assert (found[0].tolist(), found[1].tolist(), found[2]) == (ids_of("b"), [1], 1)
    assert apart.corpus.tables[1].behind(ids_of("a")) is None


def test_strength_0_is_bit_identical_and_1_is_not() -> None:
    model, made = tiny_model("llama", vocab_size=VOCAB), style()
    ids = torch.tensor([ids_of("to be")])
    scores = torch.randn(1, VOCAB)
    assert torch.equal(made(strength=0)(ids, scores), scores)
    run: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "top_k": 0}
    texts = []
    for processors in ([], [made(strength=0)], [made(strength=1.0)]):
        torch.manual_seed(0)
        mask = torch.ones_like(ids)
        texts.append(model.generate(ids, attention_mask=mask, logits_processor=processors, **run))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_by_the_gap_no_token_gains_more_than_the_strength() -> None:
    ids = torch.tensor([ids_of("to b")])
    for strength in (0.25, 1.0):
        found = style()(strength=strength, normalize="gap")(ids, torch.zeros(1, VOCAB))
        assert float(found.max()) == pytest.approx(strength)
        assert int(found.argmax()) == ids_of("e")[0]
        assert float(found.min()) == 0


def test_a_model_may_have_more_rows_than_the_tokenizer_has_tokens() -> None:
    made, ids = style(), torch.tensor([[999, *ids_of("e")], ids_of("be")])
    found = made(strength=1.0)(ids, torch.zeros(2, VOCAB + 6))
    assert float(found[:, VOCAB:].abs().max()) == 0
    assert torch.equal(found[0], made(strength=1.0)(ids[:1, 1:], torch.zeros(1, VOCAB + 6))[0])
    with pytest.raises(PertokenError, match=r"258 tokens of ByteTokenizer, the model has 64"):
        made()(ids, torch.zeros(2, 64))


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_a_saved_style_comes_back_whole(tmp_path: Path, smoothing: str) -> None:
    made = style(smoothing=smoothing, weights=(0.5, 0.5), k=0.1, gamma=0.2)
    made.save(tmp_path / "bard.style")
    back = NGramStyle.load(tmp_path / "bard.style", ByteTokenizer())
    ids = ids_of("to be")
    like = torch.zeros(1, dtype=torch.float64)
    assert torch.equal(back.prior(ids, like), made.prior(ids, like))
    assert repr(back) == repr(made)
    assert (back.corpus.texts, back.corpus.tokens) == (4, 35)
    tiny_tokenizer()(["a", "bb"], padding=True)  # padding is no part of a tokenizer's identity
    line = refused(NGramStyle.load, tmp_path / "bard.style", tiny_tokenizer())
    assert "counts tokens of ByteTokenizer" in line
    assert "train the style again" in line


def test_a_broken_file_is_one_line_and_a_bad_place_leaves_what_was_there(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "bard.style"
    assert "there is no style file" in refused(NGramStyle.load, path, ByteTokenizer())
    path.write_bytes(b"no style")
    assert "or damaged" in refused(NGramStyle.load, path, ByteTokenizer())
    style().save(path)
    path.write_bytes(path.read_bytes()[:-9])
    assert "or damaged" in refused(NGramStyle.load, path, ByteTokenizer())
    save_file({"keys1": np.ones(1, dtype=np.int64)}, path)
    assert "is no style file: `pertoken style train`" in refused(
        NGramStyle.load, path, ByteTokenizer()
    )
    assert "there is no folder" in refused(style().save, tmp_path / "no" / "bard.style")


@pytest.mark.parametrize("corpus", ["", [], ["", ""]])
def test_an_empty_corpus_is_refused(corpus: Any) -> None:
    assert "the corpus is empty" in refused(NGramStyle.train, corpus, ByteTokenizer())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": ()}, "weights are 1 to 3 numbers"),
        ({"weights": (0.1, 0.0)}, "above 0"),
        ({"smoothing": "addk"}, "did you mean 'add-k'"),
        ({"k": 0}, "k must be above 0"),
        ({"gamma": 1.0}, "gamma must lie between"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], words: str) -> None:
    assert words in refused(style, **settings)


def test_a_strength_outside_0_to_1_is_refused() -> None:
    for strength in (-0.1, 1.5, math.nan):
        assert "strength must be between 0 and 1" in refused(style(), strength=strength)
    assert "None or 'gap'" in refused(style(), normalize="max")
    assert "is a int" in refused(NGramStyle.train, [3], ByteTokenizer())


def refused(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(PertokenError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)

"""The figures of a style's sweep, against what they are by definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pertoken.decode.ngram_style import NGramStyle
from pertoken.decode.style_figures import jensen_shannon, read_text, style_sweep
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, tiny_model

CORPUS = ["to be or not to be, that is the question", "whether 'tis nobler"]


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, NGramStyle]:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    return model, tokenizer, NGramStyle.train(CORPUS, tokenizer)


def test_divergence_is_that_of_the_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 50, dtype=torch.float64, generator=draw).softmax(-1)
    one[3] = 0
    one /= one.sum()
    middle = (one + other) / 2
    kl = [float((p * (p / middle).log()).nansum()) for p in (one, other)]
    assert jensen_shannon(one.log(), other.log()) == pytest.approx(sum(kl) / 2, abs=1e-12)


def test_a_text_is_read_as_the_model_and_the_ngrams_say(made: Any) -> None:
    model, tokenizer, style = made
    prompt, new = tokenizer.encode("to b"), tokenizer.encode("e or")
    found = read_text(model, style(strength=0.5), prompt, new)
    ids = torch.tensor([prompt + new])
    with torch.no_grad():
        laws = model(ids).logits[0].log_softmax(-1)
    loss = -sum(float(laws[len(prompt) + n - 1, one]) for n, one in enumerate(new))
    assert found.base_loss == pytest.approx(loss, rel=1e-5)
    assert found.style_loss == pytest.approx(-style.log_probs(prompt + new)[len(prompt) :].sum())
    first = laws[len(prompt) - 1]
    steered = (first + 0.5 * style.prior(prompt, first)).log_softmax(-1)
    assert found.divergence[0] == pytest.approx(jensen_shannon(first, steered), abs=1e-6)
    assert len(found.divergence) == len(new)


def test_a_sweep_has_a_row_per_strength_and_shows_itself(made: Any) -> None:
    seen: list[Any] = []
    before = torch.get_rng_state()
    run: dict[str, Any] = {"strengths": (0, 1.0), "max_new_tokens": 8}
    found = style_sweep(*made, ["to be", "or"], progress=lambda *at: seen.append(at), **run)
    assert torch.equal(torch.get_rng_state(), before)
    assert seen == [("strength 0", 0, 2), ("strength 1", 1, 2)]
    frozen, steered = found.found
    assert frozen.divergence < 1e-12 < 1e-3 < steered.divergence < math.log(2)
    assert steered.style_perplexity < frozen.style_perplexity
    assert frozen.overlap < steered.overlap <= 1
    assert (frozen.tokens, steered.tokens) == (16, 16)
    assert style_sweep(*made, ["to be", "or"], **run).found == found.found
    assert [row["strength"] for row in found.rows()] == [0.0, 1.0]
    assert "style PPL" in found.table()
    assert found.to_dict()["samples"][1]["text"] == found.samples[1.0]
    page = found.to_html()
    assert page.count("<svg") == 6
    assert "<script" not in page
    assert len(found.plot().data) == 2


def test_an_empty_sweep_is_refused(made: Any) -> None:
    for prompts, strengths in (([], (0.1,)), (["a"], ())):
        with pytest.raises(PertokenError, match="a sweep needs a prompt and a strength"):
            style_sweep(*made, prompts, strengths=strengths)
    with pytest.raises(PertokenError, match="the prompt is empty"):
        style_sweep(*made, [" "], strengths=(0.1,))


def test_distributions_of_a_collapsed_text_stay_finite(made: Any) -> None:
    _, tokenizer, style = made
    assert np.isfinite(style.log_probs(tokenizer.encode("zzzzzz"))).all()

"""Sinks: attention against eager weights, planted outliers found, the bound, bad input."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from pertoken.errors import PertokenError
from pertoken.probe import Sinks, clip_dims, find_sinks, rescale_dims, sinks
from pertoken.probe._anatomy import anatomy
from pertoken.testing import ARCHITECTURES, EXTRA_ARCHITECTURES, ByteTokenizer, tiny_model

ALL = [*ARCHITECTURES, *EXTRA_ARCHITECTURES]
TOKENIZER = ByteTokenizer()
TEXTS = ["The cat sat on the mat.", "It slept until noon"]


def model_of(name: str, **options: Any) -> Any:
    return tiny_model(name, vocab_size=len(TOKENIZER), **options)


@pytest.mark.parametrize("name", ALL)
def test_attention_and_averages_are_those_of_eager_forwards(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "_WEIGHTS", 250)  # a few queries at a time; windows hold 8 tokens
    found = find_sinks(model_of(name), TOKENIZER, TEXTS)
    eager = model_of(name, attention="eager")
    last: list[torch.Tensor] = []
    anatomy(eager).blocks[-1].register_forward_hook(lambda _, __, out: last.append(out))
    first, other, sizes = [], [], []
    for text in TEXTS:
        ids = torch.tensor([TOKENIZER(text)["input_ids"]])
        with torch.no_grad():
            out = eager(ids, output_attentions=True, output_hidden_states=True)
        mass = torch.stack(out.attentions)[:, 0, :, 1:].double().mean(2)
        first.append(mass[..., 0])
        other.append(mass[..., 1:].amax(-1))
        sizes.append(torch.stack([*out.hidden_states[:-1], last[-1]])[:, 0].double().abs())
    for mine, wanted in ((found.first, first), (found.elsewhere, other)):
        torch.testing.assert_close(
            torch.tensor(mine).double(), torch.stack(wanted).mean(0), rtol=0, atol=1e-5
        )
    average = torch.cat(sizes, 1).mean((0, 1))
    best = average.topk(8)
    assert [each.dim for each in found.ranked[:8]] == best.indices.tolist()
    wanted = best.values.tolist()
    assert [each.average for each in found.ranked[:8]] == pytest.approx(wanted, rel=1e-5)
    peaks = [max(float(size[place].max()) for size in sizes) for place in range(3)]
    assert [each.peak for each in found.layers] == pytest.approx(peaks, rel=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_planted_outlier_is_found_and_the_bound_holds(name: str) -> None:
    model = model_of(name)
    model.get_input_embeddings().weight.data[:, 5] = 100.0
    norms = anatomy(model).norms
    for norm in norms:
        norm.weight.data[5] = 0.001 - (1.0 if "Gemma" in type(norm).__name__ else 0.0)
    found = find_sinks(model, TOKENIZER, TEXTS)
    assert found.dims == [5]
    assert found.bound_holds
    assert found.ranked[0].weight == pytest.approx(0.001, abs=1e-5)
    assert found.ranked[0].far > 0.5
    for each in found.norms:
        assert each.epsilon == pytest.approx(0.001, abs=1e-5)
        assert each.share > 0.9  # nearly all of the length, nearly nothing of what comes out
        assert each.part < 0.2
        assert each.tightest is not None
        assert 0.05 < each.tightest <= 1 + 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_bound_is_checked_in_half_precision(name: str, dtype: torch.dtype) -> None:
    for seed in range(4):
        model = model_of(name, seed=seed).to(dtype)
        if seed:  # weights all alike: the bound is met, but for rounding
            for norm in anatomy(model).norms:
                norm.weight.data[:] = 0.9 - (1.0 if name == "gemma3" else 0.0)
        found = find_sinks(model, TOKENIZER, TEXTS)
        assert all(each.tightest is not None for each in found.norms)
        assert found.bound_holds is True


def test_a_wrong_bound_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the weight of the sinks themselves, ε, it is broken by weights that are equal."""
    model = model_of("llama")
    monkeypatch.setattr(sinks._NormSums, "epsilon", 0.0)
    model.get_input_embeddings().weight.data[:, 5] = 300.0
    assert not find_sinks(model, TOKENIZER, TEXTS).bound_holds


def test_values_of_the_first_token_and_what_takes_most() -> None:
    """A first token whose key every query looks at, with short values."""
    model = model_of("llama", layers=1)
    attention = model.model.layers[0].self_attn
    ids = torch.tensor([TOKENIZER("xab")["input_ids"]])
    values: list[torch.Tensor] = []
    handle = attention.v_proj.register_forward_hook(lambda _, __, out: values.append(out[0]))
    found = find_sinks(model, TOKENIZER, ["xab"])
    handle.remove()
    lengths = values[-1].unflatten(-1, (2, 8)).norm(dim=-1)  # 2 key heads of 8
    wanted = (lengths[0] / lengths[1:].mean(0)).mean()
    assert ids.shape == (1, 3)
    assert found.values == pytest.approx([float(wanted)])
    assert sum(each.share for each in found.takers) == pytest.approx(1.0)
    shares = {each.token: each.share for each in found.takers}
    assert shares["the first token"] == pytest.approx(sum(found.first[0]) / 4)


def test_the_result_is_read_in_every_way() -> None:
    model = model_of("llama")
    found = find_sinks(model, TOKENIZER, TEXTS, length=9)
    assert isinstance(found, Sinks)
    assert found.tokens == 18
    table = found.table()
    for title in ("Attention sinks of LlamaForCausalLM", "Massive", "Residual sinks", "Outliers"):
        assert title in table
    kinds = [row["what"] for row in found.rows()]
    assert kinds.count("head") == 8
    assert kinds.count("norm") == 5
    assert json.loads(found.to_json())["bound_holds"] is True
    page = found.to_html()
    assert page.count("<rect") == 8
    pytest.importorskip("plotly")
    assert found.plot().data


def test_it_sees_other_norms_too() -> None:
    from pertoken.nets import with_rescaling

    found = find_sinks(with_rescaling(model_of("llama"), "gated"), TOKENIZER, TEXTS)
    assert all(each.tightest is None for each in found.norms)
    assert found.bound_holds is None
    assert "was not checked" in found.table()
    assert "-" in found.table()
    exact = rescale_dims(with_rescaling(model_of("llama"), "tanh"), [1])
    with pytest.raises(PertokenError, match="neither RMSNorm nor"), exact:
        pass
    with clip_dims(with_rescaling(model_of("llama"), "tanh"), [1], 0.5):
        pass


def test_bad_input_is_one_line() -> None:
    model = model_of("llama")
    broken = model_of("llama")
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    late = model_of("llama")  # only some tokens are broken, none of those that are watched
    late.model.embed_tokens.weight.data[TOKENIZER("z")["input_ids"][-1]] = float("inf")
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=1)
    )
    encoder = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
        )
    )
    for subject, texts, words in (
        (mamba, TEXTS, "recurrent state"),
        (encoder, TEXTS, "BertModel is an encoder"),
        (object(), TEXTS, "needs a causal language model of transformers, got object"),
        (broken, TEXTS, "block 1 of LlamaForCausalLM gives NaN"),
        (late, ["a fez"], "block 0 of LlamaForCausalLM gives NaN"),
        (model, [], "no text"),
        (model, ["a cat", ""], "text 1 has 0 tokens"),
        (model, "x", "text 0 has 1 token"),
    ):
        with pytest.raises(PertokenError) as caught:
            find_sinks(subject, TOKENIZER, texts)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    for options in ({"times": 1.0}, {"length": 1}):
        with pytest.raises(PertokenError, match=next(iter(options))):
            find_sinks(model, TOKENIZER, TEXTS, **options)

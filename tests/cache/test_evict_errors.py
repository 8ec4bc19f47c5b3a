"""What evicting caches refuse: one line each, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from pertoken.cache import (
    H2OCache,
    KVDirectCache,
    SnapKVCache,
    StreamingLLMCache,
    TOVACache,
    WindowCache,
)
from pertoken.decode import Goose, Plain
from pertoken.errors import PertokenError
from pertoken.testing import tiny_model

ALL = [WindowCache, StreamingLLMCache, H2OCache, TOVACache, SnapKVCache]
SMALL: dict[str, Any] = {"hidden_size": 16, "vocab_size": 64}


def said(call: Callable[[], Any]) -> str:
    with pytest.raises(PertokenError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("budget", [0, -3, 2.5, True, None])
def test_a_budget_below_one_token(kind: Any, budget: Any) -> None:
    message = said(lambda: kind(tiny_model("llama"), budget))
    assert kind.__name__ in message
    assert repr(budget) in message


@pytest.mark.parametrize("sinks", [-1, 4, 5])
def test_sinks_that_leave_no_room(sinks: int) -> None:
    assert str(sinks) in said(lambda: StreamingLLMCache(tiny_model("llama"), 4, sinks=sinks))


def test_a_window_above_the_budget() -> None:
    message = said(lambda: SnapKVCache(tiny_model("llama"), 16))
    assert "32" in message
    assert "16" in message
    said(lambda: SnapKVCache(tiny_model("llama"), 16, window=0))
    said(lambda: SnapKVCache(tiny_model("llama"), 64, kernel=4))


@pytest.mark.parametrize("recent", [-1, 9])
def test_more_recent_tokens_than_the_budget(recent: int) -> None:
    assert str(recent) in said(lambda: H2OCache(tiny_model("llama"), 8, recent=recent))


MODELS: dict[str, Callable[[], Any]] = {
    "Mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(**SMALL, num_hidden_layers=1, state_size=4)
    ),
    "Bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(**SMALL, n_layer=1, n_head=2)
    ),
    "T5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2)
    ),
}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("name", MODELS)
def test_models_without_keys_and_values_to_evict(kind: Any, name: str) -> None:
    message = said(lambda: kind(MODELS[name](), 64))
    assert kind.__name__ in message
    assert name in message


def with_pictures() -> Any:
    """A model of text and pictures, the text model inside."""
    common = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    common["num_hidden_layers"] = 1
    config = transformers.Gemma3Config(
        text_config={**common, "vocab_size": 64, "head_dim": 8},
        vision_config={**common, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=60,
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", [*ALL, KVDirectCache])
def test_a_model_of_more_than_text(kind: Any) -> None:
    message = said(lambda: kind(with_pictures(), 64))
    assert kind.__name__ in message
    assert "Gemma3ForConditionalGeneration: it reads more than text" in message
    assert "load a model of text alone" in message


def test_keys_that_are_rotated_apart_from_the_queries() -> None:
    config = transformers.Gemma3nTextConfig(
        **SMALL,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0],
        altup_num_inputs=2,
    )
    model = transformers.Gemma3nForCausalLM(config).eval()
    message = said(lambda: StreamingLLMCache(model, 8))
    assert "Gemma3nForCausalLM: it rotates its keys in a way of its own" in message


def test_a_rotation_that_depends_on_the_length() -> None:
    config = tiny_model("llama").config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert "dynamic" in said(lambda: StreamingLLMCache(model, 8))
    WindowCache(model, 8)


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL)
def test_another_model_than_its_own(kind: Any) -> None:
    one, other = tiny_model("llama"), tiny_model("llama", seed=1)
    cache = kind(one, 64)
    ids = torch.tensor([[5, 6, 7]])
    assert "another model" in said(lambda: other(ids, past_key_values=cache))
    one(ids, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL)
def test_another_batch_size(kind: Any) -> None:
    model = tiny_model("llama")
    cache = kind(model, 64)
    ids = torch.tensor([[5, 6, 7]])
    model(ids, past_key_values=cache)
    assert "reset()" in said(lambda: model(ids.repeat(2, 1), past_key_values=cache))
    cache.reset()
    model(ids.repeat(2, 1), past_key_values=cache)


@pytest.mark.parametrize("kind", ALL)
def test_drafts_that_may_have_to_be_taken_back(kind: Any) -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7, 5, 6]])
    run = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    for method in (Goose(), Plain()):
        cache = kind(model, 64)
        said(
            lambda c=cache, m=method: model.generate(
                ids, past_key_values=c, custom_generate=m, **run
            )
        )
    message = said(
        lambda: model.generate(
            ids, past_key_values=kind(model, 64), prompt_lookup_num_tokens=2, **run
        )
    )
    assert kind.__name__ in message
    assert "evicts" in message


@torch.no_grad()
def test_tokens_are_taken_back_while_nothing_is_lost() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    for kind in (WindowCache, StreamingLLMCache):
        cache, other = kind(model, 6), kind(model, 6)
        model(ids, past_key_values=cache)
        cache.crop(-2)
        cache.crop(0)
        model(ids[:, :4], past_key_values=other)
        assert cache.get_seq_length() == 4
        found, wanted = (model(ids[:, 4:], past_key_values=c).logits for c in (cache, other))
        assert (found - wanted).abs().max() < 1e-12
        model(ids[:, :1], past_key_values=cache)
        assert "gone" in said(lambda c=cache: c.crop(-1))
        said(lambda c=cache: c.crop(3))
        said(lambda c=cache: c.crop(-99))
        cache.crop(-7)
        assert cache.get_seq_length() == cache.nbytes == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", [H2OCache, TOVACache, SnapKVCache])
def test_votes_cannot_be_taken_back(kind: Any) -> None:
    model = tiny_model("llama")
    cache = kind(model, 64)
    model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    assert "voted" in said(lambda: cache.crop(-1))

"""Bytes of a cache: every storage once, whatever the cache hides its tensors in."""

import mmap
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    QuantizedCache,
    StaticCache,
)

from pertoken.cache.memory import cache_bytes, full_cache_bytes, peak_rss_bytes, rss_bytes
from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, EXTRA_ARCHITECTURES, tiny_model

IDS = torch.arange(1, 13).reshape(1, -1)
ALL = (*ARCHITECTURES, *EXTRA_ARCHITECTURES)


def holding(**state: Any) -> DynamicCache:
    cache = DynamicCache()
    for name, value in state.items():
        setattr(cache, name, value)
    return cache


def read(model: Any, cache: Any, ids: torch.Tensor = IDS) -> Any:
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("name", ALL)
def test_a_full_cache_holds_what_the_arithmetic_says(name: str) -> None:
    model = tiny_model(name, sliding_window=64)
    for batch in (1, 3):
        cache = read(model, DynamicCache(config=model.config), IDS.expand(batch, -1))
        counters = 8 * sum(layer.is_sliding for layer in cache.layers)  # a tensor of one number
        assert cache_bytes(cache) == full_cache_bytes(model, 12, batch) + counters


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen3-sliding"])
def test_sliding_layers_keep_window_minus_one_rows(name: str) -> None:
    model = tiny_model(name, sliding_window=8)
    cache = read(model, DynamicCache(config=model.config))
    rows = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert full_cache_bytes(model, 12) == sum(rows)
    assert min(layer.keys.shape[2] for layer in cache.layers) == 7
    # The rows are cut out of twelve, and twelve are held.
    wide = full_cache_bytes(tiny_model(name, sliding_window=64), 12)
    assert wide <= cache_bytes(cache) <= wide + 8 * len(cache.layers)


def test_the_number_follows_dtype_and_static_allocation() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    assert full_cache_bytes(model, 10) * 4 == full_cache_bytes(tiny_model("llama"), 10)
    cache = read(model, StaticCache(config=model.config, max_cache_len=100))
    extra = cache_bytes(cache) - full_cache_bytes(model, 100)
    assert 0 <= extra < 100  # its counters are tensors too


def test_transformers_fp8_cache_is_counted_by_its_codes() -> None:
    model = tiny_model("llama")
    cache = read(model, QuantizedCache("fp8", config=model.config))
    codes = full_cache_bytes(model, 12) // 8
    assert codes <= cache_bytes(cache) < codes + 100


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


@dataclass
class Block:
    codes: torch.Tensor
    scale: list[torch.Tensor]


def test_tensors_are_found_wherever_they_hide() -> None:
    one = lambda: torch.zeros(25, dtype=torch.float32)  # noqa: E731
    hidden = {
        "list": [one(), [one()]],
        "dict": {"a": {"b": (one(),)}},
        "slots": Slotted(Slotted(one())),
        "block": Block(one(), [one()]),
        "space": SimpleNamespace(deep=deque([one()])),
        "array": np.zeros(25, dtype=np.float32)[3:],
        "coded": bytes(100),
        "buffer": np.frombuffer(memoryview(bytearray(100)), dtype=np.int8)[5:],
    }
    assert cache_bytes(holding(**hidden)) == 10 * 100


def test_a_storage_counts_once_and_whole() -> None:
    whole = torch.zeros(1000)
    assert cache_bytes(holding(a=whole, b=whole[:500], c=whole[500:].view(50, 10))) == 4000
    assert cache_bytes(holding(a=whole[:10])) == 4000
    assert cache_bytes(holding(a=whole[:10].clone())) == 40
    assert cache_bytes(holding(a=whole, b=whole.numpy())) == 4000
    assert cache_bytes(holding(a=whole.numpy()[2:])) == 4000


def test_a_cycle_ends() -> None:
    cache = holding(a=torch.zeros(10))
    cache.me = [cache]
    assert cache_bytes(cache) == 40


def test_weights_never_count() -> None:
    model = tiny_model("llama")
    row = model.model.embed_tokens.weight.detach()[3:5]
    assert cache_bytes(holding(model=model)) == 0
    assert cache_bytes(holding(model=ref(model), row=row)) == 0
    assert cache_bytes(holding(layer=model.model.layers[0], one=model.lm_head.weight)) == 0
    assert cache_bytes(holding(model=model, own=torch.zeros(10))) == 40
    assert cache_bytes(holding(model=model, copy=row.clone())) == row.nbytes


def test_an_empty_cache_holds_nothing() -> None:
    model = tiny_model("llama")
    assert cache_bytes(DynamicCache(config=model.config)) == 0
    assert full_cache_bytes(model, 0) == 0


def test_models_without_keys_and_values_are_named() -> None:
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(PertokenError, match="MambaForCausalLM has no keys and values"):
        full_cache_bytes(MambaForCausalLM(config), 5)
    with pytest.raises(PertokenError, match="tokens must be 0 or more"):
        full_cache_bytes(tiny_model("llama"), -1)


def test_memory_of_the_process() -> None:
    # Mapped pages are new to the process; an allocator may hand out what an earlier test gave back.
    with mmap.mmap(-1, 64 * 2**20) as held:
        before = rss_bytes()
        held.write(b"x" * len(held))
        assert rss_bytes() - before > 48 * 2**20
        assert peak_rss_bytes() >= before + 32 * 2**20


def test_a_system_without_proc_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("pertoken.cache.memory._STATUS", tmp_path / "none")
    with pytest.raises(PertokenError, match="does not tell"):
        rss_bytes()
    assert peak_rss_bytes() > 2**20


def test_latent_attention_is_counted_as_it_is_kept() -> None:
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    )
    model = DeepseekV3ForCausalLM(config).eval()
    cache = read(model, DynamicCache(config=config))
    rows = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert full_cache_bytes(model, 12) == rows
    assert full_cache_bytes(model, 24, 3) == 6 * rows

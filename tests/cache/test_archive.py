"""Archives: what was saved comes back, at every level and on every architecture."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from pertoken.cache import inspect_cache, restore_cache, save_cache
from pertoken.cache._format import LEVELS
from pertoken.cache._int8 import dequantize_int8, quantize_int8
from pertoken.cache._trials import round_trips, same_rows
from pertoken.cache.archive import prefill
from pertoken.testing import ARCHITECTURES, EXTRA_ARCHITECTURES, tiny_model

ALL = (*ARCHITECTURES, *EXTRA_ARCHITECTURES)
VOCAB = 64


def text(length: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (1, length), generator=draw)


def generated(model: Any, prompt: torch.Tensor, new: int, **options: Any) -> Any:
    """`generate`'s ids and the cache it leaves, which has not seen the last of them."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_is_bit_equal_and_goes_on_as_the_original(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    model = tiny_model(architecture, dtype=dtype)
    before = generated(model, text(20), 10)
    saved = save_cache(
        tmp_path / "a.ptkv", model, before.sequences, cache=before.past_key_values, chunk=7
    )
    restored = restore_cache(tmp_path / "a.ptkv", model)
    assert (saved.tokens, saved.held, saved.bytes) == (30, 29, (tmp_path / "a.ptkv").stat().st_size)
    assert torch.equal(restored.input_ids, before.sequences)
    assert (restored.verified, restored.prefilled, restored.damage) == (29, 0, "")
    assert same_rows(restored.cache, before.past_key_values)
    kinds = [type(layer) for layer in before.past_key_values.layers]
    assert [type(layer) for layer in restored.cache.layers] == kinds
    expected = generated(model, before.sequences, 12, past_key_values=before.past_key_values)
    found = generated(model, restored.input_ids, 12, past_key_values=restored.cache)
    assert torch.equal(found.sequences, expected.sequences)
    assert same_rows(found.past_key_values, expected.past_key_values)


@pytest.mark.parametrize("architecture", ALL)
def test_tokens_are_exact_and_the_cache_is_that_of_a_prefill(
    tmp_path: Path, architecture: str
) -> None:
    model = tiny_model(architecture, dtype=torch.float32)
    ids = text(24)
    saved = save_cache(tmp_path / "a.ptkv", model, ids, level="tokens", chunk=10)
    restored = restore_cache(tmp_path / "a.ptkv", model)
    assert torch.equal(restored.input_ids, ids)
    assert (restored.verified, restored.prefilled, saved.raw_chunks) == (0, 23, 0)
    assert same_rows(restored.cache, prefill(model, ids[0, :-1].tolist(), chunk=10))
    one_go = generated(model, ids, 10)
    assert torch.equal(
        generated(model, restored.input_ids, 10, past_key_values=restored.cache).sequences,
        one_go.sequences,
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3-sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_off_by_half_a_step_at_most(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    model = tiny_model(architecture, dtype=dtype)
    ids = text(30)
    cache = prefill(model, ids[0].tolist())
    save_cache(tmp_path / "a.ptkv", model, ids, cache=cache, level="int8", chunk=64)
    restored = restore_cache(tmp_path / "a.ptkv", model)
    assert torch.equal(restored.input_ids, ids)
    assert restored.verified == 30
    rounding = torch.finfo(dtype).eps
    for mine, theirs in zip(restored.cache.layers, cache.layers, strict=True):
        for name, dim in (("keys", -2), ("values", -1)):
            exact = getattr(theirs, name).float()
            error = (getattr(mine, name).float() - exact).abs()
            largest = exact.abs().amax(dim, keepdim=True)
            assert bool((error <= largest * (1 / 254 + rounding)).all())
            assert float(error.max()) > 0


def test_int8_codes_of_nothing_are_nothing() -> None:
    codes, scale = quantize_int8(torch.zeros(2, 3))
    assert dequantize_int8(codes, scale).abs().max() == 0


@pytest.mark.parametrize("level", LEVELS)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40),
    chunk=st.integers(1, 50),
    all_seen=st.booleans(),
)
def test_any_conversation_comes_back(
    tmp_path: Path, level: str, ids: list[int], chunk: int, all_seen: bool
) -> None:
    model = tiny_model("qwen3-sliding", dtype=torch.float32)
    cache = prefill(model, ids if all_seen else ids[:-1], chunk=chunk)
    saved = save_cache(tmp_path / "a", model, ids, cache=cache, level=level, chunk=chunk)
    restored = restore_cache(tmp_path / "a", model)
    rows = len(ids) - (not all_seen)
    assert restored.input_ids.tolist() == [ids]
    assert saved.held == restored.verified + restored.prefilled == rows
    assert int(restored.cache.get_seq_length()) == rows
    assert level == "int8" or same_rows(restored.cache, cache)
    assert inspect_cache(tmp_path / "a").damage == ""


def test_a_hundred_conversations_come_back_bit_by_bit() -> None:
    model = tiny_model("llama", dtype=torch.float32, layers=1)
    assert round_trips(model, 60, level="tokens", longest=14, chunk=8) == 60
    assert round_trips(model, 40, level="raw", longest=40, chunk=16) == 40


def test_bits_per_token_are_the_cross_entropy(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    torch.manual_seed(0)
    ids = model.generate(
        text(1), attention_mask=torch.ones(1, 1), max_new_tokens=329, do_sample=True, top_k=0
    )
    with torch.no_grad():
        log_probs = torch.log_softmax(model(ids).logits[0].double(), -1)
    likely = log_probs[torch.arange(329), ids[0, 1:]].sum().item()
    measured = (math.log2(VOCAB) - likely / math.log(2)) / 330
    saved = save_cache(tmp_path / "a", model, ids, level="tokens", chunk=330)
    assert saved.cross_entropy == pytest.approx(measured, rel=1e-5)
    assert measured <= saved.bits_per_token * 1.0001
    assert saved.bits_per_token == pytest.approx(measured, rel=0.01)
    # Nothing else is in the file: header, and the record's frame and checks.
    frames = 13 + 12
    assert saved.bytes == saved.payload_bits // 8 + frames + len(
        inspect_cache(tmp_path / "a").header.to_bytes()
    )


def test_a_cache_made_without_the_configuration_comes_back_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("gemma3", dtype=torch.float32)
    cache = DynamicCache()
    prefill(model, text(30)[0].tolist(), cache=cache)
    save_cache(tmp_path / "a", model, text(30), cache=cache, chunk=8)
    restored = restore_cache(tmp_path / "a", model)
    assert same_rows(restored.cache, cache)
    assert restored.cache.layers[0].keys.shape[-2] == 30  # a sliding layer would keep 7


def test_a_recording_cache_is_stored_without_its_past(tmp_path: Path) -> None:
    model = tiny_model("gemma3", dtype=torch.float32)
    ids = text(30)[0].tolist()
    cache = prefill(model, ids[:20])
    cache.activate_past_recording()
    prefill(model, ids, cache=cache)
    save_cache(tmp_path / "a", model, ids, cache=cache, chunk=8)
    cache.crop(0)
    assert same_rows(restore_cache(tmp_path / "a", model).cache, cache)


def test_the_restored_cache_speaks_with_the_whole_of_the_model(tmp_path: Path) -> None:
    """The next law behind a restored cache is that of the text without a cache."""
    model = tiny_model("gemma3")
    ids = text(30)
    for level in ("raw", "tokens"):
        save_cache(tmp_path / "a", model, ids, level=level)
        restored = restore_cache(tmp_path / "a", model)
        with torch.no_grad():
            found = model(ids[:, -1:], past_key_values=restored.cache).logits[0, -1]
            expected = model(ids).logits[0, -1]
        assert (found - expected).abs().max() < 1e-10


def test_inspection_says_what_the_file_holds(tmp_path: Path) -> None:
    model = tiny_model("gemma3", dtype=torch.bfloat16)
    save_cache(tmp_path / "a", model, text(30), chunk=8, level="tokens")
    found = inspect_cache(tmp_path / "a").to_dict()
    assert found["level"] == "tokens"
    assert (found["tokens"], found["rows"], found["chunk"], found["vocab"]) == (30, 29, 8, VOCAB)
    assert (found["dtype"], found["model"]) == ("bfloat16", "Gemma3ForCausalLM")
    assert found["coded_chunks"] == 4
    assert found["numerics"]["threads"] == torch.get_num_threads()
    save_cache(tmp_path / "a", model, text(30), chunk=8)
    assert inspect_cache(tmp_path / "a").to_dict()["layers"] == 2

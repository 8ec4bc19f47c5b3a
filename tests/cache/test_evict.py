"""What every evicting cache promises, whatever its rule."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from pertoken.cache import H2OCache, SnapKVCache, StreamingLLMCache, TOVACache, WindowCache
from pertoken.cache._evicting import EvictingCache
from pertoken.testing import EXTRA_ARCHITECTURES, check_leaves_no_trace, tiny_model

Make = Callable[[PreTrainedModel, int], EvictingCache]
METHODS: dict[str, Make] = {
    "window": WindowCache,
    "streaming-llm": lambda model, budget: StreamingLLMCache(model, budget, sinks=2),
    "h2o": H2OCache,
    "snapkv": lambda model, budget: SnapKVCache(model, budget, window=3, kernel=3),
    "tova": TOVACache,
}
BUDGET = 8


@pytest.fixture(params=METHODS)
def make(request: pytest.FixtureRequest) -> Make:
    return METHODS[request.param]


def some_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded texts of these lengths, and their mask."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = some_ids(length, seed=length)
    return ids, (ids != 0).long()


def greedy(model: PreTrainedModel, ids: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=count, do_sample=False, **options)


def places(cache: EvictingCache, row: int) -> list[list[list[int]]]:
    """Kept places of a batch row: layer, group, place."""
    return [
        [[place for place in group if place >= 0] for group in rows.positions[row].tolist()]
        for rows in cache.layers
    ]


# Single texts on all eight architectures: tests/testing/test_battery.py.
@pytest.mark.parametrize("architecture", ["gemma3", "gpt2", *EXTRA_ARCHITECTURES])
def test_a_budget_that_is_never_reached_changes_nothing(make: Make, architecture: str) -> None:
    model = tiny_model(architecture)
    ids, mask = padded([21, 13])
    wanted = greedy(model, ids, 16, attention_mask=mask, return_dict_in_generate=True, **LOGITS)
    found = greedy(
        model,
        ids,
        16,
        attention_mask=mask,
        past_key_values=make(model, 64),
        return_dict_in_generate=True,
        **LOGITS,
    )
    assert torch.equal(found.sequences, wanted.sequences)
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert (one - other).abs().max() < 1e-10


LOGITS = {"output_logits": True}


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2", "opt", "phi"])
def test_a_padded_batch_is_its_rows_alone(make: Make, architecture: str) -> None:
    model = tiny_model(architecture)
    lengths = [23, 9, 5]
    ids, mask = padded(lengths)
    cache = make(model, BUDGET)
    found = greedy(model, ids, 10, attention_mask=mask, past_key_values=cache)
    for row, length in enumerate(lengths):
        alone = make(model, BUDGET)
        wanted = greedy(model, ids[row : row + 1, -length:], 10, past_key_values=alone)
        assert found[row, -10:].tolist() == wanted[0, -10:].tolist()
        assert places(cache, row) == places(alone, 0)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_turns_of_unequal_length_in_one_batch(make: Make, architecture: str) -> None:
    """Padding behind text: a second turn that is padded on its own, or on its right."""
    model = tiny_model(architecture)
    ids = some_ids(2, 24, seed=1)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 12:16] = mask[0, 16:18] = 0
    numbers = (mask.cumsum(-1) - 1).clamp(min=0)
    pieces = ((0, 12), (12, 18), (18, 19), (19, 23), (23, 24))
    cache = make(model, BUDGET)
    alone = [make(model, BUDGET) for _ in range(2)]
    for start, end in pieces:
        found = model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=numbers[:, start:end],
            past_key_values=cache,
        ).logits
        for row in range(2):
            real = mask[row, start:end].bool()
            text = ids[row : row + 1, start:end][:, real]
            wanted = model(text, past_key_values=alone[row]).logits
            assert (found[row, real] - wanted[0]).abs().max() < 1e-9
            assert places(cache, row) == places(alone[row], 0)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gemma3", "gpt-neox"])
def test_the_budget_holds_after_every_forward(make: Make, architecture: str) -> None:
    model = tiny_model(architecture)
    ids, mask = padded([30, 12])
    numbers = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = make(model, 5)
    start = 0
    for piece in (3, 1, 1, 9, 1, 1, 1, 13):
        end = start + piece
        model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=numbers[:, start:end],
            past_key_values=cache,
        )
        assert cache.get_seq_length() == end
        for rows in cache.layers:
            assert rows.keys.shape[2] == rows.values.shape[2] == rows.count <= 5
            # What is left holds no memory of what is gone.
            assert rows.keys.untyped_storage().nbytes() == rows.keys.nbytes
            assert rows.values.untyped_storage().nbytes() == rows.values.nbytes
        start = end


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_prompt_attends_to_all_of_itself(make: Make, architecture: str) -> None:
    model = tiny_model(architecture)
    ids = some_ids(1, 40)
    found = model(ids, past_key_values=make(model, 4)).logits
    assert (found - model(ids, use_cache=False).logits).abs().max() < 1e-10


def test_bytes_are_counted(make: Make) -> None:
    model = tiny_model("llama")
    cache = make(model, BUDGET)
    assert cache.nbytes == cache.peak_bytes == cache.full_bytes == 0
    greedy(model, some_ids(1, 20), 5, past_key_values=cache)
    row = 2 * 2 * 8 * 8  # keys and values of 2 heads, 8 numbers each, 8 bytes each
    assert cache.kv_bytes == 2 * BUDGET * row
    assert cache.full_bytes == 2 * 24 * row
    held = sum(t.nbytes for rows in cache.layers for t in vars(rows).values() if t is not None)
    assert cache.nbytes == cache.kv_bytes + cache.checkpoint_bytes == held
    # The prompt's rows in one layer beside what the other layer kept.
    assert cache.peak_bytes >= (20 + BUDGET) * row
    assert cache.peak_bytes < cache.full_bytes + cache.checkpoint_bytes + 2 * 24 * row
    cache.reset_peak()
    assert cache.peak_bytes == cache.nbytes
    cache.reset()
    assert cache.nbytes == cache.peak_bytes == cache.get_seq_length() == 0


def test_the_full_cache_is_what_transformers_would_hold(make: Make) -> None:
    model = tiny_model("gemma3")
    ids = some_ids(2, 20)
    cache, full = make(model, BUDGET), DynamicCache(config=model.config)
    for each in (cache, full):
        greedy(model, ids, 3, past_key_values=each)
    assert cache.full_bytes == sum(x.keys.nbytes + x.values.nbytes for x in full.layers)


def test_turns_go_on_where_the_last_one_ended(make: Make) -> None:
    """Two calls of generate are one, where the text in between is fed the same way."""
    model = tiny_model("qwen3-sliding")
    ids = some_ids(1, 20)
    once, twice = make(model, BUDGET), make(model, BUDGET)
    wanted = greedy(model, ids, 12, past_key_values=once)
    half = greedy(model, ids, 5, past_key_values=twice)
    found = greedy(model, half, 7, past_key_values=twice)
    assert torch.equal(found, wanted)
    assert places(once, 0) == places(twice, 0)
    longer = torch.cat((found, some_ids(1, 9, seed=4)), 1)
    greedy(model, longer, 3, past_key_values=twice)
    assert twice.get_seq_length() == 20 + 12 + 9 + 2


def test_beams_are_those_of_the_full_cache_within_the_budget(make: Make) -> None:
    model = tiny_model("llama")
    ids, mask = padded([14, 9])
    run = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    assert torch.equal(
        greedy(model, ids, 8, past_key_values=make(model, 64), **run),
        greedy(model, ids, 8, **run),
    )


@torch.no_grad()
def test_reordered_rows_take_all_they_know_along(make: Make) -> None:
    model = tiny_model("qwen3-sliding")
    ids, mask = padded([14, 9, 11])
    order = torch.tensor([2, 0, 2])

    def fed(ids: torch.Tensor, mask: torch.Tensor, reorder: bool) -> tuple[Any, torch.Tensor]:
        cache = make(model, BUDGET)
        numbers = (mask.cumsum(-1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=numbers, past_key_values=cache)
        if reorder:
            cache.reorder_cache(order)
            mask, numbers = mask[order], numbers[order]
        for step in range(6):
            mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)
            logits = model(
                torch.full((3, 1), 7 + step),
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
            ).logits
        return cache, logits

    one, found = fed(ids, mask, True)
    other, wanted = fed(ids[order], mask[order], False)
    assert (found - wanted).abs().max() < 1e-9
    assert [places(one, row) for row in range(3)] == [places(other, row) for row in range(3)]


@torch.no_grad()
def test_rows_of_a_batch_can_be_repeated_and_selected(make: Make) -> None:
    model = tiny_model("llama")
    cache = make(model, BUDGET)
    model(some_ids(2, 12), past_key_values=cache)
    first, second = places(cache, 0), places(cache, 1)
    cache.batch_repeat_interleave(2)
    assert [places(cache, row) for row in range(4)] == [first, first, second, second]
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert [places(cache, row) for row in range(2)] == [second, first]
    model(torch.tensor([[5], [6]]), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(make: Make, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    ids, mask = padded([20, 6])
    cache = make(model, BUDGET)
    greedy(model, ids, 8, attention_mask=mask, past_key_values=cache)
    assert all(rows.keys.dtype == dtype and rows.count == BUDGET for rows in cache.layers)


@pytest.mark.parametrize("architecture", EXTRA_ARCHITECTURES)
def test_leaves_no_trace(make: Make, architecture: str) -> None:
    ids = some_ids(1, 12)
    check_leaves_no_trace(
        tiny_model(architecture),
        lambda model: greedy(model, ids, 6, past_key_values=make(model, BUDGET)),
        rng=True,
    )


def test_hooks_go_with_the_cache(make: Make) -> None:
    model = tiny_model("llama")
    decoder = model.get_decoder()
    cache = make(model, BUDGET)
    greedy(model, some_ids(1, 12), 3, past_key_values=cache)
    assert decoder._forward_pre_hooks
    del cache
    gc.collect()
    assert not decoder._forward_pre_hooks
    with make(model, BUDGET):
        assert decoder._forward_pre_hooks
    assert not decoder._forward_pre_hooks


@torch.no_grad()
def test_a_failed_forward_leaves_the_cache_as_it_was(make: Make) -> None:
    model = tiny_model("llama")
    ids = some_ids(1, 14)
    cache, other = make(model, BUDGET), make(model, BUDGET)
    for each in (cache, other):
        model(ids, past_key_values=each)

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    handle = model.get_decoder().layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        model(ids[:, :3], past_key_values=cache)
    handle.remove()
    assert cache.nbytes == other.nbytes
    found, wanted = (model(ids[:, :1], past_key_values=each).logits for each in (cache, other))
    assert torch.equal(found, wanted)
    assert places(cache, 0) == places(other, 0)


@torch.no_grad()
def test_a_copy_goes_on_by_itself_with_the_same_model(make: Make) -> None:
    model = tiny_model("llama")
    ids, mask = some_ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, :4] = 0
    numbers = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, other = make(model, BUDGET), make(model, BUDGET)
    for each in (cache, other):
        model(ids, attention_mask=mask, position_ids=numbers, past_key_values=each)
    twin = copy.deepcopy(cache)
    assert twin.model is model
    assert repr(twin) == repr(cache)
    more = torch.ones(2, 15, dtype=torch.long)
    more[:, :14] = mask
    run = {"attention_mask": more, "position_ids": numbers[:, -1:] + 1}
    model(some_ids(2, 1), past_key_values=cache, **run)  # another token
    wanted, found = (
        model(ids[:, :1], past_key_values=each, **run).logits for each in (other, twin)
    )
    assert torch.equal(wanted, found)
    assert places(twin, 0) == places(other, 0)

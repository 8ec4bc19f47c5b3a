"""A cache that answers attention itself: the same logits as the library, and no trace."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

from pertoken._blocks import Blocks, replaced
from pertoken._takeover import implementation, layer_windows, sdpa, visible
from pertoken.cache import KVDirectCache, StreamingLLMCache
from pertoken.cache._attention import ModelCache
from pertoken.cache._ids import numerics
from pertoken.decode.forward import refuse_unfit
from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, check_leaves_no_trace, tiny_model

ALL = (*ARCHITECTURES, "qwen3-sliding")


class _Everything(ModelCache):
    """Keeps every row, the simplest cache there is."""

    def __init__(self, model):
        super().__init__(model, [])
        self.rows = [None] * len(self.windows)
        self.positions = None
        self.new = {}

    def get_seq_length(self, layer_idx=0):
        return 0 if self.positions is None else self.positions.shape[1]

    def begin(self, forward):
        self.new = {}

    def attend(self, module, query, key, value, attention_mask, **kwargs):
        layer = module.layer_idx
        held = self.rows[layer]
        positions = self.forward.positions
        if held is not None:
            key, value = (
                torch.cat((old, new), 2) for old, new in zip(held, (key, value), strict=True)
            )
        if self.positions is not None:
            positions = torch.cat((self.positions, positions), 1)
        self.new[layer] = (key, value)
        allowed = visible(self.forward.positions, positions, self.windows[layer])[:, None]
        return sdpa(module, query, key, value, allowed, scaling=kwargs["scaling"])

    def end(self, finished):
        if finished:
            for layer, pair in self.new.items():
                self.rows[layer] = pair
            old, new = self.positions, self.forward.positions
            self.positions = new if old is None else torch.cat((old, new), 1)
        self.new = {}


@pytest.fixture(params=ALL)
def model(request):
    return tiny_model(request.param)


def _ids(model, *shape, seed=0):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


def test_generate_is_that_of_the_full_cache(model):
    ids = _ids(model, 1, 21)
    run = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(
        model.generate(ids, past_key_values=_Everything(model), **run), model.generate(ids, **run)
    )


def test_padded_batch_and_chunks(model):
    ids = _ids(model, 2, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    numbers = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = _Everything(model)
    parts = []
    with torch.no_grad():
        full = model(ids, attention_mask=mask, position_ids=numbers, use_cache=False).logits
        for start, end in ((0, 9), (9, 15), (15, 16), (16, 20)):
            parts.append(
                model(
                    ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=numbers[:, start:end],
                    past_key_values=cache,
                ).logits
            )
    real = mask.bool()
    assert (torch.cat(parts, 1) - full)[real].abs().max() < 1e-10


def test_leaves_no_trace(model):
    ids = _ids(model, 1, 6)
    check_leaves_no_trace(
        model,
        lambda m: m.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            past_key_values=_Everything(m),
        ),
    )


def test_hooks_go_with_the_cache():
    model = tiny_model("llama")
    decoder = model.get_decoder()
    cache = _Everything(model)
    assert len(decoder._forward_pre_hooks) == 1
    del cache
    gc.collect()
    assert not decoder._forward_pre_hooks
    assert not decoder._forward_hooks
    with _Everything(model):
        assert decoder._forward_hooks
    assert not decoder._forward_hooks


def test_a_failed_forward_leaves_the_cache(model):
    cache = _Everything(model)
    ids = _ids(model, 1, 5)
    model(ids, past_key_values=cache)
    block = Blocks(model).modules[-1]

    def fail(*_):
        raise RuntimeError("planted")

    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        model(ids[:, :1], past_key_values=cache)
    handle.remove()
    assert cache.get_seq_length() == 5
    assert cache.rows[0][0].shape[2] == 5
    assert model.config._attn_implementation == "sdpa"
    model(ids[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 6


class _Interrupt:
    """Ctrl-C in the last block of a model, for the length of a `with`."""

    def __init__(self, model):
        self.block = Blocks(model).modules[-1]

    def __enter__(self):
        def press(*_):
            raise KeyboardInterrupt

        self.handle = self.block.register_forward_pre_hook(press)

    def __exit__(self, *_):
        self.handle.remove()


def _interrupted(model, make, ids):
    """A cache whose second forward Ctrl-C broke off."""
    cache = make(model)
    model(ids, past_key_values=cache)
    with _Interrupt(model), pytest.raises(KeyboardInterrupt):
        model(ids[:, :1], past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    "make",
    [
        _Everything,
        lambda model: KVDirectCache(model, 4, checkpoint="per_layer", rematerialize="turn"),
        lambda model: StreamingLLMCache(model, 8),
    ],
)
@torch.no_grad()
def test_the_model_is_right_at_once_after_an_interrupt(model, make):
    ids = _ids(model, 1, 7)
    plain = model(ids, use_cache=False).logits
    cache = _interrupted(model, make, ids)
    assert torch.equal(model(ids, use_cache=False).logits, plain)
    assert model.config._attn_implementation == "sdpa"
    assert not any(block._forward_pre_hooks for block in Blocks(model).modules)
    # The cache goes on as if nothing had been.
    other = make(model)
    model(ids, past_key_values=other)
    wanted, found = (model(ids[:, :1], past_key_values=each).logits for each in (other, cache))
    assert (wanted - found).abs().max() < 1e-10


@torch.no_grad()
def test_close_and_other_caches_after_an_interrupt():
    model = tiny_model("llama")
    ids = _ids(model, 1, 7)
    plain = model(ids, use_cache=False).logits
    first, second = (_interrupted(model, _Everything, ids) for _ in range(2))
    # The model is not refused for what was broken off, nor is it written down.
    assert implementation(model.config) == numerics(model)["attention"] == "sdpa"
    refuse_unfit(model)
    streaming = StreamingLLMCache(model, 8)
    assert torch.allclose(model(ids, past_key_values=streaming).logits, plain)
    first, second = (_interrupted(model, _Everything, ids) for _ in range(2))
    first.close()
    second.close()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids, use_cache=False).logits, plain)


@torch.no_grad()
def test_models_of_two_threads_do_not_mix():
    models = [tiny_model("llama", seed=seed) for seed in (0, 1)]
    ids = _ids(models[0], 1, 7)
    wanted = [model(ids, use_cache=False).logits for model in models]
    meet = threading.Barrier(2, timeout=60)

    def meet_there(*_):
        meet.wait()

    def run(model):
        # Both are inside a forward, the second one to begin goes on last.
        block = Blocks(model).modules[0]
        handle = block.register_forward_pre_hook(meet_there)
        with torch.no_grad(), _Everything(model) as cache:
            logits = model(ids, past_key_values=cache).logits
        handle.remove()
        return logits

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, models))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other)


def test_another_model_is_refused():
    one, other = tiny_model("llama"), tiny_model("llama", seed=1)
    cache = _Everything(one)
    with pytest.raises(PertokenError, match="with another model"):
        other(torch.tensor([[5, 6]]), past_key_values=cache)
    cache.close()
    with pytest.raises(PertokenError, match="closed"):
        one(torch.tensor([[5, 6]]), past_key_values=cache)


def test_padded_without_positions_is_refused():
    model = tiny_model("llama")
    with pytest.raises(PertokenError, match="position_ids"):
        model(
            torch.tensor([[5, 6]]),
            attention_mask=torch.tensor([[0, 1]]),
            past_key_values=_Everything(model),
        )


def test_a_short_mask_is_refused():
    model = tiny_model("llama")
    cache = _Everything(model)
    model(torch.tensor([[5, 6]]), past_key_values=cache)
    with pytest.raises(PertokenError, match="must cover all 3"):
        model(torch.tensor([[5]]), attention_mask=torch.tensor([[1]]), past_key_values=cache)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_projected_rows_are_the_cached_ones(model, dtype):
    model = model.to(dtype)
    ids = _ids(model, 2, 11)
    numbers = torch.arange(11)[None].expand(2, -1)
    inputs = []
    blocks = Blocks(model)
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for block in blocks.modules
    ]
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, position_ids=numbers, past_key_values=cache)
        for handle in handles:
            handle.remove()
        entered = blocks.enter(ids, numbers)
        assert torch.equal(entered.hidden, inputs[0])
        for index, layer in enumerate(cache.layers):
            keys, values = blocks.project(index, inputs[index], entered.calls[index])
            assert torch.equal(keys, layer.keys)
            assert torch.equal(values, layer.values)


def test_advance_is_the_next_block_s_input(model):
    ids = _ids(model, 1, 12)
    numbers = torch.arange(12)[None]
    blocks = Blocks(model)
    windows = layer_windows(model)
    with torch.no_grad():
        expected = model(ids, position_ids=numbers, output_hidden_states=True).hidden_states
        entered = blocks.enter(ids, numbers)
        hidden = entered.hidden
        for index in range(len(windows)):
            assert (hidden - expected[index]).abs().max() < 1e-10

            def attend(module, query, key, value, _, scaling=None, window=windows[index], **kw):
                allowed = visible(numbers, numbers, window)[:, None]
                return sdpa(module, query, key, value, allowed, scaling=scaling)

            hidden = blocks.advance(index, hidden, entered.calls[index], attend)


def test_blocks_leave_no_trace(model):
    def act(model):
        blocks = Blocks(model)
        entered = blocks.enter(torch.tensor([[5, 6]]), torch.tensor([[0, 1]]))
        blocks.project(0, entered.hidden, entered.calls[0])
        return model(torch.tensor([[5]]))

    check_leaves_no_trace(model, act)


def test_an_error_while_forwards_are_replaced_leaves_the_model():
    first, second = modules = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]

    def make(module):
        if module is second:
            raise RuntimeError("planted")
        return lambda hidden: 0 * hidden

    with pytest.raises(RuntimeError, match="planted"), replaced(modules, make):
        pass
    assert "forward" not in vars(first)

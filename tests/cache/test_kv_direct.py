"""KV-Direct gives what the full cache gives: every checkpoint and budget, however it is fed."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from pertoken.cache.kv_direct import KVDirectCache
from pertoken.decode import Goose, PromptLookup, TokenRecycling
from pertoken.testing import ARCHITECTURES, check_batch_invariant, check_lossless, tiny_model

ALL = (*ARCHITECTURES, "qwen3-sliding")
STEP = [
    {"checkpoint": "tokens"},
    {"checkpoint": "residual", "layer": 1},
    {"checkpoint": "per_layer"},
]
MODES = [{**mode, "rematerialize": name} for mode in STEP for name in ("step", "turn")]
BLOCK = 4

pytestmark = pytest.mark.filterwarnings("ignore:checkpoint='per_layer' keeps")
every_mode = pytest.mark.parametrize(
    "mode", MODES, ids=lambda mode: "-".join(map(str, mode.values()))
)


@pytest.fixture(params=ALL)
def model(request):
    return tiny_model(request.param)


def ids_of(*shape, seed=0):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


def fresh(budget, custom_generate=None, made=None, **options):
    """A way of decoding that makes a new cache for every call."""

    def decode(model, input_ids, **arguments):
        arguments["past_key_values"] = cache = KVDirectCache(model, budget, **options)
        if made is not None:
            made.append(cache)
        if custom_generate is not None:
            return custom_generate(model, input_ids, **arguments)
        for name in ("logits_to_keep", "position_ids"):
            arguments.pop(name, None)
        return model.generate(input_ids, **arguments)

    return decode


@every_mode
def test_tokens_and_logits_are_those_of_the_full_cache(model, mode):
    ids = ids_of(1, 15)
    run = {
        "max_new_tokens": 8,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    full = model.generate(ids, **run)
    for budget in (BLOCK, 11, 100):
        cache = KVDirectCache(model, budget, block=BLOCK, **mode)
        mine = model.generate(ids, past_key_values=cache, **run)
        assert torch.equal(mine.sequences, full.sequences)
        difference = torch.stack(mine.logits) - torch.stack(full.logits)
        assert difference.abs().max() < 1e-10
        assert cache.get_seq_length() == 22


@pytest.mark.parametrize("mode", STEP, ids=lambda mode: mode["checkpoint"])
def test_three_layers_in_chunks_are_all_at_once(mode):
    for name in ("gemma3", "gpt-neox"):
        model = tiny_model(name, layers=3)
        ids = ids_of(2, 22)
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
            for borders in ((0, 22), (0, 11, 13, 21, 22), range(0, 23, 2)):
                cache = KVDirectCache(model, 6, block=5, **mode)
                parts = [
                    model(ids[:, start:end], past_key_values=cache).logits
                    for start, end in itertools.pairwise(borders)
                ]
                assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_is_its_rows_alone(attention):
    for name in ("gemma3", "gpt2"):
        model = tiny_model(name, attention=attention)
        prompts = [ids_of(4), ids_of(9, seed=1), ids_of(15, seed=2)]
        check_batch_invariant(fresh(6, block=5), model, prompts, max_new_tokens=6)


def test_a_padded_batch_is_the_full_cache(model):
    ids = ids_of(3, 15)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mask[2, :13] = 0
    run = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **run)
    for rematerialize in ("step", "turn"):
        cache = KVDirectCache(model, 5, block=5, rematerialize=rematerialize)
        assert torch.equal(model.generate(ids, past_key_values=cache, **run), expected)


def test_padding_on_the_right_and_between_turns():
    model = tiny_model("gemma3")
    ids = ids_of(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 6:9] = mask[0, 14:] = 0
    numbers = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = [ids[row, mask[row].bool()][None] for row in range(2)]
    cache = KVDirectCache(model, 5, block=BLOCK)
    parts = []
    with torch.no_grad():
        for start, end in ((0, 9), (9, 14), (14, 16)):
            given = {"attention_mask": mask[:, :end], "position_ids": numbers[:, start:end]}
            parts.append(model(ids[:, start:end], past_key_values=cache, **given).logits)
        for row, text in enumerate(alone):
            logits = torch.cat(parts, 1)[row, mask[row].bool()]
            assert (logits - model(text, use_cache=False).logits).abs().max() < 1e-10


@every_mode
def test_turns_go_on_where_the_last_ended(mode):
    model = tiny_model("qwen3-sliding")
    cache = KVDirectCache(model, 7, block=BLOCK, **mode)
    run = {"max_new_tokens": 5, "do_sample": False}
    mine = full = ids_of(1, 9)
    for turn in range(3):
        mine = model.generate(mine, past_key_values=cache, **run)
        full = model.generate(full, **run)
        assert torch.equal(mine, full)
        assert cache.get_seq_length() == mine.shape[1] - 1
        cache.end_turn()
        said = ids_of(1, 5, seed=turn + 1)
        mine, full = torch.cat((mine, said), 1), torch.cat((full, said), 1)


def test_sampling_draws_the_same():
    model = tiny_model("mistral")
    ids = ids_of(2, 12)
    run = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.9}
    torch.manual_seed(3)
    expected = model.generate(ids, **run)
    torch.manual_seed(3)
    cache = KVDirectCache(model, 5)
    assert torch.equal(model.generate(ids, past_key_values=cache, **run), expected)


@every_mode
def test_beams_are_reordered(mode):
    model = tiny_model("opt")
    ids = ids_of(2, 10)
    run = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    mine = model.generate(ids, past_key_values=KVDirectCache(model, 5, **mode), **run)
    assert torch.equal(mine, model.generate(ids, **run))


@every_mode
def test_crop_forgets_the_newest(mode):
    """Within the held rows, at their border, far into the evicted tokens, and all of it."""
    model = tiny_model("gemma3")
    ids, more = ids_of(1, 15), ids_of(1, 4, seed=1)
    for count in (0, 2, 5, 8, 15):
        cache = KVDirectCache(model, 6, block=BLOCK, **mode)
        with torch.no_grad():
            model(ids[:, :12], past_key_values=cache)
            model(ids[:, 12:], past_key_values=cache)
            cache.crop(-count)
            assert cache.get_seq_length() == 15 - count
            text = torch.cat((ids[:, : 15 - count], more), 1)
            expected = model(text, use_cache=False).logits[:, -4:]
            parts = [model(more[:, i : i + 2], past_key_values=cache).logits for i in (0, 2)]
            assert (torch.cat(parts, 1) - expected).abs().max() < 1e-10


@every_mode
def test_rows_are_chosen_and_repeated(mode):
    model = tiny_model("gemma3")
    ids = ids_of(3, 14)
    again = ids[torch.tensor([2, 0, 0])]
    cache = KVDirectCache(model, 6, block=BLOCK, **mode)
    with torch.no_grad():
        model(ids[:, :13], past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        expected = model(again, use_cache=False).logits[:, -1:]
        logits = model(again[:, 13:], past_key_values=cache).logits
        assert (logits - expected).abs().max() < 1e-10
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 2
        logits = model(again[[1, 1], 13:], past_key_values=cache).logits
        assert (logits - expected[[1, 1]]).abs().max() < 1e-10


def test_a_copy_goes_its_own_way():
    model = tiny_model("llama")
    ids, ways = ids_of(1, 12), ids_of(2, 3, seed=1)
    read = KVDirectCache(model, 6, block=BLOCK, checkpoint="residual")
    with torch.no_grad():
        model(ids, past_key_values=read)
        for way in (ways[:1], ways[1:]):
            twin = copy.deepcopy(read)
            assert twin.model is model
            expected = model(torch.cat((ids, way), 1), use_cache=False).logits[:, -3:]
            logits = model(way, past_key_values=twin).logits
            assert (logits - expected).abs().max() < 1e-10
    assert read.get_seq_length() == 12


@every_mode
@pytest.mark.parametrize("drafter", [Goose, PromptLookup, TokenRecycling])
def test_speculation_on_it_is_lossless(drafter, mode):
    model = tiny_model("qwen3-sliding")
    way = fresh(6, drafter(), block=5, **mode)
    check_lossless(way, model, [[5, 6, 7, 8] * 3, ids_of(11)], max_new_tokens=10)


@pytest.mark.parametrize("mode", STEP, ids=lambda mode: mode["checkpoint"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_speculation_in_a_padded_batch(name, mode):
    prompts = [[5, 6, 7, 8] * 3, [9, 3], ids_of(11)]
    way = fresh(6, Goose(), block=5, **mode)
    check_batch_invariant(way, tiny_model(name), prompts, max_new_tokens=9)


def test_speculation_drafts_and_leaves_the_cache_of_the_text():
    model, made = tiny_model("llama"), []
    drafter = Goose()
    ids = torch.tensor([[5, 6, 7, 8] * 4])
    way = fresh(6, drafter, made)
    text = model.generate(ids, custom_generate=way, max_new_tokens=10, do_sample=False)
    assert drafter.stats.drafted
    (cache,) = made
    assert cache.get_seq_length() == text.shape[1] - 1
    run = {"max_new_tokens": 3, "do_sample": False}
    more = model.generate(text, past_key_values=cache, **run)
    assert torch.equal(more, model.generate(text, **run))


@every_mode
def test_transformers_own_speculation(mode):
    model = tiny_model("gemma3")
    ids = torch.tensor([[5, 6, 7, 8] * 3])
    run = {"max_new_tokens": 8, "do_sample": False, "prompt_lookup_num_tokens": 3}
    cache = KVDirectCache(model, 6, block=BLOCK, **mode)
    assert torch.equal(
        model.generate(ids, past_key_values=cache, **run), model.generate(ids, **run)
    )


def test_a_plain_mask_of_four_dimensions_is_plain_text():
    model = tiny_model("llama")
    ids = ids_of(1, 12)
    closed = torch.finfo(model.dtype).min
    cache = KVDirectCache(model, 4)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for start, end in ((0, 7), (7, 12)):
            mask = torch.full((1, 1, end - start, end), closed, dtype=model.dtype).triu(start + 1)
            numbers = torch.arange(start, end)[None]
            logits = model(
                ids[:, start:end], attention_mask=mask, position_ids=numbers, past_key_values=cache
            ).logits
            assert (logits - expected[:, start:end]).abs().max() < 1e-10


def test_hidden_states_are_those_of_the_new_tokens(model):
    ids = ids_of(1, 12)
    cache = KVDirectCache(model, 5)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        mine = model(ids[:, 10:], past_key_values=cache, output_hidden_states=True).hidden_states
        full = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    assert len(mine) == len(full)
    for one, other in zip(mine, full, strict=True):
        assert (one - other[:, 10:]).abs().max() < 1e-10


@pytest.mark.model
def test_a_real_model_says_the_same(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("The first prime numbers are 2, 3, 5, 7, 11 and", return_tensors="pt").input_ids
    run = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **run)
    for mode in STEP:
        with KVDirectCache(model, 8, **mode) as cache:
            assert torch.equal(model.generate(ids, past_key_values=cache, **run), expected)

"""KV-Direct: the same bits, counted bytes, no trace, and one clear line for each error."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache

from pertoken.cache.kv_direct import KVDirectCache
from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, check_leaves_no_trace, tiny_model

ALL = (*ARCHITECTURES, "qwen3-sliding")

pytestmark = pytest.mark.filterwarnings("ignore:checkpoint='per_layer' keeps")


def ids_of(*shape, seed=0):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


# Bits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_rows_made_again_have_the_bits_of_the_cached_ones(name, dtype):
    """Where the model read the block at once, in every layer, sliding ones too."""
    model = tiny_model(name, layers=3, dtype=dtype)
    ids = ids_of(2, 13)
    full = DynamicCache()
    options = {"checkpoint": "per_layer", "rematerialize": "turn"}
    cache = KVDirectCache(model, 12, **options)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=full)
        model(ids[:, :12], past_key_values=cache)
        cache._held.drop_rows()
        model(ids[:, 12:], past_key_values=cache)
    for mine, own in zip(cache.layers, full.layers, strict=True):
        assert torch.equal(mine.keys[:, :, :12], own.keys)
        assert torch.equal(mine.values[:, :, :12], own.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", ["tokens", "residual", "per_layer"])
def test_a_block_has_the_same_bits_however_much_follows(checkpoint, dtype):
    model = tiny_model("gemma3", layers=3, dtype=dtype)
    ids = ids_of(1, 27)
    cache = KVDirectCache(model, 4, checkpoint=checkpoint, rematerialize="turn")
    found = []
    with torch.no_grad():
        model(ids[:, :13], past_key_values=cache)
        for start in (13, 17, 23):
            cache.end_turn()
            model(ids[:, start : start + 1], past_key_values=cache)
            found.append([rows.keys[:, :, :8].clone() for rows in cache.layers])
            model(ids[:, start + 1 : start + 4], past_key_values=cache)
    for later in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], later, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_while_the_text_fits(dtype):
    model = tiny_model("gemma3", dtype=dtype)
    ids = ids_of(1, 7)
    run = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    run["max_new_tokens"] = 12
    mine = model.generate(ids, past_key_values=KVDirectCache(model, 30), **run)
    full = model.generate(ids, past_key_values=DynamicCache(), **run)
    assert torch.equal(torch.stack(mine.logits), torch.stack(full.logits))


# Work.


@pytest.mark.parametrize(
    ("options", "run", "projected"),
    [
        ({"checkpoint": "tokens"}, [4, 4, 0], [6, 6, 4]),
        ({"checkpoint": "tokens", "layers": 4}, [4, 4, 4, 0], [0, 0, 0, 4]),
        ({"checkpoint": "tokens", "block": None}, [2, 2, 0], [1, 1, 2]),
        ({"checkpoint": "tokens", "block": None, "layers": 4}, [1, 1, 1, 0], [0, 0, 0, 1]),
        ({"checkpoint": "residual", "layer": 1}, [0, 4, 0], [4, 6, 4]),
        ({"checkpoint": "residual", "layer": 1, "layers": 4}, [0, 4, 4, 0], [4, 0, 0, 4]),
        ({"checkpoint": "per_layer"}, [0, 0, 0], [4, 4, 4]),
        ({"checkpoint": "tokens", "rematerialize": "turn"}, [4, 4, 0], [0, 0, 4]),
    ],
)
def test_a_step_does_the_work_that_is_promised(options, run, projected, monkeypatch):
    """Over 4 evicted blocks of 4, per layer: n blocks run.

    With 3 layers, 12 rows to spare, n(n-1)/2 = 6 are projected for them; with 4 layers none. If no
    block is given, as many as fit into the spare rows are run at once.
    """
    options = {"block": 4, **options}
    layers = options.pop("layers", 3)
    model = tiny_model("llama", layers=layers)
    cache = KVDirectCache(model, 4, **options)
    counts = {"advance": [0] * layers, "project": [0] * layers}
    for name, count in counts.items():
        whole = getattr(cache.blocks, name)

        def spy(layer, *args, whole=whole, count=count):
            count[layer] += 1
            return whole(layer, *args)

        monkeypatch.setattr(cache.blocks, name, spy)
    with torch.no_grad():
        model(ids_of(1, 20), past_key_values=cache)
        cache.end_turn()
        assert not any(counts["advance"] + counts["project"])
        model(ids_of(1, 1), past_key_values=cache)
    assert counts == {"advance": run, "project": projected}


# Bytes.

ROW = 2 * 2 * 8 * 8  # keys and values of a tiny llama's layer: 2 heads of 8 float64
HIDDEN = 32 * 8


def _talk(cache, turns, words=12):
    """Feed turns of 12 tokens and one more by itself; peak and held bytes after each."""
    held = []
    with torch.no_grad():
        for turn in range(turns):
            cache.reset_peak()
            cache.model(ids_of(1, words, seed=turn), past_key_values=cache)
            cache.model(ids_of(1, 1, seed=turn), past_key_values=cache)
            held.append((cache.kv_bytes, cache.checkpoint_bytes, cache.peak_bytes))
    return held


def test_keys_and_values_stay_within_the_budget():
    model = tiny_model("llama")
    cache = KVDirectCache(model, 8, block=4)
    held = _talk(cache, 5)
    assert all(kv <= 8 * 2 * ROW for kv, _, _ in held)
    assert held[-1][1] == 5 * 13 * 4  # four bytes for an id, nothing else
    assert cache.full_bytes == 5 * 13 * 2 * ROW
    assert cache.nbytes == cache.kv_bytes + cache.checkpoint_bytes


def test_the_peak_grows_by_block_inputs_and_not_by_keys_and_values():
    """Per token of the conversation: id, block input, rotations (cos and sin of 8) and position."""
    model = tiny_model("llama", layers=6)
    held = _talk(KVDirectCache(model, 8, block=4), 6)
    growth = (held[5][2] - held[2][2]) / (3 * 13)
    assert growth <= 4 + HIDDEN + 2 * 8 * 8 + 8
    assert growth < 6 * ROW / 4


@pytest.mark.parametrize("layers", [2, 6])
def test_made_keys_and_values_take_no_more_than_the_budget_again(layers):
    """Held in all layers, one layer's new ones, and as many again or two blocks: whatever T is."""
    model = tiny_model("llama", layers=layers)
    cache = KVDirectCache(model, 8, block=4)
    for turn, (_, _, peak) in enumerate(_talk(cache, 8), 1):
        tokens = 13 * turn
        inputs = tokens * (4 + HIDDEN + 2 * 8 * 8 + 8)
        assert peak <= inputs + (2 * 8 * layers + 13 + 2 * 4) * ROW


def test_a_peak_holds_budget_new_tokens_and_two_blocks():
    model = tiny_model("llama", layers=6)
    cache = KVDirectCache(model, 8, block=4, checkpoint="per_layer")
    peaks = [peak - checkpoint for _, checkpoint, peak in _talk(cache, 6)]
    rotations = 60 * (2 * 8 * 8 + 8)
    rows = 6 * 8 + 13 + 2 * 4  # held in all layers; one layer's new ones; two blocks
    assert max(peaks) <= rows * ROW + rotations


@pytest.mark.parametrize(("checkpoint", "kept"), [("residual", HIDDEN), ("per_layer", 3 * HIDDEN)])
def test_block_inputs_are_counted(checkpoint, kept):
    cache = KVDirectCache(tiny_model("llama", layers=3), 8, checkpoint=checkpoint)
    _talk(cache, 2)
    assert cache.checkpoint_bytes == 26 * (4 + kept)


def test_a_turn_holds_all_rows_until_its_end():
    model = tiny_model("llama")
    cache = KVDirectCache(model, 8, block=4, rematerialize="turn")
    _talk(cache, 3)
    assert cache.kv_bytes == cache.full_bytes
    cache.end_turn()
    assert cache.kv_bytes <= 8 * 2 * ROW
    assert cache.peak_bytes >= cache.full_bytes
    cache.reset()
    assert cache.nbytes == 0


def test_a_full_cache_of_sliding_layers_holds_their_window():
    model = tiny_model("gemma3")
    ids, full = ids_of(2, 20), DynamicCache(config=tiny_model("gemma3").config)
    cache = KVDirectCache(model, 30)
    with torch.no_grad():
        model(ids, past_key_values=full)
        model(ids, past_key_values=cache)
    own = sum(t.numel() * 8 for layer in full.layers for t in (layer.keys, layer.values))
    assert cache.full_bytes == own


# Traces.


def test_leaves_no_trace():
    model = tiny_model("gemma3")
    ids = ids_of(1, 12)

    def act(model):
        with KVDirectCache(model, 5, checkpoint="per_layer") as cache:
            model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)

    check_leaves_no_trace(model, act)


def test_hooks_go_with_the_cache():
    model = tiny_model("llama")
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    cache = KVDirectCache(model, 4, checkpoint="residual")
    with torch.no_grad():
        for _ in range(2):
            model(ids_of(1, 9), past_key_values=cache)
    del cache
    gc.collect()
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before


@pytest.mark.parametrize("rematerialize", ["step", "turn"])
def test_a_failed_forward_costs_only_time(rematerialize):
    model = tiny_model("qwen3-sliding")
    ids = ids_of(1, 14)
    cache = KVDirectCache(model, 6, checkpoint="residual", rematerialize=rematerialize)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -2:]
        model(ids[:, :12], past_key_values=cache)
        planted = model.model.layers[1].mlp.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="planted"):
            model(ids[:, 12:], past_key_values=cache)
        planted.remove()
        assert cache.get_seq_length() == 12
        logits = model(ids[:, 12:], past_key_values=cache).logits
    assert (logits - expected).abs().max() < 1e-10


def _fail(*_):
    raise RuntimeError("planted")


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be 1 token or more, got 0"),
        ({"budget": -3}, "budget must be"),
        ({"budget": 16, "block": 32}, r"budget must be at least one block \(32 tokens\), got 16"),
        ({"block": 0}, "block must be 1"),
        ({"checkpoint": "token"}, r"unknown checkpoint 'token' \(did you mean 'tokens'\?\)"),
        ({"rematerialize": "turns"}, "unknown rematerialize 'turns'"),
        ({"checkpoint": "residual", "layer": 2}, "layer must be 0 to 1"),
        ({"layer": 1}, "only with checkpoint='residual'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(PertokenError, match=message):
        KVDirectCache(tiny_model("llama"), **options)


def _small(kind, heads=2, **options):
    config = kind(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=heads,
        **options,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: transformers.MambaForCausalLM(
                transformers.MambaConfig(
                    vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4
                )
            ),
            "Mamba.* recurrent state",
        ),
        (
            lambda: transformers.BloomForCausalLM(
                transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
            ),
            "Bloom.* attention itself",
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8
                )
            ),
            "T5.* encoder-decoder",
        ),
        (
            lambda: _small(
                transformers.LlamaConfig,
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            ),
            "rotations change with the length of the text .*'dynamic'",
        ),
        (
            lambda: _small(transformers.Gemma2Config, head_dim=8, num_key_value_heads=1),
            "caps its attention scores",
        ),
    ],
    ids=["mamba", "bloom", "t5", "dynamic-rope", "softcap"],
)
def test_models_that_cannot_be_recomputed_are_named(make, reason):
    with pytest.raises(PertokenError, match=reason):
        KVDirectCache(make().eval(), 8)


def test_recomputation_is_tried_before_it_is_trusted():
    """A block whose output depends on more than its arguments is found out."""
    model = tiny_model("llama")
    calls = []

    def drift(module, args, output):
        calls.append(1)
        return output + 10.0 * len(calls)

    handle = model.model.layers[0].register_forward_hook(drift)
    with pytest.raises(PertokenError, match="running block 1 again does not give"):
        KVDirectCache(model, 8)
    handle.remove()
    KVDirectCache(model, 8)


def test_per_layer_warns_where_it_is_larger():
    model = _small(transformers.LlamaConfig, heads=4, num_key_value_heads=1)  # 16 > 2 x 4
    with pytest.warns(UserWarning, match="keeps 128 bytes per token of Llama.*than .* 64 bytes"):
        KVDirectCache(model, 8, checkpoint="per_layer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KVDirectCache(tiny_model("gpt2"), 8, checkpoint="per_layer")  # 32 < 2 x 32


def test_another_model_is_named():
    cache = KVDirectCache(tiny_model("llama"), 8)
    with pytest.raises(PertokenError, match="with another model"), torch.no_grad():
        tiny_model("gpt2")(ids_of(1, 3), past_key_values=cache)


@pytest.fixture
def used():
    """A cache that has seen 9 tokens."""
    model = tiny_model("llama")
    cache = KVDirectCache(model, 4)
    with torch.no_grad():
        model(ids_of(1, 9), past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": ids_of(2, 1)}, "holds a batch of 1, the input has 2 rows"),
        ({"inputs_embeds": torch.zeros(1, 1, 32).double()}, "pass input_ids"),
        ({"input_ids": ids_of(1, 1), "position_ids": torch.tensor([[12]])}, "position_ids"),
        (
            {
                "input_ids": ids_of(1, 1),
                "position_ids": torch.tensor([[8]]),
                "attention_mask": torch.tensor([[1] * 4 + [0] + [1] * 5]),
            },
            "hide padding only",
        ),
    ],
)
def test_what_cannot_be_recomputed_is_refused(used, given, message):
    with pytest.raises(PertokenError, match=message), torch.no_grad():
        used.model(past_key_values=used, **given)
    assert used.get_seq_length() == 9
    with torch.no_grad():
        used.model(ids_of(1, 1), past_key_values=used)


def test_a_tree_must_be_resolved(used):
    mask = torch.zeros(1, 1, 2, 11, dtype=torch.float64)
    mask[..., 1, 9] = torch.finfo(torch.float64).min  # siblings
    tree = {"attention_mask": mask, "position_ids": torch.tensor([[9, 9]])}
    with torch.no_grad():
        used.model(ids_of(1, 2), past_key_values=used, **tree)
        with pytest.raises(PertokenError, match="4-D mask"):
            used.model(ids_of(1, 1), past_key_values=used)
        used.crop(-2)
        used.model(ids_of(1, 1), past_key_values=used)


def test_training_gradients_and_positive_crops_are_refused(used):
    with pytest.raises(PertokenError, match="negative number"):
        used.crop(3)
    with pytest.raises(PertokenError, match="no gradients"):
        used.model(ids_of(1, 1), past_key_values=used)
    used.model.train()
    with pytest.raises(PertokenError, match=r"model\.eval\(\)"), torch.no_grad():
        used.model(ids_of(1, 1), past_key_values=used)

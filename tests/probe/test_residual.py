"""Keys and values follow from the stream, and so does the text: on every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from pertoken import _blocks
from pertoken.errors import PertokenError
from pertoken.probe import (
    cache_free_decoding,
    query_key_rank,
    reconstruction_error,
    residual_patching,
)
from pertoken.testing import (
    ARCHITECTURES,
    EXTRA_ARCHITECTURES,
    ByteTokenizer,
    check_leaves_no_trace,
    tiny_model,
)

ALL = [*ARCHITECTURES, *EXTRA_ARCHITECTURES]
IDS = torch.randint(1, 64, (1, 21), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ALL)
def test_keys_and_values_come_out_bit_for_bit_in_every_dtype(name: str) -> None:
    # 21 tokens are more than two windows of 8.
    model = tiny_model(name, layers=4)
    dtypes = ["float64", "float32", "bfloat16", "float16"]
    result = reconstruction_error(model, IDS, dtypes=dtypes, lengths=[3, 21])
    assert result.exact
    assert result.greatest == 0
    assert len(result.errors) == 4 * 2 * 4
    windows = {error.window for error in result.errors}
    assert windows == ({8, None} if name in ("gemma3", "qwen3-sliding") else windows)
    assert model.dtype == torch.float64


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_another_stream_or_position_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is not vacuous: a last bit of the stream, or a shift by one, shows."""
    model = tiny_model(name)
    right = _blocks.Blocks.project

    def nudged(self: Any, layer: int, hidden: torch.Tensor, call: Any) -> Any:
        return right(self, layer, hidden + 1e-9 * torch.randn_like(hidden), call)

    monkeypatch.setattr(_blocks.Blocks, "project", nudged)
    result = reconstruction_error(model, IDS)
    assert not result.exact
    assert 0 < result.greatest < 1e-6
    monkeypatch.setattr(_blocks.Blocks, "project", right)
    enter = _blocks.Blocks.enter
    monkeypatch.setattr(
        _blocks.Blocks, "enter", lambda self, ids, places: enter(self, ids, places + 1)
    )
    shifted = reconstruction_error(model, IDS)
    # Only rotated keys know their position; GPT-2's position is in the stream.
    assert all(error.values == 0 for error in shifted.errors)
    assert all((error.keys == 0) == (name == "gpt2") for error in shifted.errors)


@pytest.mark.parametrize("name", ALL)
def test_decoding_without_a_cache_gives_the_tokens_of_generate(name: str) -> None:
    model = tiny_model(name)
    result = cache_free_decoding(model, IDS, max_new_tokens=30)
    mask = torch.ones_like(IDS)
    right = model.generate(IDS, attention_mask=mask, max_new_tokens=30, do_sample=False)
    assert result.ids == result.ids_without == right[0, 21:].tolist()
    assert (result.equal, result.verdict.outcome) == (30, "identical")
    assert "30 of 30" in result.table()


def test_where_the_texts_part_is_said_with_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    import pertoken.probe.residual as module

    right = module._greedy

    def wrong(model: Any, ids: Any, count: int, cached: bool) -> Any:
        for step, token in enumerate(right(model, ids, count, cached)):
            yield token if cached or step < 2 else (token + 1) % 64

    monkeypatch.setattr(module, "_greedy", wrong)
    result = cache_free_decoding(model, IDS, max_new_tokens=4)
    assert (result.equal, result.verdict.outcome) == (2, "different")
    divergence = result.verdict.divergence
    assert divergence is not None
    assert divergence.top2_gap is not None
    assert f"{divergence.top2_gap:.3g}" in result.table()
    assert result.to_dict()["divergence"]["step"] == 2


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("recipient", ["as long", "short", "a good deal longer"])
def test_the_whole_sequence_replaced_is_the_donor(name: str, recipient: str) -> None:
    model = tiny_model(name, vocab_size=258, layers=3)
    result = residual_patching(model, ByteTokenizer(), "a donor", recipient)
    assert result.whole
    assert max(map(abs, result.to_donor)) < 1e-12
    assert all(kl == pytest.approx(result.to_recipient[0]) for kl in result.to_recipient)
    assert result.apart > 0.01


@pytest.mark.parametrize("name", ALL)
def test_a_donor_that_is_the_recipient_changes_nothing(name: str) -> None:
    model = tiny_model(name, vocab_size=258)
    for positions in ("last", 3, 0.5):
        result = residual_patching(model, ByteTokenizer(), "same", "same", positions=positions)
        assert max(map(abs, result.to_donor + result.to_recipient)) < 1e-12


def test_the_same_embedding_at_the_last_position_changes_nothing_at_block_0() -> None:
    model = tiny_model("llama", vocab_size=258)
    result = residual_patching(model, ByteTokenizer(), "what a?", "who be?", positions="last")
    assert result.to_recipient[0] == pytest.approx(0, abs=1e-12)
    assert result.to_donor[0] == pytest.approx(result.apart)
    assert result.to_recipient[1] > 1e-6


def test_all_positions_by_number_are_all_positions_where_the_lengths_agree() -> None:
    model = tiny_model("llama", vocab_size=258)
    by_number = residual_patching(model, ByteTokenizer(), "donor", "taken", positions=5)
    assert not by_number.whole
    assert max(map(abs, by_number.to_donor)) < 1e-12


@pytest.mark.parametrize("count", [1, 3])
def test_partial_patching_equals_running_the_blocks_by_hand(count: int) -> None:
    model: Any = tiny_model("llama", vocab_size=258, layers=3)
    donor, recipient = ByteTokenizer().encode("donor text"), ByteTokenizer().encode("receives")
    result = residual_patching(model, ByteTokenizer(), "donor text", "receives", positions=count)

    def streams(ids: list[int]) -> Any:
        output = model(torch.tensor([ids]), output_hidden_states=True)
        return output.hidden_states, output.logits[0, -1].log_softmax(-1)

    with torch.no_grad():
        given, of_donor = streams(donor)
        taken, of_recipient = streams(recipient)
        places = torch.arange(len(recipient))[None]
        for layer in range(3):
            hidden = taken[layer].clone()
            hidden[:, -count:] = given[layer][:, -count:]
            rotation = model.model.rotary_emb(hidden, places)
            for block in model.model.layers[layer:]:
                hidden = block(hidden, position_embeddings=rotation)
            patched = model.lm_head(model.model.norm(hidden))[0, -1].log_softmax(-1)
            for found, other in (
                (result.to_donor, of_donor),
                (result.to_recipient, of_recipient),
            ):
                right = (patched.exp() * (patched - other)).sum()
                assert found[layer] == pytest.approx(float(right), abs=1e-12)


def brute_ranks(model: Any, name: str, energy: float) -> tuple[list[Any], list[Any]]:
    """r* from the large products themselves, with weights read off the projections' outputs."""
    config = model.config
    heads, dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    names = {"gpt2": ("transformer.h", "attn"), "gpt-neox": ("gpt_neox.layers", "attention")}
    names["opt"] = ("model.decoder.layers", "self_attn")
    blocks, attention = names.get(name, ("model.layers", "self_attn"))
    eye = torch.eye(config.hidden_size, dtype=model.dtype)
    scores, printed = [], []
    for block in model.get_submodule(blocks):
        module = getattr(block, attention)

        def linear(part: Any) -> torch.Tensor:
            return part(eye) - part(torch.zeros_like(eye))

        if name == "gpt2":
            query, key, _ = linear(module.c_attn).split(config.hidden_size, -1)
        elif name == "gpt-neox":
            fused = linear(module.query_key_value).view(-1, heads, 3 * dim)
            query, key = fused[..., :dim].flatten(1), fused[..., dim : 2 * dim].flatten(1)
        else:
            query, key = linear(module.q_proj), linear(module.k_proj)
        groups = heads * dim // key.shape[1]
        scores.append([])
        printed.append([])
        for head in range(heads):
            own = head // groups
            q = query[:, head * dim : (head + 1) * dim]
            k = key[:, own * dim : (own + 1) * dim]
            for product, found in ((q @ k.T, scores), (q.T @ k, printed)):
                squares = torch.linalg.svdvals(product) ** 2
                found[-1].append(
                    next(
                        r for r in range(1, dim + 1) if squares[:r].sum() >= energy * squares.sum()
                    )
                )
    return scores, printed


@pytest.mark.parametrize("energy", [0.5, 0.9])
@pytest.mark.parametrize("name", ALL)
def test_ranks_are_those_of_the_large_products(name: str, energy: float) -> None:
    model = tiny_model(name)
    result = query_key_rank(model, energy)
    with torch.no_grad():
        assert (result.ranks, result.as_printed) == brute_ranks(model, name, energy)
    assert result.head_dim == 8


def test_energy_1_asks_for_every_dimension_and_a_head_of_rank_1_for_one() -> None:
    model: Any = tiny_model("llama")
    assert set(query_key_rank(model, 1.0).ranks[0]) == {8}
    with torch.no_grad():
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight[:8] = weight[:1] * torch.arange(1.0, 9.0, dtype=weight.dtype)[:, None]
    assert query_key_rank(model).ranks[0][0] == 1


def test_fused_projections_of_phi3_are_split() -> None:
    config = transformers.Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model: Any = transformers.Phi3ForCausalLM(config).eval()
    fused = model.model.layers[0].self_attn.qkv_proj.weight.detach()
    query, key = fused[8:16], fused[32:40]  # the second head shares the first key head
    squares = torch.linalg.svdvals(query.T @ key)[:8].square()
    right = int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1
    assert query_key_rank(model).ranks[0][1] == right


def test_results_read_as_tables_and_as_json() -> None:
    import json

    model = tiny_model("gemma3", vocab_size=258, layers=8)
    results = [
        reconstruction_error(model, IDS),
        residual_patching(model, ByteTokenizer(), positions="last"),
        query_key_rank(model),
        cache_free_decoding(model, IDS, 3),
    ]
    for result in results:
        json.dumps(result.to_dict(), allow_nan=False)
    for result in results[:3]:
        long, short = (result.table(layers=layers) for layers in (True, False))
        assert len(short) < len(long)
    assert "4 window 8" in results[0].table(layers=False)
    assert "7 full" in results[0].table()


def test_infinite_keys_that_agree_are_equal() -> None:
    from pertoken.probe.residual import _greatest

    made = torch.tensor([float("inf"), 1.0])
    assert _greatest(made, made.clone()) == 0
    assert _greatest(made, torch.tensor([float("inf"), 1.5])) == 0.5
    assert _greatest(made, torch.tensor([1.0, 1.0])) == float("inf")


def test_a_model_that_overflows_is_shown_as_nan() -> None:
    model: Any = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e30)
    result = reconstruction_error(model, IDS, dtypes=["float32", "float16"])
    assert not result.exact
    assert "nan" in result.table(layers=False)
    assert result.to_dict()["greatest"] is None


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_probes_leave_no_trace(name: str) -> None:
    model = tiny_model(name, vocab_size=258)
    cache_free_decoding(model, IDS, 2)  # transformers keeps hooks of its own from a first forward

    def probe(model: Any) -> None:
        reconstruction_error(model, IDS, dtypes=["bfloat16"])
        residual_patching(model, ByteTokenizer(), positions="last")
        query_key_rank(model)

    check_leaves_no_trace(model, probe)


def state_space() -> Any:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    return transformers.MambaForCausalLM(config)


def encoder_decoder() -> Any:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (state_space, "recurrent state"),
        (encoder_decoder, "encoder-decoder"),
        (lambda: torch.nn.Linear(2, 2), "causal language model"),
        (lambda: "smollm2", "pertoken.load"),
    ],
)
def test_models_without_keys_and_values_are_named(make: Any, words: str) -> None:
    model = make()
    for probe in (
        lambda: reconstruction_error(model, IDS),
        lambda: cache_free_decoding(model, IDS),
        lambda: residual_patching(model, ByteTokenizer()),
        lambda: query_key_rank(model),
    ):
        with pytest.raises(PertokenError, match=words):
            probe()


def test_projections_of_an_unknown_layout_are_refused() -> None:
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(PertokenError, match="where the query and key weights"):
        query_key_rank(transformers.BloomForCausalLM(config))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: reconstruction_error(m, []), "not empty"),
        (lambda m: reconstruction_error(m, IDS.expand(2, -1)), "one text"),
        (lambda m: reconstruction_error(m, [0.5]), "whole numbers"),
        (lambda m: reconstruction_error(m, [5, 300]), "got 300"),
        (lambda m: reconstruction_error(m, [-1]), "got -1"),
        (lambda m: reconstruction_error(m, IDS, lengths=[22]), "lengths go from 1 to 21"),
        (lambda m: reconstruction_error(m, IDS, dtypes=["bfloat"]), "did you mean 'bfloat16'"),
        (lambda m: cache_free_decoding(m, IDS, 0), "1 or more"),
        (lambda m: cache_free_decoding(m, IDS, 500), "521 tokens are more than the 512"),
        (lambda m: residual_patching(m, ByteTokenizer(), donor=" "), "donor prompt is empty"),
        (lambda m: residual_patching(m, ByteTokenizer(), recipient=""), "recipient prompt"),
        (lambda m: residual_patching(m, ByteTokenizer(), "a", "b", positions=2), "from 1 to 1"),
        (lambda m: residual_patching(m, ByteTokenizer(), positions="first"), "got 'first'"),
        (lambda m: query_key_rank(m, 0), "energy is a share"),
    ],
)
def test_mistakes_are_said_in_one_line(call: Any, words: str) -> None:
    model = tiny_model("llama", vocab_size=258)
    with pytest.raises(PertokenError, match=words) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_prompts_that_the_model_cannot_read() -> None:
    model = tiny_model("gpt2", vocab_size=258, max_positions=16)
    with pytest.raises(PertokenError, match="17 tokens are more than the 16 positions"):
        residual_patching(model, ByteTokenizer(), "ab", "x" * 17)
    with pytest.raises(PertokenError, match="but the model knows 64 ids"):
        residual_patching(tiny_model("gpt2"), ByteTokenizer(), "ab", "cd")

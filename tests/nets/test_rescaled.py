"""Norms that rescale by themselves: their start, their gradients, their sizes, their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from pertoken.errors import PertokenError
from pertoken.nets import (
    DynamicTanh,
    GatedNorm,
    PreAffine,
    RescaledLlamaConfig,
    RescaledLlamaForCausalLM,
    with_rescaling,
)
from pertoken.testing import check_batch_invariant, check_leaves_no_trace, tiny_model
from pertoken.testing.text_laws import check_saves_and_loads

IDS = torch.randint(1, 64, (2, 11), generator=torch.Generator().manual_seed(5))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("norm", ["plain", "preaffine", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_given_model_bit_for_bit(norm: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    new = with_rescaling(model, norm, attn_gate=False)
    assert torch.equal(logits(new), logits(model))
    assert not {id(p) for p in new.parameters()} & {id(p) for p in model.parameters()}


def test_an_attention_gate_multiplies_the_mixed_values_of_every_head() -> None:
    model = tiny_model("llama")
    new = with_rescaling(model, "plain", attn_gate=True)
    for block in new.model.layers:
        block.self_attn.gate_proj.weight.data.zero_()  # every gate is 1/2
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.mul_(0.5)
    torch.testing.assert_close(logits(new), logits(model), rtol=0, atol=1e-12)
    hooks = [block.self_attn.o_proj._forward_pre_hooks for block in new.model.layers]
    assert not any(hooks)


@pytest.mark.parametrize("norm", [PreAffine(6), GatedNorm(6, rank=3), DynamicTanh(6)])
def test_gradients_are_those_of_finite_differences(norm: torch.nn.Module) -> None:
    draw = torch.Generator().manual_seed(2)
    norm = norm.double()
    names, values = zip(*norm.named_parameters(), strict=True)
    drawn = [torch.randn(v.shape, generator=draw, dtype=torch.float64) for v in values]
    x = torch.randn(2, 3, 6, generator=draw, dtype=torch.float64)

    def run(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, dict(zip(names, given, strict=True)), (x,))

    inputs = [each.requires_grad_() for each in (x, *drawn)]
    assert torch.autograd.gradcheck(run, inputs)


def test_a_gate_learns_from_its_start() -> None:
    """W_up is 0 at the start, yet it gets a gradient, and so W_down does a step later."""
    model = RescaledLlamaForCausalLM(RescaledLlamaConfig(**SIZES))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    gates = [m for m in model.modules() if isinstance(m, GatedNorm)]
    assert len(gates) == 2 * SIZES["num_hidden_layers"] + 1
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    for gate in gates:
        assert gate.up.weight.abs().max() > 0
        assert gate.down.weight.grad is not None
        assert gate.down.weight.grad.abs().max() > 0


def test_as_many_parameters_as_the_paper_counts() -> None:
    """2 B, hidden 2048: 57 norms (28 blocks) of 2 · 16 · 2048 are the paper's 3.7 M."""
    size = SIZES | {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16}
    counts = {}
    with torch.device("meta"):
        for norm in ("plain", "gated", "preaffine", "tanh"):
            config = RescaledLlamaConfig(**size, norm=norm, attn_gate=False)
            counts[norm] = RescaledLlamaForCausalLM(config).num_parameters()
    assert counts["gated"] - counts["plain"] == 57 * 2 * 16 * 2048 == 3_735_552
    assert counts["preaffine"] - counts["plain"] == 57 * 2048
    assert counts["tanh"] - counts["plain"] == 57 * (2048 + 1)


@pytest.mark.parametrize("norm", ["gated", "preaffine", "tanh"])
def test_a_model_comes_back_from_its_folder_and_is_no_plain_llama(
    norm: str, tmp_path: Path
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = RescaledLlamaForCausalLM(RescaledLlamaConfig(**SIZES, norm=norm)).eval()
        for weight in model.parameters():
            weight.data.normal_(0.0, 0.3)
    check_saves_and_loads(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is RescaledLlamaForCausalLM
    assert torch.equal(logits(loaded), logits(model))
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["model_type"] != "llama"  # or it would be read as one, without its gates


def test_it_generates_batched_as_alone_and_leaves_no_trace() -> None:
    model = with_rescaling(tiny_model("llama"), "gated")
    check_batch_invariant(None, model, max_new_tokens=6)
    mask = torch.ones_like(IDS)
    check_leaves_no_trace(
        model, lambda m: m.generate(IDS, attention_mask=mask, max_new_tokens=2, do_sample=False)
    )


def test_what_it_cannot_change_is_one_line() -> None:
    with pytest.raises(PertokenError, match="changes a LlamaForCausalLM, got GPT2"):
        with_rescaling(tiny_model("gpt2"))
    with pytest.raises(PertokenError, match="did you mean 'preaffine'"):
        with_rescaling(tiny_model("llama"), "pre_affine")

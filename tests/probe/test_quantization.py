"""4-bit numbers: exactly those of the format, the nearest of them, and no trace."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers

from pertoken.errors import PertokenError
from pertoken.probe import fake_quant, quantization, quantize_int4, quantize_nvfp4
from pertoken.testing import ARCHITECTURES, check_leaves_no_trace, tiny_model

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
GRID = torch.cat([-GRID.flip(0), GRID])
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of very different sizes, whole blocks of zeros among them."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=draw, dtype=torch.float64)
    x *= torch.exp(4 * torch.randn(*shape[:-1], 1, generator=draw, dtype=torch.float64))
    x[0, :16] = 0.0
    x[1, 3] = 1e4
    return x


def brute_nvfp4(x: torch.Tensor, per_token: bool) -> torch.Tensor:
    """Number by number: the scales by their definition, then the nearest of all 15 values."""
    found = torch.zeros_like(x)
    for row in range(x.shape[0]):
        whole = (x[row] if per_token else x).abs().max() / (6 * 448)
        whole = whole.float().double()
        for start in range(0, x.shape[1], 16):
            block = x[row, start : start + 16]
            scale = (block.abs().max() / (6 * whole)).clamp(2**-6, 448)
            scale = scale.to(torch.float8_e4m3fn).double() * whole
            values = GRID * scale
            for place, number in enumerate(block.tolist()):
                found[row, start + place] = values[(values - number).abs().argmin()]
    return found


@pytest.mark.parametrize("per_token", [False, True])
def test_nvfp4_is_the_nearest_number_of_the_format(per_token: bool) -> None:
    x = drawn(4, 40)  # the last block is half a block
    found = quantize_nvfp4(x, per_token=per_token)
    brute = brute_nvfp4(x, per_token)
    assert torch.allclose((found - x).abs(), (brute - x).abs(), rtol=1e-12, atol=0)
    if per_token:
        alone = torch.cat([quantize_nvfp4(row[None], per_token=True) for row in x])
        assert torch.equal(found, alone)


def test_e2m1_ties_go_to_the_even_mantissa() -> None:
    x = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, -0.25])
    wanted = [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 0.0]
    assert quantize_nvfp4(x).tolist() == wanted


@pytest.mark.parametrize(
    "quantize", [quantize_nvfp4, partial(quantize_nvfp4, per_token=True), quantize_int4]
)
def test_what_is_rounded_stays_as_it_is(quantize: Any) -> None:
    x = drawn(6, 48)
    once = quantize(x)
    assert torch.equal(quantize(once), once)
    assert torch.equal(quantize(-x), -once)
    assert torch.equal(quantize(torch.zeros(2, 20)), torch.zeros(2, 20))
    assert once.isfinite().all()
    # A power of 2 goes through, unless the smallest scales are in its way.
    assert torch.equal(quantize(x * 4), once * 4)


def test_int4_is_the_nearest_of_15_levels_and_off_by_half_a_step_at_most() -> None:
    x = drawn(5, 20)
    step = (x.abs().amax(-1, keepdim=True) / 7).float().double()
    levels = torch.arange(-7, 8, dtype=torch.float64)[:, None, None] * step
    nearest = (levels - x).abs().amin(0)
    found = quantize_int4(x)
    assert torch.allclose((found - x).abs(), nearest, rtol=1e-9, atol=1e-12)
    assert ((found - x).abs() <= step * (0.5 + 1e-6)).all()


def test_nvfp4_is_off_by_a_bounded_share_of_the_block() -> None:
    """Half a step of E2M1 at the block's peak is 1/6 of it, and E4M3 rounds the scale by 1/16."""
    x = drawn(8, 64, seed=3)[2:]
    blocks = x.unflatten(-1, (-1, 16))
    off = (quantize_nvfp4(x, per_token=True).unflatten(-1, (-1, 16)) - blocks).abs()
    peaks = blocks.abs().amax(-1, keepdim=True)
    row = x.abs().amax(-1)[:, None, None]
    assert (off <= peaks * (1 + 1 / 16) / 6 + row * 2**-6 / 448).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_smoothing_alone_changes_nothing_but_rounding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a format that rounds nothing the smoothed model is the model."""
    from pertoken.probe import quantization

    model = tiny_model(name)
    monkeypatch.setitem(quantization._FORMATS, "none", (lambda x: x, lambda x: x))
    with torch.no_grad():
        plain = model(IDS).logits
        with fake_quant(model, "none", calibration=[[5, 6, 7], [8, 9]]):
            same = model(IDS).logits
        with fake_quant(model, "nvfp4", calibration=[[5, 6, 7], [8, 9]]):
            rounded = model(IDS).logits
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-5)
    assert (rounded - plain).abs().max() > 1e-3


def test_smoothing_is_by_its_formula() -> None:
    """max|X|^(1/2) / max|W|^(1/2) of all layers behind one norm."""
    from pertoken.probe.quantization import _linears, _smoothing

    model = tiny_model("llama")
    block = model.model.layers[0]
    scales = _smoothing(model, _linears(model), [[5, 6, 7]])
    with torch.no_grad():
        read = block.input_layernorm(model.model.embed_tokens(torch.tensor([5, 6, 7])))
    parts = [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
    weight = torch.cat([part.weight for part in parts]).abs().amax(0)
    wanted = (read.abs().amax(0) / weight).sqrt()
    for part in parts:
        torch.testing.assert_close(scales[id(part)], wanted)
    assert id(block.mlp.up_proj) in scales
    assert id(block.self_attn.o_proj) not in scales  # no norm in front
    assert id(block.mlp.down_proj) not in scales


def test_an_outlier_channel_costs_less_when_it_is_smoothed() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.input_layernorm.weight.data[3] = 60.0
        for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            part.weight.data[:, 3] /= 60.0
    off = {}
    with torch.no_grad():
        plain = model(IDS).logits
        for smooth in (False, True):
            with fake_quant(model, "int4", smooth=smooth, calibration=[IDS[0]] if smooth else None):
                off[smooth] = float((model(IDS).logits - plain).square().mean())
    assert off[True] < off[False]


@pytest.mark.parametrize(("name", "format"), [("llama", "nvfp4"), ("gpt2", "int4")])
def test_no_trace_and_no_data_needed(name: str, format: str) -> None:
    model = tiny_model(name)
    check_leaves_no_trace(model, lambda m: fake_quant(m, format), rng=True)


def test_what_cannot_be_done_is_one_line() -> None:
    model = tiny_model("llama")
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    )
    for method, words in (
        (fake_quant(model, "nvfp8"), "unknown format 'nvfp8' (did you mean 'nvfp4'?): nvfp4, int4"),
        (fake_quant(model, "fp16"), "unknown format 'fp16': nvfp4, int4"),
        (fake_quant(model, calibration=[]), "calibration is empty"),
        (fake_quant(model, calibration=[[]]), "calibration is empty"),
        (fake_quant(mamba, smooth=False), "recurrent state"),
    ):
        with pytest.raises(PertokenError) as caught, method:
            pass
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_model_s_own_texts_put_the_generators_of_its_device_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnCuda:
        device = torch.device("cuda")

        def get_input_embeddings(self) -> torch.nn.Embedding:
            return torch.nn.Embedding(4, 2)

    def fork_rng(devices: Any) -> Any:
        assert list(devices) == [OnCuda.device]
        raise InterruptedError  # nothing can be drawn where there is no such device

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    with pytest.raises(InterruptedError):
        quantization._own_texts(OnCuda())

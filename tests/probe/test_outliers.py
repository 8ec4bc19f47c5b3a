"""Outlier dimensions cut, rescaled and moved: what must change, what must not, and no trace."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers

from pertoken.errors import PertokenError
from pertoken.probe import (
    absorb_into_norm,
    clip_dims,
    fake_quant,
    reconstruction_error,
    rescale_dims,
    rescale_factors,
)
from pertoken.probe._anatomy import anatomy, gain
from pertoken.testing import (
    ARCHITECTURES,
    EXTRA_ARCHITECTURES,
    check_batch_invariant,
    check_leaves_no_trace,
    tiny_model,
)

ALL = [*ARCHITECTURES, *EXTRA_ARCHITECTURES]
INFINITY = float("inf")
IDS = torch.randint(1, 64, (1, 13), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def planted(name: str, dim: int, size: float, weight: float) -> Any:
    """A model with an outlier: `dim` of the stream is near `size`, norms weigh it by `weight`."""
    model = tiny_model(name)
    model.get_input_embeddings().weight.data[:, dim] = size
    for norm in anatomy(model).norms:
        shift = 1.0 if "Gemma" in type(norm).__name__ else 0.0  # Gemma stores λ - 1
        norm.weight.data[dim] = weight - shift
        if getattr(norm, "bias", None) is not None:
            norm.bias.data[dim] = 0.0
    return model


@pytest.mark.parametrize("name", ALL)
def test_the_limits_are_the_model_itself(name: str) -> None:
    model = tiny_model(name)
    plain = logits(model)
    for method in (
        clip_dims(model, [3, 7], INFINITY),
        clip_dims(model, [], 0.0),
        rescale_dims(model, [3, 7], INFINITY),
        rescale_dims(model, [3, 7], INFINITY, factors=[1.0] * len(anatomy(model).norms)),
        absorb_into_norm(model, [3, 7], by=1.0),
    ):
        with method:
            assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", ALL)
def test_absorbing_keeps_the_function_and_shrinks_the_stream(name: str) -> None:
    model = planted(name, 3, 20.0, 0.5)
    last = anatomy(model).blocks[-1]
    seen: list[torch.Tensor] = []
    handle = last.register_forward_hook(
        lambda _, __, out: seen.append(out)
    )  # of IDS, and of what `anatomy` reads
    plain = logits(model)
    with absorb_into_norm(model, [3], by=8.0):
        assert torch.equal(logits(model), plain)
    with absorb_into_norm(model, [3], by=7.0), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain, rtol=0, atol=1e-5)
    handle.remove()
    whole, small, _ = (each for each in seen if each.shape[1] == IDS.shape[1])
    assert torch.equal(small[..., 3] * 8, whole[..., 3])
    rest = [dim for dim in range(whole.shape[-1]) if dim != 3]
    assert torch.equal(small[..., rest], whole[..., rest])


@pytest.mark.parametrize("name", ALL)
def test_an_outlier_that_norms_do_not_weigh_is_a_factor_and_nothing_else(name: str) -> None:
    """Its weight is 0 in all norms: cut, all others grow; rescaled, nothing at all is lost."""
    model = planted(name, 3, 20.0, 0.0)
    plain = logits(model)
    with clip_dims(model, [3], 0.0):
        clipped = logits(model)
    with rescale_dims(model, [3], 0.0):
        rescaled = logits(model)
    torch.testing.assert_close(rescaled, plain, rtol=0, atol=1e-5)
    assert (clipped - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_rescaling_is_what_the_definition_says(name: str) -> None:
    """The norm of the cut vector, with the length of the whole one."""
    model = planted(name, 3, 20.0, 0.5)
    norm = anatomy(model).norms[0]
    weight = gain(norm)
    assert weight is not None
    x = 5 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    eps = 1e-5 if name == "gpt2" else 1e-6
    mean = x.mean(-1, keepdim=True) if name == "gpt2" else torch.zeros(2, 5, 1)
    length = ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt()
    cut = x.clone()
    cut[..., [3, 5]] = cut[..., [3, 5]].clamp(-1, 1)
    wanted = weight * (cut - mean) / length
    if name == "gpt2":
        wanted = wanted + norm.bias
    with rescale_dims(model, [3, 5], 1.0), torch.no_grad():
        torch.testing.assert_close(norm(x), wanted, rtol=1e-5, atol=1e-5)


def test_factors_are_the_lengths_without_the_outlier() -> None:
    model = planted("llama", 3, 20.0, 0.0)
    rows = [IDS[0].tolist(), [5, 6]]
    factors = rescale_factors(model, [3], rows)
    shares = []
    for row in rows:
        hidden = model.get_input_embeddings()(torch.tensor(row))[1:]
        rest = torch.cat([hidden[:, :3], hidden[:, 4:]], -1)
        shares += (rest.norm(dim=-1) / hidden.norm(dim=-1)).tolist()
    assert factors[0] == pytest.approx(sum(shares) / len(shares), rel=1e-9)
    assert len(factors) == 5
    plain = logits(model)
    with clip_dims(model, [3], 0.0):
        clipped = (logits(model) - plain).abs().mean()
    with rescale_dims(model, [3], 0.0, factors=factors):
        assert (logits(model) - plain).abs().mean() < clipped


@pytest.mark.parametrize(
    "method",
    [
        partial(clip_dims, dims=[3], at=0.5),
        partial(rescale_dims, dims=[3], at=0.5),
        partial(rescale_dims, dims=[3], factors=[0.9] * 5),
        partial(absorb_into_norm, dims=[3]),
    ],
    ids=["clip", "rescale", "constants", "absorb"],
)
def test_no_trace_and_batches_as_alone(method: Any) -> None:
    model = tiny_model("llama")
    check_leaves_no_trace(model, lambda m: method(m), rng=True)
    with method(model):
        check_batch_invariant(None, model, max_new_tokens=4)


def compiled_whole(model: Any) -> Any:
    return torch.compile(model)


def compiled_in_place(model: Any) -> Any:
    model.model.layers[1].compile()
    return model


def compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward)
    return model


@pytest.mark.parametrize("make", [compiled_whole, compiled_in_place, compiled_forward])
def test_a_compiled_model_would_run_past_the_hooks(make: Any) -> None:
    model = make(tiny_model("llama"))
    with pytest.raises(PertokenError, match=r"is compiled.*without torch\.compile"):
        clip_dims(model, [3], 0.0).__enter__()
    with pytest.raises(PertokenError, match="is compiled"):
        reconstruction_error(model, [5, 6, 7])


def test_what_cannot_be_done_is_one_line() -> None:
    model = tiny_model("llama")
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    )
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    ).eval()
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    for method, words in (
        (clip_dims(model, [32], 1.0), "dims go from 0 to 31 in this model, got 32"),
        (clip_dims(model, [3], -1.0), "at must be 0 or more"),
        (clip_dims(model, [3], float("nan")), "at must be 0 or more"),
        (rescale_dims(model, [3], factors=[1.0]), "each of the 5 norms"),
        (absorb_into_norm(model, [3], by=0.0), "by must be a number above 0"),
        (clip_dims(mamba, [3], 1.0), "recurrent state"),
        (clip_dims(bloom, [3], 1.0), "block 0 (BloomBlock) is not understood"),
        (clip_dims(broken, [3], 1.0), "block 1 of LlamaForCausalLM gives NaN"),
    ):
        with pytest.raises(PertokenError) as caught, method:
            pass
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(PertokenError, match="texts of two tokens"):
        rescale_factors(model, [3], [[5]])


@pytest.mark.parametrize(
    ("row", "words"),
    [([5, 64], "must lie in 0 … 63"), ([5] * 17, "17 tokens are more than the 16 positions")],
)
def test_texts_that_the_model_cannot_read(row: list[int], words: str) -> None:
    model = tiny_model("gpt2", max_positions=16)
    with pytest.raises(PertokenError, match=words):
        rescale_factors(model, [3], [[5, 6], row])
    with pytest.raises(PertokenError, match=words):
        fake_quant(model, calibration=[[5, 6], row]).__enter__()

"""Quantisers: every bit counted, errors bounded, the closed loop the same on both sides."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken import PertokenError
from pertoken.cache._code import Code, pack, unpack
from pertoken.cache._predictive import Predictor, cached_rows, turned_keys
from pertoken.cache._rotation import Rotation
from pertoken.cache._rows import plain_cache, plain_rows
from pertoken.cache._turboquant import codebook, rotation
from pertoken.cache.quantize import (
    KIVI,
    Int4,
    Int8,
    Predictive,
    Raw,
    TurboQuant,
    decode_cache,
    encode_cache,
    fit_predictor,
)
from pertoken.testing.models import ARCHITECTURES, tiny_model

PLAIN = [
    Raw(),
    Int8(),
    Int4(group=8),
    KIVI(bits=2, group=4, residual=8),
    KIVI(bits=4, group=4, residual=0),
    TurboQuant(bits=3),
    TurboQuant(bits=3, qjl=True),
    Predictive(step=0.5),
]


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def texts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (count, length), generator=drawn).tolist()


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=40))
def test_packing_gives_codes_back_in_the_fewest_whole_bytes(bits: int, numbers: list[int]) -> None:
    codes = torch.tensor([number % 2**bits for number in numbers], dtype=torch.long)
    packed = pack(codes, bits)
    assert packed.numel() == math.ceil(len(numbers) * bits / 8)
    assert torch.equal(unpack(packed, bits, len(numbers)), codes)


@pytest.mark.parametrize("quantizer", PLAIN, ids=lambda quantizer: quantizer.name)
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_bits_are_those_of_the_bytes_from_which_a_code_is_decoded(
    quantizer: Any, kind: Any
) -> None:
    x = tensor(2, 2, 19, 8)
    code = quantizer.encode(x, kind)
    written = {name: part.numpy().tobytes() for name, part in code.parts.items()}
    assert code.bits == 8 * sum(map(len, written.values()))
    # A decoder that has only the bytes, and the few fields that are not counted:
    parts = {
        name: torch.from_numpy(np.frombuffer(data, code.parts[name].numpy().dtype).copy()).view(
            code.parts[name].shape
        )
        for name, data in written.items()
    }
    again = Code(parts, code.shape, code.dtype, code.kind)
    assert torch.equal(quantizer.decode(again), quantizer.decode(code))
    assert quantizer.decode(code).shape == x.shape
    assert quantizer.decode(code).dtype == x.dtype


@pytest.mark.parametrize("quantizer", PLAIN, ids=lambda quantizer: quantizer.name)
def test_a_single_row_passes(quantizer: Any) -> None:
    x = tensor(1, 2, 1, 8)
    for kind in ("keys", "values"):
        assert quantizer.decode(quantizer.encode(x, kind)).shape == x.shape


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e-3, 1.0, 300.0]))
def test_grouped_errors_stay_within_half_a_step_of_their_group(seed: int, size: float) -> None:
    x = tensor(1, 2, 5, 16, seed=seed) * size
    for quantizer, levels in ((Int8(group=8), 255), (Int4(group=8), 15)):
        found = quantizer.decode(quantizer.encode(x))
        groups, errors = x.reshape(-1, 8), (found - x).reshape(-1, 8).abs()
        spread = (groups.amax(1) - groups.amin(1)) / levels
        # Offset and step are float16: ten binary places, or 2^-24 where they are small.
        rounding = 2**-10 * (groups.abs().amax(1) + levels * spread) + levels * 2**-24
        assert bool((errors.amax(1) <= spread / 2 + rounding).all())


def test_int_bits_per_value_are_the_hand_count() -> None:
    x = tensor(1, 2, 10, 64)
    assert Int8(group=32).encode(x).bits / x.numel() == 8 + 32 / 32
    assert Int4(group=32).encode(x).bits / x.numel() == 4 + 32 / 32
    assert Int4(group=64).encode(x).bits / x.numel() == 4 + 32 / 64
    assert TurboQuant(bits=3).encode(x).bits / x.numel() == 3 + 16 / 64
    assert TurboQuant(bits=3, qjl=True).encode(x).bits / x.numel() == 3 + 32 / 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("time", [3, 8, 21, 24])
def test_newest_rows_of_kivi_are_bit_equal(dtype: torch.dtype, time: int) -> None:
    quantizer, x = KIVI(bits=2, group=4, residual=8), tensor(1, 2, time, 8, dtype=dtype)
    newest = {"keys": time % 8, "values": min(time, 8)}
    for kind, rows in newest.items():
        found = quantizer.decode(quantizer.encode(x, kind))  # type: ignore[arg-type]
        assert torch.equal(found[:, :, time - rows :], x[:, :, time - rows :])
        old = time - rows
        assert not old or not torch.equal(found[:, :, :old], x[:, :, :old])


def test_kivi_groups_keys_over_tokens_and_values_over_channels() -> None:
    """An outlier spoils only its own group: its channel among keys, its token among values."""
    quantizer, clean = KIVI(bits=4, group=4, residual=0), tensor(1, 1, 8, 8)
    spoilt = clean.clone()
    spoilt[0, 0, 2, 5] = 100.0
    for kind in ("keys", "values"):
        before, after = (quantizer.decode(quantizer.encode(x, kind)) for x in (clean, spoilt))  # type: ignore[arg-type]
        changed = (before != after)[0, 0].nonzero().tolist()
        allowed = {(t, 5) for t in range(4)} if kind == "keys" else {(2, c) for c in range(4, 8)}
        assert {tuple(place) for place in changed} <= allowed
        assert len(changed) > 1


@pytest.mark.parametrize("dim", [8, 64, 256])
def test_rotation_is_orthogonal_and_of_its_seed(dim: int) -> None:
    turn = rotation(dim, 0)
    assert torch.allclose(turn @ turn.T, torch.eye(dim), atol=1e-5)
    assert torch.equal(turn, rotation(dim, 0))
    assert not torch.allclose(turn, rotation(dim, 1))


@pytest.mark.parametrize(("dim", "bits"), [(3, 2), (8, 3), (64, 2)])
def test_codebook_is_the_numerical_optimum_of_the_coordinate_law(dim: int, bits: int) -> None:
    from scipy.integrate import quad
    from scipy.optimize import minimize

    scale = math.gamma(dim / 2) / (math.sqrt(math.pi) * math.gamma((dim - 1) / 2))

    def distortion(levels: Any) -> float:
        levels = np.sort(levels)
        edges = [-1.0, *((levels[1:] + levels[:-1]) / 2), 1.0]
        return sum(
            quad(lambda x, c=c: (x - c) ** 2 * scale * (1 - x * x) ** ((dim - 3) / 2), low, high)[0]
            for c, low, high in zip(levels, edges[:-1], edges[1:], strict=True)
        )

    ours = np.array(codebook(dim, bits))
    start = np.quantile(np.linspace(-1, 1, 101), (np.arange(2**bits) + 0.5) / 2**bits)
    best = minimize(distortion, start / math.sqrt(dim), method="BFGS", options={"gtol": 1e-9})
    assert distortion(ours) <= best.fun * (1 + 1e-6)
    assert np.allclose(ours, np.sort(best.x), atol=2e-3)
    assert np.allclose(ours, -ours[::-1])


@pytest.mark.parametrize(("bits", "paper"), [(1, 0.36), (2, 0.117), (3, 0.03), (4, 0.009)])
def test_distortion_of_turboquant_is_the_papers(bits: int, paper: float) -> None:
    """Theorem 1's figures for 1 to 4 bits, relative squared error; printed to two digits."""
    x = tensor(1, 1, 2000, 128)
    quantizer = TurboQuant(bits=bits)
    error = (quantizer.decode(quantizer.encode(x)) - x).square().sum() / x.square().sum()
    assert float(error) == pytest.approx(paper, rel=0.16)


def test_qjl_makes_inner_products_unbiased() -> None:
    """Mean over 150 rotations; the error of the mean is given by their own spread."""
    x = tensor(1, 1, 1, 16, seed=1)
    true = float(x.square().sum())

    def mean_and_error(qjl: bool) -> tuple[float, float]:
        found = [
            float((q.decode(q.encode(x)) * x).sum())
            for q in (TurboQuant(bits=2, seed=seed, qjl=qjl) for seed in range(150))
        ]
        return float(np.mean(found)), float(np.std(found)) / math.sqrt(150)

    mean, error = mean_and_error(qjl=True)
    assert abs(mean - true) < 4.5 * error  # wrong by chance once in 150,000
    biased, error = mean_and_error(qjl=False)
    assert abs(biased - true) > 4.5 * error


def test_predictor_of_zeros_is_the_plain_quantiser() -> None:
    x, step = tensor(1, 2, 30, 8), 0.4
    found = Predictive(step=step).decode(Predictive(step=step).encode(x))
    spread = x.transpose(1, 2).flatten(2).std((0, 1), correction=0).half().float()
    width = (spread * step).view(2, 1, 8)
    assert torch.equal(found, (x / width).round() * width)

    model, ids = tiny_model("llama", dtype=torch.float32), torch.tensor(texts(1, 30))
    rows = cached_rows(model, ids)
    streams, size = 4, rows[0][0].shape[1] * rows[0][0].shape[3]
    zeros = Predictor(
        torch.zeros(streams, size, size),
        torch.zeros(streams, 32, size),
        torch.zeros(streams, size),
        torch.ones(streams, size),
    )
    quantizer = Predictive(step=step, predictor=zeros)
    cache = decode_cache(
        quantizer, model, ids, encode_cache(quantizer, model, ids, plain_cache(rows))
    )
    for (_, values), layer in zip(rows, cache.layers, strict=True):
        assert torch.equal(layer.values, (values / step).round() * step)


def test_closed_loop_gives_the_decoder_what_the_encoder_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    quantizer = Predictive(step=0.7, predictor=fit_predictor(model, texts(4, 100)))
    seen: list[torch.Tensor] = []
    walk = Predictive._walk

    def spy(self: Predictive, *args: Any) -> torch.Tensor:
        seen.append(walk(self, *args))
        return seen[-1]

    monkeypatch.setattr(Predictive, "_walk", spy)
    ids = torch.tensor(texts(2, 50, seed=1))  # two rows at once
    rows = cached_rows(model, ids)
    code = quantizer.encode_cache(model, ids, rows)
    quantizer.decode_cache(model, ids, code)
    encoder, decoder = seen
    assert torch.equal(encoder, decoder)
    # Errors do not grow along the text: each row is within half a step of the truth.
    true = torch.stack([values.transpose(1, 2).flatten(2) for _, values in rows])
    errors = (decoder[1::2] - true).abs() / (quantizer.predictor.scale[1::2] * 0.7)[:, None, None]  # type: ignore[union-attr]
    assert float(errors.max()) <= 0.5 + 1e-3


def test_the_future_changes_nothing_of_the_past() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    quantizer = Predictive(step=0.5, predictor=fit_predictor(model, texts(3, 80)))
    ids = torch.tensor(texts(1, 40, seed=2))
    rows = cached_rows(model, ids)
    other = [(k.clone(), v.clone()) for k, v in rows]
    for keys, values in other:
        keys[:, :, 25:] += 3
        values[:, :, 25:] -= 3
    changed = ids.clone()
    changed[:, 25:] = 1
    first, second = (
        quantizer.decode_cache(model, text, quantizer.encode_cache(model, text, its))
        for text, its in ((ids, rows), (changed, other))
    )
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a[:, :, :25], b[:, :, :25])
            assert not torch.equal(a[:, :, 25:], b[:, :, 25:])


def test_a_text_that_is_predicted_costs_fewer_bits() -> None:
    """The values of layer 0 are linear in the normed embedding: the predictor must find that."""
    model = tiny_model("llama", layers=1, dtype=torch.float32)
    ids = torch.tensor(texts(1, 60, seed=3))
    rows = cached_rows(model, ids)
    fitted = fit_predictor(model, texts(6, 200), ridge=1e-6)
    spread = rows[0][1].std()
    assert float(fitted.scale[1].max()) < 0.05 * float(spread)
    keys = rows[0][0].std()  # before the rotation the same holds for keys
    assert float(fitted.scale[0].max()) < 0.05 * float(keys)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_without_rotation_are_those_of_the_projection(architecture: str) -> None:
    """Same token, same key at every position of layer 0 (GPT-2 and OPT add their positions)."""
    model = tiny_model(architecture, dtype=torch.float32)
    ids = torch.full((1, 12), 7)
    rows, rotation = cached_rows(model, ids), Rotation(model, "this")
    for layer, (keys, _) in enumerate(rows):
        plain = turned_keys(rotation, keys, layer, back=True)
        assert torch.allclose(turned_keys(rotation, plain, layer), keys, atol=1e-4)
    if architecture in ("gpt2", "opt"):
        assert torch.equal(turned_keys(rotation, rows[0][0], 0, back=True), rows[0][0])
        return
    assert not torch.allclose(rows[0][0], rows[0][0][:, :, :1], atol=1e-2)
    plain = turned_keys(rotation, rows[0][0], 0, back=True)
    assert torch.allclose(plain, plain[:, :, :1].expand_as(plain), atol=1e-4)


def test_gemma_layers_turn_back_by_the_base_of_their_own_type() -> None:
    model = tiny_model("gemma3", dtype=torch.float32)
    keys, rotation = tensor(1, 2, 12, 8), Rotation(model, "this")
    one, other = (turned_keys(rotation, keys, layer, back=True) for layer in (0, 1))
    assert not torch.allclose(one, other, atol=1e-2)


@pytest.mark.parametrize("architecture", ["gemma3", "gpt-neox", "phi", "gpt2"])
def test_fine_steps_give_the_cache_back(architecture: str) -> None:
    model = tiny_model(architecture, dtype=torch.float32)
    quantizer = Predictive(step=1e-2, predictor=fit_predictor(model, texts(2, 60)))
    ids = torch.tensor(texts(1, 30, seed=1))
    rows = cached_rows(model, ids)
    codes = encode_cache(quantizer, model, ids, plain_cache(rows))
    for pair, layer in zip(rows, decode_cache(quantizer, model, ids, codes).layers, strict=True):
        for true, found in zip(pair, (layer.keys, layer.values), strict=True):
            assert float((found - true).norm() / true.norm()) < 2e-2


def test_residuals_beyond_the_range_are_caught_up_with() -> None:
    x = torch.zeros(1, 1, 60, 4)
    x[0, 0, 30] = 1e4
    quantizer = Predictive(step=1e-4)
    assert torch.isfinite(quantizer.decode(quantizer.encode(x))).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Int4(group=0), "group must be 1 or more"),
        (lambda: Int4(group=5).encode(tensor(1, 1, 2, 8)), "take group=4"),
        (lambda: KIVI(bits=3), "2 or 4"),
        (lambda: KIVI(bits=2, group=32, residual=40), "multiple of group"),
        (lambda: TurboQuant(bits=0), "1 to 8"),
        (lambda: TurboQuant(bits=1, qjl=True), "2 to 8"),
        (lambda: TurboQuant(bits=2).encode(tensor(1, 1, 2, 1)), "2 or more numbers"),
        (lambda: Predictive(step=0), "step must be above 0"),
        (lambda: Raw().encode(tensor(2, 2)), "batch, heads, time, dim"),
        (lambda: Raw().encode(torch.full((1, 1, 1, 4), 1e6)), "float16"),
        (lambda: Predictive().encode(torch.full((1, 1, 1, 4), math.nan)), "NaN"),
        (lambda: Predictive().encode(tensor(1, 1, 0, 4)), "no rows to code"),
        (lambda: fit_predictor(tiny_model("llama"), []), "needs texts"),
        (lambda: fit_predictor(tiny_model("llama"), texts(1, 49)), "49 tokens.*49 weights"),
        (lambda: plain_rows(plain_cache([])), "the cache is empty"),
    ],
)
def test_errors_name_the_mend(call: Any, message: str) -> None:
    with pytest.raises(PertokenError, match=message):
        call()


def test_a_predictor_is_refused_by_another_model_and_by_single_tensors() -> None:
    model, other = tiny_model("llama", dtype=torch.float32), tiny_model("llama", layers=3)
    quantizer = Predictive(step=0.5, predictor=fit_predictor(model, texts(2, 40)))
    ids = torch.tensor(texts(1, 10))
    with pytest.raises(PertokenError, match=r"4 streams of 16.*has 6 of 16"):
        encode_cache(quantizer, other, ids, plain_cache(cached_rows(other, ids)))
    with pytest.raises(PertokenError, match="use encode_cache"):
        quantizer.encode(tensor(1, 2, 3, 8))


def test_caches_that_dropped_rows_are_refused() -> None:
    from transformers import DynamicCache

    model = tiny_model("mistral", dtype=torch.float32)
    ids = torch.tensor(texts(1, 20))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(PertokenError, match="holds 7 of 20 rows: use DynamicCache"):
        encode_cache(Raw(), model, ids, cache)
    with pytest.raises(PertokenError, match="20 rows where 5 tokens"):
        encode_cache(Raw(), model, ids[:, :5], plain_cache(cached_rows(model, ids)))

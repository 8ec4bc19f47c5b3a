"""Rate and distortion: an untouched cache costs nothing, sums join, the paper's ratio comes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pertoken import PertokenError
from pertoken.cache._code import Code, Kind
from pertoken.cache._predictive import cached_rows
from pertoken.cache._rows import plain_cache
from pertoken.cache.quantize import Int4, Int8, Predictive, Raw, TurboQuant, fit_predictor
from pertoken.cache.rate_distortion import (
    Tally,
    components,
    measure,
    paper_ratio,
    rate_distortion,
    storage,
)
from pertoken.testing.models import ARCHITECTURES, tiny_model


class Untouched:
    """Stores the tensor itself."""

    name = "untouched"

    def encode(self, tensor: torch.Tensor, kind: Kind = "keys") -> Code:
        return Code({"rows": tensor}, tuple(tensor.shape), tensor.dtype, kind)

    def decode(self, code: Code) -> torch.Tensor:
        return code.parts["rows"]


class Nothing(Untouched):
    """Stores nothing and gives zeros back."""

    name = "nothing"

    def encode(self, tensor: torch.Tensor, kind: Kind = "keys") -> Code:
        return Code({}, tuple(tensor.shape), tensor.dtype, kind)

    def decode(self, code: Code) -> torch.Tensor:
        return torch.zeros(code.shape, dtype=code.dtype)


def texts(count: int, length: int) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(1, 64, (count, length), generator=drawn).tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_untouched_cache_scores_exactly_zero(architecture: str) -> None:
    model = tiny_model(architecture)
    tally = measure(model, texts(1, 30)[0], [Untouched()])["untouched"]
    assert tally.key_error == tally.value_error == tally.attention_error == tally.kl == 0.0
    assert tally.agree == tally.tokens == 15
    assert len(tally.attention) == 2
    assert tally.bits_per_value == 64


def test_a_cache_of_zeros_scores_as_broken() -> None:
    found = measure(tiny_model("llama"), texts(1, 40)[0], [Nothing(), Int8()])
    broken, fine = found["nothing"], next(t for name, t in found.items() if name != "nothing")
    assert broken.key_error == broken.value_error == 1.0
    assert broken.bits == 0
    assert broken.attention_error > 0.2
    assert broken.kl_per_token > 100 * fine.kl_per_token > 0


def test_kl_and_errors_are_those_of_two_plain_forwards() -> None:
    model, text, quantizer = tiny_model("llama"), texts(1, 24)[0], TurboQuant(bits=2)
    tally = measure(model, text, [quantizer], context=10)[quantizer.name]
    ids = torch.tensor([text])
    rows = cached_rows(model, ids[:, :10])
    coded = [tuple(quantizer.decode(quantizer.encode(x)) for x in pair) for pair in rows]
    laws = []
    for cache in (plain_cache(rows), plain_cache(coded)):  # type: ignore[arg-type]
        with torch.no_grad():
            laws.append(model(ids[:, 10:], past_key_values=cache).logits[0].log_softmax(-1))
    kl = torch.nn.functional.kl_div(laws[1], laws[0], log_target=True, reduction="sum") / 14
    assert tally.kl_per_token == pytest.approx(float(kl), rel=1e-4)
    errors = sum(float((a[0] - b[0]).square().sum()) for a, b in zip(rows, coded, strict=True))
    sizes = sum(float(a[0].square().sum()) for a in rows)
    assert tally.key_error == pytest.approx((errors / sizes) ** 0.5)


def test_tallies_join_by_sums_and_survive_json() -> None:
    model, two = tiny_model("llama"), texts(2, 30)
    quantizer = Int4(group=8)
    joined = rate_distortion(model, two, [quantizer]).tallies[quantizer.name]
    single = [measure(model, text, [quantizer])[quantizer.name] for text in two]
    single = [Tally(**json.loads(json.dumps(tally.to_dict()))) for tally in single]
    both = single[0] + single[1]
    assert joined.bits == both.bits
    assert joined.attention_error == both.attention_error
    assert joined.kl == both.kl
    assert min(t.key_error for t in single) < both.key_error < max(t.key_error for t in single)


def test_more_bits_mean_less_error_and_the_table_says_so() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    fitted = fit_predictor(model, texts(4, 100))
    quantizers: list[Any] = [TurboQuant(bits=bits) for bits in (4, 2, 3)]
    quantizers += [Predictive(step=step, predictor=fitted) for step in (0.2, 1.0)] + [Raw()]
    found = rate_distortion(model, texts(2, 40), quantizers)
    turbo = [t for name, t in found.tallies.items() if name.startswith("Turbo")]
    assert [t.bits_per_value for t in turbo] == sorted(t.bits_per_value for t in turbo)
    for figure in ("key_error", "value_error", "attention_error"):
        errors = [getattr(t, figure) for t in turbo]
        assert errors == sorted(errors, reverse=True)
    lines = found.table().splitlines()
    assert len(lines) == 7
    assert "attention" in lines[0]
    assert lines[-1].startswith("raw, 16 bits")
    assert set(found.to_dict()["raw, 16 bits"]) >= {"bits_per_value", "kl_per_token"}


def test_measuring_leaves_no_hook_behind() -> None:
    model = tiny_model("llama")
    measure(model, texts(1, 10)[0], [Raw()])
    assert not any(module._forward_hooks for module in model.modules())


def test_components_are_those_of_a_cache() -> None:
    for architecture in ARCHITECTURES:
        model = tiny_model(architecture)
        rows = cached_rows(model, torch.tensor([[5]]))
        assert components(model.config) == sum(t.numel() for pair in rows for t in pair)


def test_the_papers_ratio_needs_64_heads_and_three_rows_say_why() -> None:
    from transformers import LlamaConfig

    shape = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
    paper = paper_ratio(LlamaConfig(**shape, num_key_value_heads=64), 3, 4.3)
    real = paper_ratio(LlamaConfig(**shape, num_key_value_heads=8), 3, 4.3)
    assert round(paper) == 914_456
    assert paper / real == pytest.approx(8)
    rows = storage(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
        ),
        bits_per_token=4.3,
        bits_per_component=3,
    )
    assert rows["quantised vectors"] == 34_560
    assert round(rows["quantised vectors"] / rows["raw ids"]) == 2_218
    assert round(rows["quantised vectors"] / rows["entropy-coded ids"]) == 8_037


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: measure(m, [1], [Raw()]), "none on one side"),
        (lambda m: measure(m, [1, 2], [Raw()], context=2), "none on one side of 2"),
        (lambda m: rate_distortion(m, [[1, 2]], [Raw(), Raw()]), "have one name"),
    ],
)
def test_errors_name_the_mend(call: Any, message: str) -> None:
    with pytest.raises(PertokenError, match=message):
        call(tiny_model("llama"))

"""Caches by name: every name makes an empty cache that decodes, wrong names suggest the nearest."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from pertoken.cache.fidelity import cache_fidelity
from pertoken.cache.named import CACHES, UNBOUNDED, make_cache
from pertoken.errors import PertokenError
from pertoken.testing import tiny_model

MODULES = {
    "kv-direct": "kv_direct",
    "window": "window",
    "streaming-llm": "streaming_llm",
    "h2o": "h2o",
    "snapkv": "snapkv",
    "tova": "tova",
}
PROMPT = [5, 9, 13, 22, 41, 7, 30, 11]


def module_of(name: str) -> str | None:
    return MODULES.get(name.partition(":")[0])


@pytest.mark.filterwarnings("ignore:.*per_layer.*")
@pytest.mark.parametrize("name", list(CACHES))
def test_every_name_makes_a_new_cache_that_decodes(name: str) -> None:
    module = module_of(name)
    if module is not None and find_spec(f"pertoken.cache.{module}") is None:
        pytest.skip(f"pertoken.cache.{module} is not there yet")
    model = tiny_model("llama")
    first, second = (make_cache(name, model, 8) for _ in range(2))
    assert isinstance(first, Cache)
    assert first is not second
    assert int(first.get_seq_length()) == 0
    # Long enough that bookkeeping is small beside what an evicting cache does not hold.
    found = cache_fidelity(
        model, lambda: make_cache(name, model, 8), [PROMPT * 3], max_new_tokens=24
    )
    if name == "full":
        assert set(found.kl) == {0.0}
    elif name.startswith("kv-direct"):
        assert found.max_kl < 1e-12
        assert found.token_match == 1
    elif name in ("window", "streaming-llm", "h2o", "snapkv", "tova"):
        assert found.max_kl > 1e-6
        assert found.held_bytes < found.full_peak_bytes


def test_only_names_without_a_module_are_unbounded() -> None:
    assert {name for name in CACHES if module_of(name) is None} == UNBOUNDED


@pytest.mark.parametrize(
    ("name", "budget", "message"),
    [
        ("kv-drect", 8, "unknown cache 'kv-drect' .*did you mean 'kv-direct'"),
        ("streaming", 8, "did you mean 'streaming-llm'"),
        ("", 8, "unknown cache ''; known: full, fp8, kv-direct"),
        ("full", 0, "a whole number from 1 on, got 0"),
        ("full", True, "got True"),
        ("full", 2.5, r"got 2\.5"),
    ],
)
def test_wrong_names_and_budgets(name: str, budget: Any, message: str) -> None:
    with pytest.raises(PertokenError, match=message):
        make_cache(name, tiny_model("llama"), budget)


def test_full_knows_the_layers_of_the_model_and_fp8_refuses_windows() -> None:
    model = tiny_model("gemma3")
    cache = make_cache("full", model, 1)
    assert type(cache) is DynamicCache
    assert [layer.is_sliding for layer in cache.layers] == [True, False]
    with pytest.raises(PertokenError, match="fp8 cannot hold Gemma3ForCausalLM"):
        make_cache("fp8", model, 1)
    assert torch.is_grad_enabled()

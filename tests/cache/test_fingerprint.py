"""A model's fingerprint: the same for the same weights, another for any other."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pertoken.cache import fingerprint
from pertoken.cache.fingerprint import model_fingerprint, model_name
from pertoken.testing import ARCHITECTURES, tiny_model


def test_equal_models_have_one_and_all_others_another() -> None:
    found = {model_fingerprint(tiny_model(name)) for name in ARCHITECTURES}
    assert len(found) == len(ARCHITECTURES)
    llama = model_fingerprint(tiny_model("llama"))
    assert llama == model_fingerprint(tiny_model("llama"))
    assert llama == model_fingerprint(tiny_model("llama", attention="eager"))
    assert llama != model_fingerprint(tiny_model("llama", seed=1))
    assert llama != model_fingerprint(tiny_model("llama", dtype=torch.float32))
    assert llama != model_fingerprint(tiny_model("llama", max_positions=1024))


def test_the_smallest_change_of_a_weight_is_seen() -> None:
    model = tiny_model("llama")
    seen = {model_fingerprint(model)}
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(1e9, dtype=torch.float64))
    seen.add(model_fingerprint(model))
    weight.data.mul_(1.5)  # not counted in the weight's version
    seen.add(model_fingerprint(model))
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        model.model.layers[0].mlp.up_proj.weight.flip(0)
    )
    seen.add(model_fingerprint(model))
    model.config.rope_parameters["rope_theta"] = 123.0
    seen.add(model_fingerprint(model))
    assert len(seen) == 5


def test_what_does_not_touch_keys_and_values_does_not_count(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = model_fingerprint(model)
    model.config.eos_token_id = 7
    model.config._name_or_path = "/home/someone/models/tiny"
    assert model_fingerprint(model) == before
    assert model_name(model) == "tiny"
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert model_fingerprint(again) == before


def test_it_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model("llama"), list[Any]()
    plain = fingerprint._fingerprint

    def counted(model: Any) -> str:
        calls.append(model)
        return plain(model)

    monkeypatch.setattr(fingerprint, "_fingerprint", counted)
    assert model_fingerprint(model) == model_fingerprint(model)
    assert len(calls) == 1

"""What ways of decoding refuse: one line that names both sides, before the first forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, Phi3Config, Phi3ForCausalLM

from pertoken.cache import make_cache
from pertoken.decode import (
    AWRS,
    Balanced,
    CautiousDecoding,
    Constrained,
    ConstraintMask,
    Goose,
    Lookahead,
    Plain,
    SuffixTree,
)
from pertoken.errors import PertokenError
from pertoken.testing import MockModel, tiny_model

IDS = torch.tensor([[1, 2, 3, 5, 6, 1, 2, 3]])
TWO = torch.cat((IDS, IDS.flip(1)))


class Even:
    def accepts(self, ids: list[int]) -> bool:
        return all(token % 2 == 0 for token in ids)

    def complete(self, ids: list[int]) -> bool:
        return True


def said(run: Callable[[], Any], model: Any) -> str:
    """The line of a refusal; nothing may have been read before."""
    handle = model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    try:
        with pytest.raises(PertokenError) as error:
            run()
    finally:
        handle.remove()
    assert "\n" not in str(error.value)
    return str(error.value)


def write(model: Any, method: Any, ids: torch.Tensor = IDS, **options: Any) -> Any:
    run = {"do_sample": isinstance(method, AWRS), "max_new_tokens": 8, "top_k": 0, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=method, **run)


@pytest.mark.parametrize("name", ["h2o", "window", "snapkv", "fp8"])
@pytest.mark.parametrize(
    "method", [Goose(budget="auto"), Balanced(k=3), Plain(), Constrained(Goose(), Even())]
)
def test_a_cache_that_cannot_drop_drafts(name: str, method: Any) -> None:
    model = tiny_model("llama", vocab_size=16)
    cache = make_cache(name, model, 8)
    message = said(lambda: write(model, method, past_key_values=cache), model)
    assert type(getattr(method, "drafter", method)).__name__ in message
    assert type(cache).__name__ in message


@pytest.mark.parametrize("method", [Goose(), AWRS(Even())])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("prompt_lookup_num_tokens", 3),
        ("num_beams", 2),
        ("penalty_alpha", 0.6),
        ("dola_layers", "low"),
        ("output_scores", True),
        ("output_hidden_states", True),
        ("use_cache", False),
    ],
)
def test_settings_that_a_method_would_ignore(method: Any, setting: str, value: Any) -> None:
    model = tiny_model("llama", vocab_size=16)
    options = {setting: value, "return_dict_in_generate": True, "top_k": 4}
    message = said(lambda: write(model, method, **options), model)
    assert type(method).__name__ in message
    assert setting in message


@pytest.mark.parametrize("method", [Goose(), AWRS(Even())])
def test_a_cache_of_another_text(method: Any) -> None:
    model = tiny_model("llama", vocab_size=16)
    whole, short = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model(IDS, past_key_values=whole)
        model(IDS[:, :4], past_key_values=short)
    message = said(lambda: write(model, method, past_key_values=whole), model)
    assert f"{type(method).__name__} has nothing to read: the cache holds 8 tokens" in message
    message = said(lambda: write(model, method, TWO, past_key_values=short), model)
    assert f"{type(method).__name__} was given 2 rows and a DynamicCache of 1" in message


def test_guidance_goes_with_a_drafter_in_one_row_and_not_in_a_batch() -> None:
    """The processor holds one cache for all rows, which a drafter decodes at different speeds."""
    model = tiny_model("llama", vocab_size=16)
    options: dict[str, Any] = {"guidance_scale": 3.0}
    expected = write(model, None, **options)
    for method in (Goose(), Balanced(k=3)):
        assert torch.equal(write(model, method, **options), expected)
    message = said(lambda: write(model, Goose(), TWO, **options), model)
    assert "Goose" in message
    assert "guidance_scale" in message


def test_awrs_takes_no_drafter_for_a_constraint_or_a_proposal() -> None:
    with pytest.raises(PertokenError, match=r"accepts\(ids\) and complete\(ids\); Constrained"):
        AWRS(Constrained(Goose(), Even()))  # type: ignore[arg-type]
    for wrong in (Goose(), Constrained(Goose(), Even()), AWRS(Even()), [Goose()], 3):
        kind = wrong[0] if isinstance(wrong, list) else wrong
        with pytest.raises(PertokenError, match=f"not {type(kind).__name__}"):
            AWRS(Even(), proposal=wrong)


def test_awrs_returns_a_dict_where_one_is_asked_for() -> None:
    model = MockModel([[0.4, 0.3, 0.2, 0.1]] * 4)
    torch.manual_seed(0)
    found = write(model, AWRS(Even()), IDS % 4, return_dict_in_generate=True)
    torch.manual_seed(0)
    assert torch.equal(found.sequences, write(model, AWRS(Even()), IDS % 4))
    assert found.past_key_values.get_seq_length() == found.sequences.shape[1] - 1


def test_a_mask_leaves_a_row_alone_that_was_given_up() -> None:
    """A row in a dead end goes on as padding, which the other processors are shown too."""

    class Ends(Even):
        """Two tokens at most where the first is 2."""

        def accepts(self, ids: list[int]) -> bool:
            return super().accepts(ids) and (ids[:1] != [2] or len(ids) < 3)

        def complete(self, ids: list[int]) -> bool:
            return False

    model = MockModel([[0.4, 0.1, 0.4, 0.1]] * 4)
    sampler = AWRS(Ends())
    torch.manual_seed(0)
    mask = ConstraintMask(Even(), None)
    ids = write(model, sampler, (IDS % 4).repeat(8, 1), logits_processor=[mask])
    assert any(weight == -torch.inf for weight in sampler.log_weights)
    assert any(weight > -torch.inf for weight in sampler.log_weights)
    assert ids.shape[1] == IDS.shape[1] + 8


LOOPS = [Plain(), AWRS(Even()), CautiousDecoding(punctuation=[3])]


@pytest.mark.parametrize("method", LOOPS, ids=lambda method: type(method).__name__)
def test_inputs_beside_the_text(method: Any) -> None:
    model = tiny_model("llama", vocab_size=16)
    run: dict[str, Any] = {
        "logits_processor": None,
        "stopping_criteria": None,
        "generation_config": prepared(model, method),
        "attention_mask": torch.ones_like(IDS),
    }
    images = torch.zeros(1, 3, 4, 4)
    message = said(lambda: method(model, IDS, pixel_values=images, **run), model)
    assert "decodes text alone, and pixel_values was given" in message
    embeds = torch.zeros(1, 8, 32)
    message = said(lambda: method(model, IDS, inputs_embeds=embeds, **run), model)
    assert "pass input_ids instead of inputs_embeds" in message
    message = said(lambda: method(model, IDS, token_type_ids=torch.ones_like(IDS), **run), model)
    assert "token_type_ids was given" in message
    padded = {**run, "attention_mask": (torch.arange(8) < 5).long()[None]}
    message = said(lambda: method(model, IDS, **padded), model)
    assert "padded on the right" in message
    if not isinstance(method, AWRS):  # which needs no token to begin
        empty = {**run, "attention_mask": torch.zeros_like(IDS)}
        message = said(lambda: method(model, IDS, **empty), model)
        assert "a row of the prompt is padding alone" in message


def prepared(model: Any, method: Any) -> Any:
    config = GenerationConfig(do_sample=isinstance(method, AWRS), max_length=12)
    config._eos_token_tensor = config._pad_token_tensor = None
    return config


@pytest.mark.parametrize("method", LOOPS, ids=lambda method: type(method).__name__)
def test_a_text_behind_the_switch_of_its_rotations(method: Any) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=12,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
        pad_token_id=0,
        eos_token_id=None,
    )
    model = Phi3ForCausalLM(config).eval()
    message = said(lambda: write(model, method), model)
    assert "rotates texts of more than 12 tokens by other factors" in message
    assert write(model, method, max_new_tokens=4).shape[1] == 12


@pytest.mark.parametrize(
    "make", [Goose, Balanced, SuffixTree, Lookahead], ids=lambda make: make.__name__
)
def test_what_was_learned_of_another_vocabulary(make: Any, tmp_path: Path) -> None:
    drafter, other = make(keep=True), tiny_model("llama", vocab_size=8)
    write(tiny_model("llama", vocab_size=16), drafter)
    drafter.save(tmp_path / "kept.json")
    loaded = make()
    loaded.load(tmp_path / "kept.json")
    for one in (drafter, loaded):
        message = said(lambda one=one: write(other, one), other)
        assert "vocabulary of 16 tokens, the model has 8" in message
        one.reset()
        assert write(other, one).shape[1] == 16

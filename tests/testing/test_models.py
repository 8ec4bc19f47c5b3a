"""The tiny models: varied text, clear choices, no trace on the global generator."""

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, EXTRA_ARCHITECTURES, tiny_model

ALL = (*ARCHITECTURES, *EXTRA_ARCHITECTURES)


def prompts(rows: int = 4, length: int = 12, vocab: int = 64) -> torch.Tensor:
    return torch.randint(1, vocab, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ALL)
def test_greedy_text_varies_and_its_choices_are_clear(architecture: str) -> None:
    ids = prompts()
    out = tiny_model(architecture).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=40,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new = out.sequences[:, ids.shape[1] :]
    assert new.shape == (4, 40), "a stop id is set"
    assert min(len(set(row.tolist())) for row in new) >= 5
    assert len({tuple(row.tolist()) for row in new}) == 4, "the prompt does not matter"
    top = torch.stack(out.logits, 1).topk(2, dim=-1).values
    gaps = top[..., 0] - top[..., 1]
    assert gaps.median() > 0.3
    assert gaps.min() > 1e-5, "a close call that float64 noise could not decide but float32 might"


@pytest.mark.parametrize("architecture", ALL)
def test_far_context_matters(architecture: str) -> None:
    # A model that only looks at its last token would hide every bug in masks and positions.
    model, ids = tiny_model(architecture), prompts(rows=1)
    other = ids.clone()
    other[0, -4] = (other[0, -4] + 1) % 63 + 1
    change = (model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max()
    assert change > 0.05


@pytest.mark.parametrize("architecture", ["gemma3", "mistral", "qwen3-sliding"])
def test_windows_are_on(architecture: str) -> None:
    layers = 1 if architecture == "mistral" else 2
    model, ids = tiny_model(architecture, layers=layers, sliding_window=8), prompts(rows=1)
    cache = model(ids, use_cache=True).past_key_values
    assert any(getattr(layer, "is_sliding", False) for layer in cache.layers)
    if architecture == "mistral":
        other = ids.clone()
        other[0, 2] = (other[0, 2] + 1) % 63 + 1
        torch.testing.assert_close(model(ids).logits[0, -1], model(other).logits[0, -1])


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "mistral", "phi"])
def test_heads_are_grouped(architecture: str) -> None:
    config = tiny_model(architecture).config
    assert config.num_attention_heads > config.num_key_value_heads


def test_seed_decides_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    a, b, c = tiny_model("llama"), tiny_model("llama"), tiny_model("llama", seed=1)
    assert torch.equal(torch.rand(1), expected)
    ids = prompts(rows=1)
    assert torch.equal(a(ids).logits, b(ids).logits)
    assert not torch.allclose(a(ids).logits, c(ids).logits)


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(PertokenError, match="llama"):
        tiny_model("lama")

"""The LoRA baseline: nothing at first, learns its text, and leaves the model as it was."""

from __future__ import annotations

import torch

from pertoken.reproduce._style_lora import lora
from pertoken.testing import tiny_model


@torch.no_grad()
def loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, ids[1:]))


def test_it_learns_and_leaves_no_trace() -> None:
    model = tiny_model("llama", vocab_size=32, dtype=torch.float32)
    ids = torch.tensor([5, 6, 7, 8] * 20)
    before = loss(model, ids)
    with lora(model, ids.tolist(), seed=0, steps=0):
        assert loss(model, ids) == before
    with lora(model, ids.tolist(), seed=0, steps=20):
        assert loss(model, ids) < 0.9 * before
    assert loss(model, ids) == before
    assert all(one.requires_grad and one.grad is None for one in model.parameters())

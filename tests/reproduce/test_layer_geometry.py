"""The small Mamba of layer-geometry's reproduction is transformers' own, only trained faster."""

from __future__ import annotations

import json

import torch
from transformers.models.mamba import modeling_mamba

from pertoken.reproduce import _tiny_mamba as mamba


def test_the_recurrence_taken_apart_is_transformers_with_its_gradients() -> None:
    model = mamba.new_model(0)
    ids = torch.randint(2, 258, (2, 9), generator=torch.Generator().manual_seed(0))
    before = modeling_mamba.mamba_selective_scan
    found = []
    for fast in (False, True):
        model.zero_grad()
        if fast:
            with mamba._taken_apart():
                logits = model(input_ids=ids, use_cache=False).logits
        else:
            logits = model(input_ids=ids, use_cache=False).logits
        logits.square().mean().backward()
        found.append((logits.detach(), [part.grad.clone() for part in model.parameters()]))
    assert modeling_mamba.mamba_selective_scan is before
    (slow, slow_grads), (quick, quick_grads) = found
    assert torch.allclose(slow, quick, atol=1e-4)
    for one, other in zip(slow_grads, quick_grads, strict=True):
        assert (one - other).norm() <= 1e-3 * one.norm() + 1e-7


def test_weights_come_back_from_json() -> None:
    kept = json.loads(json.dumps(mamba.train(["abc " * 60], 1, 0)))
    model, fresh = mamba.load(kept), mamba.new_model(0)
    again = mamba.load(kept)
    for one, other, random in zip(
        model.parameters(), again.parameters(), fresh.parameters(), strict=True
    ):
        assert torch.equal(one, other)
        assert one.shape == random.shape
    weight = model.get_input_embeddings().weight
    assert not torch.equal(weight, fresh.get_input_embeddings().weight)
    assert model.lm_head.weight is weight

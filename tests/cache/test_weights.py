"""Attention weights of chosen queries are those of the whole attention."""

from __future__ import annotations

import pytest
import torch

from pertoken.cache import _weights
from pertoken.cache._rotation import Rotation
from pertoken.cache._weights import causal, mix, watched, weigh
from pertoken.testing import tiny_model


def some(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).double()


def by_hand(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed values [batch, time, heads, dim] and weights [batch, heads, time, keys]."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * 0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


@pytest.mark.parametrize("block", [1, 4, 100])
@pytest.mark.parametrize("masked", [True, False])
def test_blocks_of_queries_add_up(
    monkeypatch: pytest.MonkeyPatch, block: int, masked: bool
) -> None:
    monkeypatch.setattr(_weights, "BLOCK", block)
    query, key, value = some(2, 4, 11, 8), some(2, 2, 11, 8), some(2, 2, 11, 8) + 1
    allowed = causal(11, 11, query.device)
    voting = torch.ones(2, 11, dtype=torch.bool)
    if masked:
        voting[1, :3] = False
        allowed = allowed & (torch.rand(2, 2, 11, 11) > 0.5) | torch.eye(11, dtype=torch.bool)
    every_head = allowed.repeat_interleave(4 // allowed.shape[1], 1)
    out, weights = by_hand(query, key, value, every_head)
    found, sums = watched(query, key, value, allowed if masked else None, 0.5, voting)
    wanted = (weights * voting[:, None, :, None]).sum(2)
    assert torch.allclose(found, out)
    assert torch.allclose(sums, wanted.unflatten(1, (2, 2)).sum(2))


def test_the_last_queries_alone() -> None:
    query, key, value = some(1, 4, 11, 8), some(1, 2, 11, 8), some(1, 2, 11, 8)
    out, weights = by_hand(query, key, value, causal(11, 11, query.device))
    found = weigh(query[:, :, -3:], key, causal(3, 11, query.device), 0.5)
    assert torch.allclose(found.flatten(1, 2), weights[:, :, -3:])
    assert torch.allclose(mix(found, value), out[:, -3:])


def test_low_precision_is_summed_in_float32() -> None:
    query, key, value = (some(1, 2, 300, 8).to(torch.bfloat16) for _ in range(3))
    out, sums = watched(query, key, value, None, 0.5)
    assert out.dtype == torch.bfloat16
    assert sums.dtype == torch.float32
    assert float(sums.sum()) == pytest.approx(2 * 300, rel=1e-4)


ROPES = {
    "plain": {"rope_type": "default"},
    "scaled keys": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_a_moved_key_is_the_key_of_the_later_place(rope: str) -> None:
    from transformers import AutoModelForCausalLM

    from pertoken._blocks import Blocks

    config = tiny_model("llama").config
    config.rope_parameters = {"rope_theta": 10000.0, **ROPES[rope]}
    model = AutoModelForCausalLM.from_config(config).double()
    rotation, blocks = Rotation(model, "this"), Blocks(model)
    ids, hidden = torch.tensor([[5, 6, 7]]), some(1, 3, 32)
    places = torch.tensor([[0, 1, 2]])
    keys = [
        blocks.project(0, hidden, blocks.enter(ids, where).calls[0])[0]
        for where in (places, places + 100)
    ]
    moved = rotation.turned(0, keys[0], rotation.angles(torch.tensor([[100]]), keys[0]))
    assert (moved - keys[1]).abs().max() < 1e-4 * keys[1].abs().max()

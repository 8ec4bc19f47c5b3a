"""Softmax block by block is softmax over all keys."""

from __future__ import annotations

import pytest
import torch

from pertoken.cache._paged import attend_part, merge, mixed_values


def _draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _plain(query, key, value, mask, scaling):
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        closed = -torch.inf if mask.dtype == torch.bool else 0.0
        scores = scores.masked_fill(~mask, closed) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _paged(query, key, value, mask, scaling, borders):
    part = None
    for start, end in zip(borders, [*borders[1:], key.shape[2]], strict=True):
        seen = None if mask is None else mask[..., start:end]
        block = attend_part(query, key[:, :, start:end], value[:, :, start:end], seen, scaling)
        part = merge(part, block)
    return mixed_values(part, query.dtype)


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("borders", [[0], [0, 3], [0, 1, 2, 9], [0, 5, 10]])
@pytest.mark.parametrize("masked", ["not", "bool", "float"])
def test_any_blocks_give_plain_softmax(key_heads, borders, masked):
    query = _draw(2, 6, 4, 8)
    key, value = _draw(2, key_heads, 11, 8, seed=1) * 5, _draw(2, key_heads, 11, 3, seed=2)
    mask = None
    if masked != "not":
        mask = _draw(2, 1, 4, 11, seed=3) > 0
        mask[..., 0] = True
    if masked == "float":
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, -1e30)
    expected = _plain(query, key, value, mask, 0.3)
    assert (_paged(query, key, value, mask, 0.3, borders) - expected).abs().max() < 1e-13


def test_blocks_in_any_order():
    query, key = _draw(1, 2, 3, 4), _draw(1, 2, 9, 4, seed=1)
    parts = [attend_part(query, key[:, :, i : i + 3], key[:, :, i : i + 3]) for i in (0, 3, 6)]
    one = merge(merge(parts[0], parts[1]), parts[2])
    other = merge(parts[2], merge(parts[0], parts[1]))
    difference = mixed_values(one, query.dtype) - mixed_values(other, query.dtype)
    assert difference.abs().max() < 1e-14


def test_huge_scores_do_not_overflow():
    query, key = _draw(1, 1, 2, 4, dtype=torch.float32) * 1e4, _draw(1, 1, 6, 4) * 1e4
    key = key.float()
    out = _paged(query, key, key, None, 1.0, [0, 2])
    assert torch.equal(out, _plain(query, key, key, None, 1.0))


def test_a_query_that_sees_nothing_gives_zero_and_never_nan():
    query, key = _draw(1, 2, 3, 4), _draw(1, 2, 4, 4, seed=1)
    mask = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    mask[:, :, 1, 2] = True  # in the second block only
    out = _paged(query, key, key, mask, 1.0, [0, 2])
    assert torch.equal(out[0, 1], key[0, :, 2])
    assert not out[0, 0].any()
    assert not out[0, 2].any()


def test_half_precision_is_summed_in_float32():
    query = _draw(1, 4, 2, 16).bfloat16()
    key, value = _draw(1, 2, 64, 16, seed=1).bfloat16(), _draw(1, 2, 64, 16, seed=2).bfloat16()
    exact = _plain(query.double(), key.double(), value.double(), None, 0.25)
    out = _paged(query, key, value, None, 0.25, [0, 16, 32, 48])
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() <= (exact.bfloat16().double() - exact).abs().max()
    assert attend_part(query, key, value).mixed.dtype == torch.float32

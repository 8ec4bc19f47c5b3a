"""The questions drafters ask of logits, answered as torch answers them."""

from __future__ import annotations

import pytest
import torch

from pertoken.decode.topk import NodeLogits

SIZES = [1, 3, 8, 127, 128, 129, 2047, 2048, 2049, 5000, 49152]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def logits(vocab: int, dtype: torch.dtype, nodes: int = 5) -> torch.Tensor:
    return torch.randn(nodes, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SIZES)
def test_greedy_is_argmax_also_on_ties(vocab: int, dtype: torch.dtype) -> None:
    raw = logits(vocab, dtype)
    assert NodeLogits(raw).greedy() == raw.argmax(-1).tolist()
    # bfloat16 and few distinct values: the smallest id wins.
    coarse = (raw * 2).round().clamp(max=1)
    first = [int((row == row.max()).nonzero()[0, 0]) for row in coarse]
    assert NodeLogits(coarse).greedy() == first
    assert NodeLogits(torch.zeros(2, vocab, dtype=dtype)).greedy() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 8, 10])
@pytest.mark.parametrize("vocab", SIZES)
def test_top_is_topk(vocab: int, k: int, dtype: torch.dtype) -> None:
    raw = logits(vocab, dtype)
    ids, values = NodeLogits(raw).top(k)
    k = min(k, vocab)
    assert ids.shape == values.shape == (5, k)
    assert ids.dtype == torch.int64
    assert values.dtype == torch.float32
    # Equal values may come in any order, so ids are checked through what they point at.
    assert torch.equal(values, raw.float().topk(k, dim=-1).values)
    assert torch.equal(raw.float().gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("vocab", [2048, 2100, 5000])
def test_the_best_tokens_may_all_stand_in_one_block_or_in_the_rest(vocab: int) -> None:
    for start in (0, 256, vocab - 12):
        raw = logits(vocab, torch.float32)
        raw[:, start : start + 12] += 100
        found = NodeLogits(raw)
        assert torch.equal(found.top(10)[0], raw.topk(10, dim=-1).indices)
        assert found.greedy() == raw.argmax(-1).tolist()


def test_a_smaller_k_is_the_start_of_a_greater_and_both_orders_agree() -> None:
    raw = logits(4000, torch.float32)
    found = NodeLogits(raw)
    ten = found.top(10)
    three = found.top(3)
    assert torch.equal(ten[0][:, :3], three[0])
    other = NodeLogits(raw)
    other.top(3)
    assert torch.equal(other.top(10)[0], ten[0])
    assert len(found) == 5


def test_tokens_that_are_masked_out_come_last() -> None:
    raw = torch.full((1, 3000), float("-inf"))
    raw[0, 2999] = 1.0
    raw[0, 5] = 2.0
    found = NodeLogits(raw)
    assert found.greedy() == [5]
    assert found.top(2)[0].tolist() == [[5, 2999]]

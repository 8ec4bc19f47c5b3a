"""One reducer for all losses: what each reduction means; cutting a batch changes nothing."""

from __future__ import annotations

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.train import Trajectories, reduce, weighted_nll

HOWS = ("token_mean", "sequence_mean", "sequence_sum", "constant")


def ragged(batch: int = 6, time: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, time, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, time + 1, (batch,), generator=generator)
    return values, torch.arange(time) < lengths[:, None]


def test_each_reduction_is_its_formula() -> None:
    values, mask = ragged()
    rows = [row[keep] for row, keep in zip(values, mask, strict=True)]
    expected = {
        "token_mean": torch.cat(rows).mean(),
        "sequence_mean": torch.stack([row.mean() for row in rows]).mean(),
        "sequence_sum": torch.stack([row.sum() for row in rows]).mean(),
    }
    for how, wanted in expected.items():
        torch.testing.assert_close(reduce(values, mask, how), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        reduce(values, mask, "constant", total=70), torch.cat(rows).sum() / 70, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_micro_batches_give_the_gradient_of_the_batch(how: str, cut: int) -> None:
    values, mask = ragged(seed=3)
    total = {"token_mean": mask.sum(), "constant": 60.0}.get(how, len(mask))
    whole = values.clone().requires_grad_()
    reduce(whole, mask, how, total).backward()
    parts = values.clone().requires_grad_()
    for part, keep in zip(parts.split(cut), mask.split(cut), strict=True):
        reduce(part, keep, how, total).backward()
    assert whole.grad is not None
    assert parts.grad is not None
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dirt", [float("nan"), float("inf"), -1e30])
def test_values_under_the_mask_are_never_read(how: str, dirt: float) -> None:
    values, mask = ragged(seed=1)
    clean = torch.where(mask, values, 0.0).requires_grad_()
    dirty = torch.where(mask, values, dirt).requires_grad_()
    one, other = reduce(clean, mask, how, total=10), reduce(dirty, mask, how, total=10)
    one.backward()
    other.backward()
    assert one.item() == other.item()
    assert clean.grad is not None
    assert dirty.grad is not None
    assert torch.equal(clean.grad, dirty.grad)
    assert bool((dirty.grad[~mask] == 0).all())


def test_half_precision_is_summed_in_float32() -> None:
    values = torch.full((4, 1000), 1.0, dtype=torch.bfloat16)
    summed = reduce(values, torch.ones(4, 1000), "sequence_sum")
    assert summed.dtype == torch.float32
    assert summed.item() == 1000  # bfloat16 counts ones to 256


@pytest.mark.parametrize("how", HOWS)
def test_a_packed_row_is_its_trajectories_in_rows_of_their_own(how: str) -> None:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    segments = torch.tensor([[7, 7, 7, 2, 2, 9, 9, 9], [0, 0, 1, 1, 1, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 0]])
    rows = [values[0, :3], values[0, 3:5], values[1, 1:2], values[1, 2:7]]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    keep = torch.arange(5) < torch.tensor([3, 2, 1, 5])[:, None]
    torch.testing.assert_close(
        reduce(values, mask, how, 11 if how == "constant" else None, segment_ids=segments),
        reduce(padded, keep, how, 11 if how == "constant" else None),
        rtol=0,
        atol=1e-12,
    )
    assert sorted(Trajectories(mask, segments).lengths.tolist()) == [1, 2, 3, 5]


def test_a_row_without_tokens_is_no_sequence() -> None:
    values = torch.tensor([[2.0, 4.0], [float("nan"), 1.0]])
    mask = torch.tensor([[1, 1], [0, 0]])
    assert reduce(values, mask, "sequence_mean").item() == 3
    assert reduce(values, mask, "sequence_sum").item() == 6


def test_mistakes_are_named() -> None:
    values, mask = ragged()
    with pytest.raises(PertokenError, match="did you mean 'token_mean'"):
        reduce(values, mask, "token-mean")
    with pytest.raises(PertokenError, match="needs total="):
        reduce(values, mask, "constant")
    with pytest.raises(PertokenError, match="above 0"):
        reduce(values, mask, "token_mean", total=0)
    with pytest.raises(PertokenError, match="hides every token"):
        reduce(values, torch.zeros_like(mask))
    with pytest.raises(PertokenError, match=r"\[batch, time\]"):
        reduce(values, mask[:, :3])
    with pytest.raises(PertokenError, match="segment_ids must be"):
        reduce(values, mask, segment_ids=torch.zeros(2, 2))


def test_weights_of_one_are_the_mean_loss() -> None:
    log_probs, mask = ragged(seed=2)
    ones = torch.ones_like(log_probs)
    for normalizer in ("tokens", "weights"):
        loss = weighted_nll(log_probs, ones, mask, normalizer)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, -log_probs[mask].mean(), rtol=0, atol=1e-12)


def test_a_weight_scales_the_gradient_of_its_token_alone() -> None:
    log_probs, mask = ragged(seed=4)
    weights = torch.rand(mask.shape, dtype=torch.float64) - 0.2
    dirty = torch.where(mask, log_probs, float("nan")).requires_grad_()
    weighted_nll(dirty, torch.where(mask, weights, float("inf")), mask).backward()
    expected = torch.where(mask, -weights / mask.sum(), 0.0)
    assert dirty.grad is not None
    torch.testing.assert_close(dirty.grad, expected, rtol=0, atol=1e-12)


def test_weighted_micro_batches_give_the_gradient_of_the_batch() -> None:
    log_probs, mask = ragged(seed=6)
    weights = torch.rand(mask.shape, dtype=torch.float64)
    total = weights[mask].sum()
    whole = weighted_nll(log_probs, weights, mask, "weights")
    parts = sum(
        weighted_nll(*part, "weights", total=total)
        for part in zip(log_probs.split(2), weights.split(2), mask.split(2), strict=True)
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_weighted_mistakes_are_named() -> None:
    log_probs, mask = ragged()
    with pytest.raises(PertokenError, match="not above 0"):
        weighted_nll(log_probs, -torch.ones_like(log_probs), mask, "weights")
    with pytest.raises(PertokenError, match="normalizer"):
        weighted_nll(log_probs, log_probs, mask, "words")  # type: ignore[arg-type]
    with pytest.raises(PertokenError, match="weights is NaN"):
        weighted_nll(log_probs, log_probs * float("nan"), mask)
    with pytest.raises(PertokenError, match="share the shape"):
        weighted_nll(log_probs, log_probs[:2], mask)

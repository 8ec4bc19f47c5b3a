"""RHO-1 and the choice by entropy, against brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.train import rho1_loss, sstoken_loss, top_entropy_loss

LENGTHS = [(2, 12), (0, 7), (5, 6), (3, 10), (1, 11)]


def masked() -> torch.Tensor:
    mask = torch.zeros(5, 12, dtype=torch.bool)
    for row, (first, last) in enumerate(LENGTHS):
        mask[row, first:last] = True
    return mask


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def rho1(keep: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Log-probabilities, scores by hand, and what the loss gives."""
    log_probs, reference = drawn(5, 12, seed=seed) - 3, drawn(5, 12, seed=seed + 50) - 3
    # Loss now less the reference's loss.
    return log_probs, -log_probs + reference, rho1_loss(log_probs, reference, masked(), keep=keep)


def top_entropy(keep: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Any]:
    logits = 2 * drawn(5, 12, 9, seed=seed)
    logits[0, 3, 4] = -math.inf  # a token that can't be has no share in the entropy
    by_hand = torch.tensor(
        [
            [-sum(p * math.log(p) for p in one.tolist() if p) for one in row]
            for row in logits.softmax(-1)
        ],
        dtype=torch.float64,
    )
    log_probs = drawn(5, 12, seed=seed + 50) - 3
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    return log_probs, by_hand, top_entropy_loss(log_probs, entropy, masked(), keep=keep)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.6, 1.0])
@pytest.mark.parametrize("rule", [rho1, top_entropy])
def test_the_best_of_each_answer_are_learned(rule: Any, keep: float) -> None:
    log_probs, scores, (loss, stats) = rule(keep)
    wanted = torch.zeros(5, 12, dtype=torch.bool)
    for row, (first, last) in enumerate(LENGTHS):
        order = sorted(range(first, last), key=lambda at: -scores[row, at].item())
        wanted[row, order[: math.ceil(keep * (last - first) - 1e-9)]] = True
    assert torch.equal(stats["kept"], wanted)
    torch.testing.assert_close(loss, -log_probs[wanted].mean(), rtol=0, atol=1e-12)
    torch.testing.assert_close(stats["scores"][masked()], scores[masked()])


def test_the_excess_loss_has_the_other_sign_than_sstokens() -> None:
    log_probs, other, mask = drawn(5, 12), drawn(5, 12, seed=1), masked()
    nowhere = torch.zeros_like(log_probs)
    rel = sstoken_loss(log_probs, other, nowhere, mask)[1]["rel"]
    assert torch.equal(rho1_loss(log_probs, other, mask)[1]["scores"], -rel)


def test_a_reference_that_is_the_model_keeps_the_first_tokens() -> None:
    log_probs, mask = drawn(5, 12), masked()
    kept = rho1_loss(log_probs, log_probs, mask, keep=0.5)[1]["kept"]
    for row, (first, last) in enumerate(LENGTHS):
        half = math.ceil((last - first) / 2)
        assert kept[row].nonzero()[:, 0].tolist() == list(range(first, first + half))


@pytest.mark.parametrize("rule", [rho1_loss, top_entropy_loss])
def test_only_kept_tokens_get_a_gradient_and_dirt_under_the_mask_none(rule: Any) -> None:
    mask = masked()
    found = []
    for fill in (0.0, math.nan):
        log_probs = torch.where(mask, drawn(5, 12), fill).requires_grad_()
        other = torch.where(mask, drawn(5, 12, seed=1), fill).requires_grad_()
        loss, stats = rule(log_probs, other, mask, keep=0.4)
        loss.backward()
        expected = torch.where(stats["kept"], -1.0 / stats["kept"].sum(), 0.0).double()
        torch.testing.assert_close(log_probs.grad, expected)
        assert other.grad is None
        assert not stats["kept"][~mask].any()
        found.append(loss.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("rule", [rho1_loss, top_entropy_loss])
def test_micro_batches_with_the_whole_total_are_one_batch(rule: Any) -> None:
    given = drawn(5, 12), drawn(5, 12, seed=1), masked()
    whole, stats = rule(*given)
    total = stats["kept"].sum()
    parts = [rule(*(one[rows] for one in given), total=total)[0] for rows in ([0, 1], [2, 3, 4])]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize(
    ("rule", "change", "message"),
    [
        (rho1_loss, {"keep": 0.0}, "the share to keep must be above 0"),
        (rho1_loss, {"other": torch.ones(1, 1)}, "reference_log_probs and mask must share"),
        (
            rho1_loss,
            {"other": torch.full((5, 12), math.nan)},
            "log_probs or reference_log_probs is",
        ),
        (
            top_entropy_loss,
            {"other": torch.ones(5, 12, 3)},
            "log_probs, entropy and mask must share",
        ),
        (top_entropy_loss, {"other": torch.full((5, 12), math.nan)}, "entropy is NaN"),
    ],
)
def test_mistakes_are_named(rule: Any, change: dict[str, Any], message: str) -> None:
    options = {"other": drawn(5, 12), **change}
    with pytest.raises(PertokenError, match=message):
        rule(drawn(5, 12), options.pop("other"), masked(), **options)

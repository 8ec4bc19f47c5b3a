"""Each law for losses once kept, by every loss of `pertoken.train`, and once broken."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.testing import (
    LawBroken,
    check_loss_gradient,
    check_loss_mask,
    check_loss_micro_batches,
    check_loss_order,
)
from pertoken.train import (
    fiberpo_loss,
    grpo_loss,
    gspo_loss,
    policy_gradient_loss,
    ppo_clip_loss,
)

Loss = Callable[..., Any]
LOSSES: dict[str, Loss] = {
    **{
        f"fiberpo {variant}": partial(fiberpo_loss, trajectory=(0.97, 1.03), variant=variant)
        for variant in ("paper", "residual", "censor")
    },
    "grpo": grpo_loss,
    "gspo": partial(gspo_loss, trajectory=(0.97, 1.03)),
    "policy gradient": policy_gradient_loss,
    "ppo": ppo_clip_loss,
}
STOPS = ("fiberpo censor",)  # gradients are stopped on purpose


@pytest.mark.parametrize("name", LOSSES)
def test_our_losses_keep_the_laws(name: str) -> None:
    loss = LOSSES[name]
    check_loss_mask(loss)
    check_loss_order(loss)
    check_loss_micro_batches(partial(loss, reduction="sequence_mean"))
    if name not in STOPS:
        check_loss_gradient(loss)


def mean(log_probs: torch.Tensor, mask: torch.Tensor, total: float | None = None) -> torch.Tensor:
    rows = torch.where(mask, log_probs, 0).sum(1) / mask.sum(1)
    return -rows.sum() / (len(rows) if total is None else total)


def multiplied(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return -(log_probs * mask).sum()


def unmasked(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return -log_probs.mean()


def constant(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return 0 * torch.where(mask, log_probs, 0).sum()


def first_rows(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return -torch.where(mask, log_probs, 0)[:3].sum()


def own_total(log_probs: torch.Tensor, mask: torch.Tensor, total: Any = None) -> torch.Tensor:
    return mean(log_probs, mask)


def detached(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (log_probs * log_probs.detach()).where(mask, 0).sum()


def a_vector(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return log_probs.where(mask, 0).sum(1)


def nothing(log_probs: torch.Tensor, mask: torch.Tensor, total: Any = None) -> torch.Tensor:
    return log_probs.where(mask, 0).sum() * torch.nan


BROKEN: list[tuple[Loss, Loss, str]] = [
    (check_loss_mask, multiplied, r"nan under the mask changes the loss \(.* became nan\)"),
    (check_loss_mask, unmasked, "a masked position has a gradient"),
    (check_loss_mask, constant, "no position has a gradient"),
    (check_loss_mask, a_vector, "must return a scalar tensor"),
    (check_loss_order, first_rows, "rows in another order"),
    (check_loss_order, nothing, "rows in another order"),
    (check_loss_micro_batches, nothing, "micro-batches add up to nan"),
    (check_loss_micro_batches, own_total, "micro-batches add up to"),
    (check_loss_gradient, detached, "not that of finite differences"),
]


@pytest.mark.parametrize(
    ("law", "loss", "said"), BROKEN, ids=lambda each: str(getattr(each, "__name__", each))[:30]
)
def test_what_is_wrong_is_found(law: Loss, loss: Loss, said: str) -> None:
    with pytest.raises(LawBroken, match=said):
        law(loss)


def test_a_plain_mean_keeps_them() -> None:
    check_loss_mask(mean)
    check_loss_order(mean)
    check_loss_micro_batches(mean)
    check_loss_gradient(mean)


def test_a_loss_without_a_total_is_told_so() -> None:
    with pytest.raises(PertokenError, match="takes no total"):
        check_loss_micro_batches(unmasked)

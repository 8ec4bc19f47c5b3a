"""Laws for losses on tensors [batch, time]: masks, order, micro-batches, gradients.

A loss is called with the arguments it names, among `log_probs`, `old_log_probs` (log p of the
sampled tokens, [batch, time]), `advantages` [batch] and `mask` [batch, time]; bind all others
first: `functools.partial(fiberpo_loss, trajectory=(0.9, 1.1))`. It returns a scalar, or a tuple
that begins with one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pertoken.testing._arguments import CannotCall, fill, parameters
from pertoken.testing.laws import LawBroken

__all__ = [
    "check_loss_gradient",
    "check_loss_mask",
    "check_loss_micro_batches",
    "check_loss_order",
]

Loss = Callable[..., Any]
Batch = dict[str, torch.Tensor]
_ROWS = 6


def check_loss_mask(loss: Loss, *, seed: int = 0) -> None:
    """What lies under the mask has no gradient and no say, be it NaN or infinite.

    Raises `LawBroken`.

    >>> def nll(log_probs, mask):
    ...     return -log_probs[mask].mean()
    >>> check_loss_mask(nll)
    """
    batch = _batch(seed)
    value, gradient = _run(loss, batch)
    hidden = ~batch["mask"]
    if bool((gradient[hidden] != 0).any()):
        raise LawBroken("a masked position has a gradient")
    if not bool((gradient[~hidden] != 0).any()):
        raise LawBroken("no position has a gradient: there is nothing to train on")
    for filler in (math.nan, -math.inf, 1e9):
        spoiled = dict(batch)
        for name in ("log_probs", "old_log_probs"):
            spoiled[name] = batch[name].masked_fill(hidden, filler)
        other, changed = _run(loss, spoiled)
        if not torch.equal(value, other) or not torch.equal(gradient, changed):
            raise LawBroken(
                f"{filler} under the mask changes the loss ({float(value):g} became "
                f"{float(other):g}) or its gradient"
            )


def check_loss_order(loss: Loss, *, seed: int = 0, atol: float = 1e-12) -> None:
    """The order of the rows does not matter, and each row keeps its own gradient."""
    batch = _batch(seed)
    order = torch.randperm(_ROWS, generator=torch.Generator().manual_seed(seed + 1))
    value, gradient = _run(loss, batch)
    other, moved = _run(loss, {name: tensor[order] for name, tensor in batch.items()})
    gap = float((gradient[order] - moved).abs().max())
    if not (abs(float(value - other)) <= atol and gap <= atol):  # NaN is no equality
        raise LawBroken("rows in another order give another loss or other gradients")


def check_loss_micro_batches(
    loss: Loss, *, total: float = _ROWS, seed: int = 0, atol: float = 1e-12
) -> None:
    """The losses of micro-batches, each told the `total` of the batch, add up to the batch's.

    total: what the loss divides by in this batch of 6 rows: the rows by default. The gradients
    must add up too. PertokenError for a loss that takes no `total`.
    """
    if "total" not in parameters(loss):
        raise CannotCall("the loss takes no total: what it divides by depends on the cut")
    batch = _batch(seed)
    value, gradient = _run(loss, batch)
    parts = [
        _run(loss, {name: tensor[rows] for name, tensor in batch.items()}, total=total)
        for rows in (slice(0, 1), slice(1, 4), slice(4, _ROWS))
    ]
    summed = torch.stack([part for part, _ in parts]).sum()
    joined = torch.cat([part for _, part in parts])
    if not abs(float(value - summed)) <= atol:
        raise LawBroken(
            f"micro-batches add up to {float(summed):.9g}, the batch is {float(value):.9g}"
        )
    if not float((gradient - joined).abs().max()) <= atol:
        raise LawBroken("gradients of micro-batches are not those of the batch")


def check_loss_gradient(loss: Loss, *, seed: int = 0) -> None:
    """The gradient must be that of finite differences, in float64.

    Not for a loss that stops gradients on purpose.
    """
    batch = _batch(seed)

    def of(log_probs: torch.Tensor) -> torch.Tensor:
        return _value(loss, {**batch, "log_probs": log_probs})

    at = batch["log_probs"].clone().requires_grad_()
    try:
        torch.autograd.gradcheck(of, (at,), eps=1e-7, atol=1e-6)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:200]
        raise LawBroken(f"the gradient is not that of finite differences: {line}") from error


def _batch(seed: int) -> Batch:
    """A ragged batch in float64, at some distance from the policy that sampled it."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    time = 7
    old = normal(_ROWS, time) - 3
    lengths = torch.randint(2, time, (_ROWS,), generator=draw)
    return {
        "log_probs": old + 0.1 * normal(_ROWS, time),
        "old_log_probs": old,
        "advantages": normal(_ROWS),
        "mask": torch.arange(time) < lengths[:, None],
    }


def _value(loss: Loss, batch: Batch, **options: Any) -> torch.Tensor:
    found = loss(**fill(loss, batch), **options)
    value = found[0] if isinstance(found, tuple) else found
    if not isinstance(value, torch.Tensor) or value.dim():
        raise LawBroken("a loss must return a scalar tensor, or a tuple that begins with one")
    return value


def _run(loss: Loss, batch: Batch, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient by `log_probs` of a loss."""
    at = batch["log_probs"].clone().requires_grad_()
    value = _value(loss, {**batch, "log_probs": at}, **options)
    (gradient,) = torch.autograd.grad(value, at)
    return value.detach(), gradient

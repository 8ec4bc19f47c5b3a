"""What every policy loss is given, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pertoken.errors import PertokenError
from pertoken.train.reducer import Trajectories, must_be_finite, widened


@dataclass(frozen=True)
class Inputs:
    """Checked inputs: every tensor is 0 under the mask, in float32 or float64.

    log_ratio: [batch, time], log of the policy's probability over the sampling policy's, with
    gradient. advantages: [batch, time], or [batch, 1] where a row has one advantage.
    """

    log_ratio: torch.Tensor
    advantages: torch.Tensor
    trajectories: Trajectories


def checked(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    segment_ids: torch.Tensor | None = None,
) -> Inputs:
    """The inputs in the form the losses work on; PertokenError for what cannot be trained on.

    Nothing under the mask is read. Refused: other shapes, a mask that hides everything, NaN or
    infinity in what is not masked, one advantage per row for rows of several trajectories.
    """
    if not log_probs.shape == old_log_probs.shape == mask.shape or mask.dim() != 2:
        raise PertokenError(
            "log_probs, old_log_probs and mask must share the shape [batch, time], got "
            f"{tuple(log_probs.shape)}, {tuple(old_log_probs.shape)} and {tuple(mask.shape)}"
        )
    trajectories = Trajectories(mask, segment_ids)
    keep = trajectories.mask
    if advantages.shape == mask.shape:
        advantages = torch.where(keep, widened(advantages), 0.0)
    elif advantages.shape == mask.shape[:1]:
        if trajectories.index is not None:
            raise PertokenError("packed rows need one advantage per token: [batch, time]")
        advantages = torch.where(keep.any(1), widened(advantages), 0.0)[:, None]
    else:
        raise PertokenError(
            f"advantages must be [batch] or [batch, time] for mask {tuple(mask.shape)}, "
            f"got {tuple(advantages.shape)}"
        )
    must_be_finite(advantages, "advantages")
    log_ratio = widened(log_probs) - widened(old_log_probs.detach())
    log_ratio = torch.where(keep, log_ratio, 0.0)
    if not bool(torch.isfinite(log_ratio.detach().sum())):
        for values, name in ((log_probs, "log_probs"), (old_log_probs, "old_log_probs")):
            must_be_finite(torch.where(keep, widened(values), 0.0), name)
    return Inputs(log_ratio, advantages.detach(), trajectories)


def log_bounds(bounds: tuple[float, float], name: str) -> tuple[float, float]:
    """Bounds on a ratio as bounds on its logarithm.

    >>> log_bounds((0.5, 2.0), "token")
    (-0.6931471805599453, 0.6931471805599453)
    """
    low, high = (float(bound) for bound in bounds)
    if not 0 <= low < 1 < high:
        raise PertokenError(
            f"{name} bounds are ratios around 1, low < 1 < high, such as (0.8, 1.25); "
            f"got ({low:g}, {high:g})"
        )
    return (math.log(low) if low > 0 else -math.inf), math.log(high)

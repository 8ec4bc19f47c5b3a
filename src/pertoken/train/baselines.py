"""The objectives FiberPO is compared with, in its signature, one function each.

All take ``(log_probs, old_log_probs, advantages, mask)`` as `fiberpo_loss` does and return the
loss to minimise and ``{"closed_low": ..., "closed_high": ...}``, the share of tokens (sequences
for GSPO) whose gradient the bound on that side has stopped. Bounds are ratios.

With r the ratio of a token, s the geometric mean of the ratios of its sequence, T tokens in it:

| here | per token | summed up by | in TRL (``GRPOConfig``) | in verl (``actor``) |
|---|---|---|---|---|
| `policy_gradient_loss` | -A r | sequence mean | - | ``loss_mode: vanilla``, clip open |
| `ppo_clip_loss` | -min(A r, A clip r) | sequence mean | ``loss_type="grpo"`` | \
``vanilla``, ``seq-mean-token-mean`` |
| `dr_grpo_loss` | the same | batch x longest completion | ``loss_type="dr_grpo"`` | \
``vanilla``, ``seq-mean-token-sum-norm`` |
| `dapo_loss` | the same | tokens of the whole batch | ``loss_type="dapo"`` | \
``vanilla``, ``token-mean`` |
| `gspo_loss` | -min(A s, A clip s) | sequence mean | ``importance_sampling_level="sequence"``, \
``loss_type="grpo"`` | ``gspo``, ``seq-mean-token-mean`` |
| `cispo_loss` | -A min(r, high) log p, min(..) without gradient | tokens of the whole batch | \
``loss_type="cispo"`` | ``cispo``, ``token-mean`` |
| reduction ``token_mean`` | | tokens | ``loss_type="bnpo"``; with `total`: ``"dapo"`` | \
``loss_agg_mode: token-mean`` |
| ``sequence_mean`` | | sequences of token means | ``loss_type="grpo"`` | \
``seq-mean-token-mean`` |
| ``sequence_sum`` | | sequences of token sums | ``loss_type="luspo"`` | ``seq-mean-token-sum`` |
| ``constant`` | | a number | ``loss_type="dr_grpo"`` | ``seq-mean-token-sum-norm`` |

TRL's ``epsilon`` and ``epsilon_high`` are 1 - low and high - 1 here, but for CISPO, where
``epsilon_high`` is the ratio `high` itself. Checked against TRL 1.16.
"""

from __future__ import annotations

import torch

from pertoken.train._inputs import Inputs, checked, log_bounds
from pertoken.train.reducer import reduce, widened

__all__ = [
    "cispo_loss",
    "dapo_loss",
    "dr_grpo_loss",
    "grpo_loss",
    "gspo_loss",
    "policy_gradient_loss",
    "ppo_clip_loss",
]

Bounds = tuple[float, float]
Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]
Total = float | torch.Tensor | None


def policy_gradient_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    segment_ids: torch.Tensor | None = None,
    reduction: str = "sequence_mean",
    total: Total = None,
) -> Loss:
    """Policy gradient with importance weights and no trust region: the mean of -A r."""
    inputs = checked(log_probs, old_log_probs, advantages, mask, segment_ids)
    values = -inputs.advantages * torch.exp(inputs.log_ratio)
    zero = values.new_zeros(())
    loss = reduce(values, mask, reduction, total, segment_ids=segment_ids)
    return loss, {"closed_low": zero, "closed_high": zero}


def ppo_clip_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    token: Bounds = (0.8, 1.2),
    segment_ids: torch.Tensor | None = None,
    reduction: str = "sequence_mean",
    total: Total = None,
) -> Loss:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), reduced as in GRPO (2402.03300).

    >>> log_probs = torch.tensor([[0.5, -0.5]]).log().nan_to_num()
    >>> old = torch.zeros(1, 2)
    >>> loss, stats = ppo_clip_loss(log_probs, old, torch.tensor([-1.0]), torch.tensor([[1, 0]]))
    >>> round(float(loss), 4), float(stats["closed_low"])
    (0.8, 1.0)
    """
    inputs = checked(log_probs, old_log_probs, advantages, mask, segment_ids)
    values, stats = _clipped(inputs, inputs.log_ratio, token)
    return reduce(values, mask, reduction, total, segment_ids=segment_ids), stats


grpo_loss = ppo_clip_loss
"""GRPO's policy loss: `ppo_clip_loss`, whose advantages are those of a group."""


def dr_grpo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    token: Bounds = (0.8, 1.2),
    max_length: int | None = None,
    segment_ids: torch.Tensor | None = None,
    total: Total = None,
) -> Loss:
    """Dr. GRPO (arXiv 2503.20783): the clipped surrogate over a constant, not over lengths.

    max_length: the longest completion that was allowed, by default the columns of `mask`; the
    constant is that times the sequences, unless `total` gives it.
    """
    if total is None:
        sequences = len(
            checked(log_probs, old_log_probs, advantages, mask, segment_ids).trajectories
        )
        total = sequences * (mask.shape[1] if max_length is None else max_length)
    return ppo_clip_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        token=token,
        segment_ids=segment_ids,
        reduction="constant",
        total=total,
    )


def dapo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    token: Bounds = (0.8, 1.28),
    segment_ids: torch.Tensor | None = None,
    total: Total = None,
) -> Loss:
    """DAPO (arXiv 2503.14476): a higher upper bound, and every token of the batch counts alike.

    total: the tokens of the whole accumulated batch, where this is a micro-batch of it.
    """
    return ppo_clip_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        token=token,
        segment_ids=segment_ids,
        reduction="token_mean",
        total=total,
    )


def gspo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    trajectory: Bounds,
    segment_ids: torch.Tensor | None = None,
    reduction: str = "sequence_mean",
    total: Total = None,
) -> Loss:
    """GSPO (arXiv 2507.18071, eq. 5): the clip on the geometric mean of a sequence's ratios.

    trajectory: bounds on that mean; the authors use (1 - 3e-4, 1 + 4e-4) for large models. The
    stats count sequences, each by its tokens.
    """
    inputs = checked(log_probs, old_log_probs, advantages, mask, segment_ids)
    trajectories = inputs.trajectories
    mean = trajectories.spread(trajectories.mean(inputs.log_ratio))
    values, stats = _clipped(inputs, mean, trajectory)
    values = values.expand_as(inputs.log_ratio)
    return reduce(values, mask, reduction, total, segment_ids=segment_ids), stats


def cispo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    high: float = 5.0,
    segment_ids: torch.Tensor | None = None,
    reduction: str = "token_mean",
    total: Total = None,
) -> Loss:
    """CISPO (arXiv 2506.13585, eq. 4): -A min(r, high) log p, the weight without gradient.

    high: bound on the ratio. No gradient is ever stopped; ``closed_high`` is the share of tokens
    with A > 0 whose weight is cut.
    """
    inputs = checked(log_probs, old_log_probs, advantages, mask, segment_ids)
    _, limit = log_bounds((0.5, high), "high")
    weight = torch.exp(inputs.log_ratio.detach().clamp(max=limit))
    kept = torch.where(inputs.trajectories.mask, widened(log_probs), 0.0)
    values = -weight * inputs.advantages * kept
    above = (inputs.log_ratio.detach() > limit) & (inputs.advantages > 0)
    loss = reduce(values, mask, reduction, total, segment_ids=segment_ids)
    return loss, {"closed_low": loss.new_zeros(()), "closed_high": _share(inputs, above)}


def _clipped(inputs: Inputs, log_ratio: torch.Tensor, bounds: Bounds) -> Loss:
    """-min(A r, A clip r) per token, and the share of closed tokens by side."""
    log_bounds(bounds, "clip")
    low, high = bounds
    ratio, advantages = torch.exp(log_ratio), inputs.advantages
    values = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    with torch.no_grad():
        below = (ratio < low) & (advantages < 0)
        above = (ratio > high) & (advantages > 0)
    return values, {"closed_low": _share(inputs, below), "closed_high": _share(inputs, above)}


def _share(inputs: Inputs, hits: torch.Tensor) -> torch.Tensor:
    trajectories = inputs.trajectories
    hits = hits & trajectories.mask
    return torch.count_nonzero(hits) / trajectories.lengths.sum()

"""FiberPO as a policy loss of verl, under verl's own signature.

    from pertoken.train.verl import register
    register()  # in every worker, before the actor is built

then ``actor.policy_loss.loss_mode=fiberpo`` and, under ``actor.policy_loss``, ``fiberpo_token``,
``fiberpo_trajectory`` (low, high) and ``fiberpo_variant``. verl itself is imported by `register`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from pertoken.errors import PertokenError
from pertoken.train.fiberpo import fiberpo_loss
from pertoken.train.reducer import Trajectories

__all__ = ["fiberpo_policy_loss", "register"]

Register = Callable[[str], Callable[[Any], Any]]
_MODES = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum",
}


def register(register_policy_loss: Register | None = None, name: str = "fiberpo") -> None:
    """Enter `fiberpo_policy_loss` among verl's policy losses.

    register_policy_loss: verl's decorator of that name; imported from verl where not given.
    """
    if register_policy_loss is None:
        try:
            core = import_module("verl.trainer.ppo.core_algos")
        except ImportError:
            raise PertokenError("verl is not installed: pip install verl") from None
        register_policy_loss = core.register_policy_loss
    decorate: Any = register_policy_loss
    decorate(name)(fiberpo_policy_loss)


def fiberpo_policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """verl's ``PolicyLossFn``: (loss, metrics) with tensors [batch, time].

    config: the actor's; ``config.policy_loss`` must hold ``fiberpo_trajectory``. Normalisers of
    the whole batch come from ``config.global_batch_info`` where verl gives them. PertokenError
    for an aggregation or importance weights that are not carried.
    """
    if rollout_is_weights is not None:
        raise PertokenError("fiberpo does not carry rollout_is_weights: turn rollout_is off")
    if loss_agg_mode not in _MODES:
        raise PertokenError(
            f"fiberpo does not support loss_agg_mode={loss_agg_mode!r}; "
            f"there is: {', '.join(_MODES)}"
        )
    options = _get(config, "policy_loss")
    trajectory = _get(options, "fiberpo_trajectory")
    if trajectory is None:
        raise PertokenError(
            "fiberpo needs actor.policy_loss.fiberpo_trajectory, bounds on the ratio such as "
            "[0.99, 1.01]"
        )
    whole = _get(config, "global_batch_info") or {}
    share = _get(whole, "dp_size") or 1
    total = _get(
        whole, "batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size"
    )
    if not bool(response_mask.any()):
        return log_prob.sum() * 0.0, {}
    loss, stats = fiberpo_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        trajectory=tuple(trajectory),
        token=tuple(_get(options, "fiberpo_token") or (0.8, 1.25)),
        variant=_get(options, "fiberpo_variant") or "paper",
        reduction=_MODES[loss_agg_mode],
        total=total,
    )
    tokens = Trajectories(response_mask)
    drift = (log_prob - old_log_prob).detach()
    kl = -torch.where(tokens.mask, drift, 0.0).sum() / tokens.lengths.sum()
    metrics = {f"actor/fiberpo/{name}": float(value) for name, value in stats.items()}
    metrics["actor/ppo_kl"] = float(kl)
    metrics["actor/pg_clipfrac"] = float(stats["token/closed_low"] + stats["token/closed_high"])
    return loss * share, metrics


def _get(config: Any, name: str) -> Any:
    """An entry of a mapping or an attribute of a config object; None where it is not there."""
    if config is None:
        return None
    if hasattr(config, "get"):
        return config.get(name)
    return getattr(config, name, None)

"""Training: one weight, one mask or one loss per token, as pure functions on tensors.

Policy losses take ``(log_probs, old_log_probs, advantages, mask)``, all ``[batch, time]``, and
return ``(loss, stats)``. Nothing here imports TRL or verl; the adapters do when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.train.apc import apc_clip, tv_trpo_penalty
    from pertoken.train.baselines import (
        cispo_loss,
        dapo_loss,
        dr_grpo_loss,
        grpo_loss,
        gspo_loss,
        policy_gradient_loss,
        ppo_clip_loss,
    )
    from pertoken.train.fiberpo import fiberpo_loss, fiberpo_ratio, hierarchy_loss
    from pertoken.train.hierarchy import gate, log_ratio_levels
    from pertoken.train.reducer import Trajectories, reduce, weighted_nll
    from pertoken.train.trl import FiberPOTrainer

__all__ = [
    "FiberPOTrainer",
    "Trajectories",
    "apc_clip",
    "cispo_loss",
    "dapo_loss",
    "dr_grpo_loss",
    "fiberpo_loss",
    "fiberpo_ratio",
    "gate",
    "grpo_loss",
    "gspo_loss",
    "hierarchy_loss",
    "log_ratio_levels",
    "policy_gradient_loss",
    "ppo_clip_loss",
    "reduce",
    "tv_trpo_penalty",
    "weighted_nll",
]

_HOME = {
    "FiberPOTrainer": "trl",
    "Trajectories": "reducer",
    "apc_clip": "apc",
    "cispo_loss": "baselines",
    "dapo_loss": "baselines",
    "dr_grpo_loss": "baselines",
    "fiberpo_loss": "fiberpo",
    "fiberpo_ratio": "fiberpo",
    "gate": "hierarchy",
    "grpo_loss": "baselines",
    "gspo_loss": "baselines",
    "hierarchy_loss": "fiberpo",
    "log_ratio_levels": "hierarchy",
    "policy_gradient_loss": "baselines",
    "ppo_clip_loss": "baselines",
    "reduce": "reducer",
    "tv_trpo_penalty": "apc",
    "weighted_nll": "reducer",
}

__getattr__, __dir__ = lazy(__name__, _HOME)

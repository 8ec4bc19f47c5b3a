"""Training: one weight, one mask or one loss per token, as pure functions on tensors.

Policy losses take ``(log_probs, old_log_probs, advantages, mask)``, all ``[batch, time]``, and
return ``(loss, stats)``. Nothing here imports TRL or verl; the adapters do when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.train._page import gates_page
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
    from pertoken.train.gates import closed_gates
    from pertoken.train.hierarchy import gate, log_ratio_levels
    from pertoken.train.ngram_scorer import NgramScorer
    from pertoken.train.pool import Selected, sample_documents, select_file
    from pertoken.train.preselection import Preselection, preselect
    from pertoken.train.reducer import Trajectories, reduce, weighted_nll
    from pertoken.train.run import Run, train_policy
    from pertoken.train.strength import (
        bits_per_character,
        label_extremes,
        predictive_strength,
        select,
    )
    from pertoken.train.trl import FiberPOTrainer

__all__ = [
    "FiberPOTrainer",
    "NgramScorer",
    "Preselection",
    "Run",
    "Selected",
    "Trajectories",
    "apc_clip",
    "bits_per_character",
    "cispo_loss",
    "closed_gates",
    "dapo_loss",
    "dr_grpo_loss",
    "fiberpo_loss",
    "fiberpo_ratio",
    "gate",
    "gates_page",
    "grpo_loss",
    "gspo_loss",
    "hierarchy_loss",
    "label_extremes",
    "log_ratio_levels",
    "policy_gradient_loss",
    "ppo_clip_loss",
    "predictive_strength",
    "preselect",
    "reduce",
    "sample_documents",
    "select",
    "select_file",
    "train_policy",
    "tv_trpo_penalty",
    "weighted_nll",
]

_HOME = {
    "FiberPOTrainer": "trl",
    "NgramScorer": "ngram_scorer",
    "Preselection": "preselection",
    "Run": "run",
    "Selected": "pool",
    "Trajectories": "reducer",
    "apc_clip": "apc",
    "bits_per_character": "strength",
    "cispo_loss": "baselines",
    "closed_gates": "gates",
    "dapo_loss": "baselines",
    "dr_grpo_loss": "baselines",
    "fiberpo_loss": "fiberpo",
    "fiberpo_ratio": "fiberpo",
    "gate": "hierarchy",
    "gates_page": "_page",
    "grpo_loss": "baselines",
    "gspo_loss": "baselines",
    "hierarchy_loss": "fiberpo",
    "label_extremes": "strength",
    "log_ratio_levels": "hierarchy",
    "policy_gradient_loss": "baselines",
    "ppo_clip_loss": "baselines",
    "predictive_strength": "strength",
    "preselect": "preselection",
    "reduce": "reducer",
    "sample_documents": "pool",
    "select": "strength",
    "select_file": "pool",
    "train_policy": "run",
    "tv_trpo_penalty": "apc",
    "weighted_nll": "reducer",
}

__getattr__, __dir__ = lazy(__name__, _HOME)

"""Training: one weight, one mask or one loss per token, as pure functions on tensors.

Policy losses take ``(log_probs, old_log_probs, advantages, mask)``, all ``[batch, time]``, and
return ``(loss, stats)``. Nothing here imports TRL or verl; the adapters do when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.train._page import gates_page
    from pertoken.train._prompt_attention import prompt_attention
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
    from pertoken.train.cdpo import CDPOTrainer, tdpo_loss, token_dpo_loss
    from pertoken.train.choice import TokenChoice, choose_tokens
    from pertoken.train.contrast import (
        ContrastData,
        Sampled,
        contrast_data,
        contrastive_scores,
        log_ratio,
    )
    from pertoken.train.critical_tokens import (
        Replaced,
        Rollouts,
        continued,
        critical_token,
        pass_at_k,
        replaced,
        rollout_scores,
    )
    from pertoken.train.fiberpo import fiberpo_loss, fiberpo_ratio, hierarchy_loss
    from pertoken.train.gates import closed_gates
    from pertoken.train.hierarchy import gate, log_ratio_levels
    from pertoken.train.lessons import Lesson, Pair, encode_lesson, read_lessons, read_pairs
    from pertoken.train.masked_thought import (
        MaskedThought,
        add_mask_token,
        linear_rate,
        mask_thought,
        question_dependence,
    )
    from pertoken.train.ngram_scorer import NgramScorer
    from pertoken.train.pool import Selected, sample_documents, select_file
    from pertoken.train.preference import train_preference
    from pertoken.train.preselection import Preselection, preselect
    from pertoken.train.reducer import Trajectories, reduce, weighted_nll
    from pertoken.train.run import Run, train_policy
    from pertoken.train.sampled import sample_answers
    from pertoken.train.selection import rho1_loss, top_entropy_loss
    from pertoken.train.sstoken import retrospective_excess_loss, ss_scores, sstoken_loss
    from pertoken.train.sstoken_trainer import SSTokenSFT
    from pertoken.train.strength import (
        bits_per_character,
        label_extremes,
        predictive_strength,
        select,
    )
    from pertoken.train.supervised import SupervisedRun, train_supervised
    from pertoken.train.token_weights import TokenWeightedDPO, TokenWeightedSFT, signal_weights
    from pertoken.train.trl import FiberPOTrainer

__all__ = [
    "CDPOTrainer",
    "ContrastData",
    "FiberPOTrainer",
    "Lesson",
    "MaskedThought",
    "NgramScorer",
    "Pair",
    "Preselection",
    "Replaced",
    "Rollouts",
    "Run",
    "SSTokenSFT",
    "Sampled",
    "Selected",
    "SupervisedRun",
    "TokenChoice",
    "TokenWeightedDPO",
    "TokenWeightedSFT",
    "Trajectories",
    "add_mask_token",
    "apc_clip",
    "bits_per_character",
    "choose_tokens",
    "cispo_loss",
    "closed_gates",
    "continued",
    "contrast_data",
    "contrastive_scores",
    "critical_token",
    "dapo_loss",
    "dr_grpo_loss",
    "encode_lesson",
    "fiberpo_loss",
    "fiberpo_ratio",
    "gate",
    "gates_page",
    "grpo_loss",
    "gspo_loss",
    "hierarchy_loss",
    "label_extremes",
    "linear_rate",
    "log_ratio",
    "log_ratio_levels",
    "mask_thought",
    "pass_at_k",
    "policy_gradient_loss",
    "ppo_clip_loss",
    "predictive_strength",
    "preselect",
    "prompt_attention",
    "question_dependence",
    "read_lessons",
    "read_pairs",
    "reduce",
    "replaced",
    "retrospective_excess_loss",
    "rho1_loss",
    "rollout_scores",
    "sample_answers",
    "sample_documents",
    "select",
    "select_file",
    "signal_weights",
    "ss_scores",
    "sstoken_loss",
    "tdpo_loss",
    "token_dpo_loss",
    "top_entropy_loss",
    "train_policy",
    "train_preference",
    "train_supervised",
    "tv_trpo_penalty",
    "weighted_nll",
]

_HOME = {
    "CDPOTrainer": "cdpo",
    "ContrastData": "contrast",
    "FiberPOTrainer": "trl",
    "Lesson": "lessons",
    "MaskedThought": "masked_thought",
    "NgramScorer": "ngram_scorer",
    "Pair": "lessons",
    "Preselection": "preselection",
    "Replaced": "critical_tokens",
    "Rollouts": "critical_tokens",
    "Run": "run",
    "SSTokenSFT": "sstoken_trainer",
    "Sampled": "contrast",
    "Selected": "pool",
    "SupervisedRun": "supervised",
    "TokenChoice": "choice",
    "TokenWeightedDPO": "token_weights",
    "TokenWeightedSFT": "token_weights",
    "Trajectories": "reducer",
    "add_mask_token": "masked_thought",
    "apc_clip": "apc",
    "bits_per_character": "strength",
    "choose_tokens": "choice",
    "cispo_loss": "baselines",
    "closed_gates": "gates",
    "continued": "critical_tokens",
    "contrast_data": "contrast",
    "contrastive_scores": "contrast",
    "critical_token": "critical_tokens",
    "dapo_loss": "baselines",
    "dr_grpo_loss": "baselines",
    "encode_lesson": "lessons",
    "fiberpo_loss": "fiberpo",
    "fiberpo_ratio": "fiberpo",
    "gate": "hierarchy",
    "gates_page": "_page",
    "grpo_loss": "baselines",
    "gspo_loss": "baselines",
    "hierarchy_loss": "fiberpo",
    "label_extremes": "strength",
    "linear_rate": "masked_thought",
    "log_ratio": "contrast",
    "log_ratio_levels": "hierarchy",
    "mask_thought": "masked_thought",
    "pass_at_k": "critical_tokens",
    "policy_gradient_loss": "baselines",
    "ppo_clip_loss": "baselines",
    "predictive_strength": "strength",
    "preselect": "preselection",
    "prompt_attention": "_prompt_attention",
    "question_dependence": "masked_thought",
    "read_lessons": "lessons",
    "read_pairs": "lessons",
    "reduce": "reducer",
    "replaced": "critical_tokens",
    "retrospective_excess_loss": "sstoken",
    "rho1_loss": "selection",
    "rollout_scores": "critical_tokens",
    "sample_answers": "sampled",
    "sample_documents": "pool",
    "select": "strength",
    "select_file": "pool",
    "signal_weights": "token_weights",
    "ss_scores": "sstoken",
    "sstoken_loss": "sstoken",
    "tdpo_loss": "cdpo",
    "token_dpo_loss": "cdpo",
    "top_entropy_loss": "selection",
    "train_policy": "run",
    "train_preference": "preference",
    "train_supervised": "supervised",
    "tv_trpo_penalty": "apc",
    "weighted_nll": "reducer",
}

__getattr__, __dir__ = lazy(__name__, _HOME)

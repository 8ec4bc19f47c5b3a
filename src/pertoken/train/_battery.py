"""How the training methods are made for the laws of `pertoken.testing`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from pertoken.testing._case import Case
from pertoken.testing.battery import Subject
from pertoken.testing.laws import LawBroken
from pertoken.testing.mock import ByteTokenizer
from pertoken.testing.models import tiny_model
from pertoken.train.cdpo import token_dpo_loss
from pertoken.train.fiberpo import fiberpo_loss
from pertoken.train.masked_thought import mask_thought
from pertoken.train.preselection import Preselection, preselect
from pertoken.train.sstoken import sstoken_loss

__all__ = ["SUBJECTS"]


def _preselected(texts: Sequence[str], seed: int) -> Preselection:
    """By a model to which all bytes are alike, and an abler one that expects digits."""
    models = []
    for expects in (0.0, 3.0):
        model = tiny_model("llama", vocab_size=len(tokenizer := ByteTokenizer()), scale=0.0)
        model.lm_head = torch.nn.Linear(model.config.hidden_size, len(tokenizer)).to(model.dtype)
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.bias.zero_()
            model.lm_head.bias[tokenizer.encode("0123456789")] = expects
        models.append((model, tokenizer))
    return preselect(models, [0.0, 1.0], [*texts, "12 and 34", "no number"], seed=seed)


def _sstoken(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    mask: torch.Tensor,
    total: float | None = None,
) -> torch.Tensor:
    """Its loss, divided by the rows: the sampling policy is the history, no attention anywhere."""
    nowhere = torch.zeros_like(log_probs)
    total = len(mask) if total is None else total
    return sstoken_loss(log_probs, old_log_probs, nowhere, mask, total=total)[0]


def _cdpo(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    mask: torch.Tensor,
    total: float | None = None,
) -> torch.Tensor:
    """Each row as a rejected answer, the sampling policy as reference, beside a chosen one that
    has not moved; divided by the rows."""
    still, whole = torch.zeros_like(log_probs), torch.ones_like(mask)
    loss, _ = token_dpo_loss(still, log_probs, still, old_log_probs, whole, mask)
    return loss if total is None else loss * len(mask) / total


def _answer_alone(case: Case) -> None:
    """Only inputs of the answer change, and their labels stay."""
    draw = torch.Generator().manual_seed(case.seed)
    ids = torch.randint(1, 50, (6, 9), generator=draw)
    labels = torch.where(torch.rand(ids.shape, generator=draw) < 0.5, ids, -100)
    kept = labels.clone()
    masked = case.method(ids, labels, 1.0, mask_id=99, seed=case.seed)
    if not torch.equal((masked == 99), labels != -100) or not torch.equal(labels, kept):
        raise LawBroken("something beside the answer's inputs has changed")


_INPUTS = "changes the inputs of the ordinary loss"

SUBJECTS = (
    Subject("cdpo", "loss", _cdpo),
    Subject("fiberpo", "loss", partial(fiberpo_loss, trajectory=(0.97, 1.03))),
    Subject(
        "masked-thought",
        "loss",
        mask_thought,
        skip=dict.fromkeys(("mask", "order", "micro-batches", "gradient"), _INPUTS),
        laws={"the answer alone": _answer_alone},
    ),
    Subject("preselect", "probe", _preselected),
    Subject("sstoken", "loss", _sstoken),
)

"""How the losses are made for the laws of `pertoken.testing`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from pertoken.testing.battery import Subject
from pertoken.testing.mock import ByteTokenizer
from pertoken.testing.models import tiny_model
from pertoken.train.fiberpo import fiberpo_loss
from pertoken.train.preselection import Preselection, preselect

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


SUBJECTS = (
    Subject("fiberpo", "loss", partial(fiberpo_loss, trajectory=(0.97, 1.03))),
    Subject("preselect", "probe", _preselected),
)

"""How the losses are made for the laws of `pertoken.testing`."""

from __future__ import annotations

from functools import partial

from pertoken.testing.battery import Subject
from pertoken.train.fiberpo import fiberpo_loss

__all__ = ["SUBJECTS"]

SUBJECTS = (Subject("fiberpo", "loss", partial(fiberpo_loss, trajectory=(0.97, 1.03))),)

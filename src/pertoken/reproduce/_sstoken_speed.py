"""What a training step costs under ssToken: steps of several losses in turns, on one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from pertoken.reproduce import _worked_sums as lab
from pertoken.timing import alternate

__all__ = ["step_times"]

Loss = Callable[[Any], torch.Tensor]
ROUNDS, STEPS = 12, 5  # steps of a turn: long enough to see whether the machine is quiet


def step_times(model: Any, losses: Mapping[str, Loss], *, smoke: bool = False) -> dict[str, Any]:
    """Seconds of a step (loss, gradient, update) of each loss, one per round that was quiet.

    model: each loss trains a copy of it. In a smoke run rounds that were not quiet count too.
    """
    turns = {name: partial(_turn, *_copied(model), loss) for name, loss in losses.items()}
    for turn in turns.values():  # warm up
        turn(0)
    run = alternate(turns, 1 if smoke else ROUNDS, watch=0.0 if smoke else 0.5)
    rounds = [*run.kept, *(run.dropped if smoke else [])]
    seconds = {name: [one.calls[name].seconds / STEPS for one in rounds] for name in losses}
    return {**seconds, "noise": run.noise()}


def _copied(model: Any) -> tuple[Any, torch.optim.Optimizer]:
    own = copy.deepcopy(model).requires_grad_(True).train()
    return own, torch.optim.AdamW(own.parameters(), lr=1e-4, weight_decay=lab.DECAY)


def _turn(model: Any, optimizer: torch.optim.Optimizer, loss_of: Loss, _: int) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), lab.CLIP)
        optimizer.step()

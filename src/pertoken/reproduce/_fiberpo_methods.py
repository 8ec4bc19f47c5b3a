"""The objectives of the FiberPO reproduction under one name each, with matched budgets."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch

from pertoken.train import (
    cispo_loss,
    fiberpo_loss,
    gspo_loss,
    policy_gradient_loss,
    ppo_clip_loss,
)
from pertoken.train.fiberpo import Variant

Loss = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
FIBERPO = ("FiberPO", "FiberPO residual", "FiberPO censor")
PEERS = ("policy gradient", "GRPO", "GSPO", "CISPO")


def losses(token: tuple[float, float], trajectory: float, **shared: Any) -> dict[str, Loss]:
    """Name -> loss: the token bounds for all that have one, exp(+-trajectory) for trajectories.

    shared: further arguments of all of them, such as the reduction.
    """
    drift = (math.exp(-trajectory), math.exp(trajectory))
    made: dict[str, Any] = {
        "policy gradient": policy_gradient_loss,
        "GRPO": partial(ppo_clip_loss, token=token),
        "GSPO": partial(gspo_loss, trajectory=drift),
        "CISPO": partial(cispo_loss, high=token[1]),
    }
    for name, variant in zip(FIBERPO, get_args(Variant), strict=True):
        made[name] = partial(fiberpo_loss, token=token, trajectory=drift, variant=variant)
    return {name: partial(loss, **shared) for name, loss in made.items()}

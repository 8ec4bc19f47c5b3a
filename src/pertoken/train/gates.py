"""Which gates a policy loss has closed, token by token: what the page of a batch shows.

`fiberpo_loss` and the baselines report shares; here is where they come from. The methods are those
of `pertoken train`:

| method | token gate | trajectory gate |
|---|---|---|
| ``fiberpo`` | residual of the token beyond the bounds | drift of its channel over the budget |
| ``grpo`` | ratio outside the token bounds, outwards | - |
| ``cispo`` | ratio above the bound and A > 0: the weight is cut, the gradient goes on | - |
| ``gspo`` | - | geometric mean of the ratios outside the bounds, outwards |

Outwards: in the direction of the advantage, as PPO's clip. The variants ``residual`` and ``censor``
of FiberPO gate outwards too; the paper's gates both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pertoken.errors import PertokenError, nearest
from pertoken.train._inputs import Inputs, checked, log_bounds
from pertoken.train.fiberpo import Bounds, Variant, _Gates

__all__ = ["LEVELS", "ClosedGates", "check_bounds", "closed_gates"]

LEVELS: Mapping[str, tuple[str, ...]] = {
    "fiberpo": ("token", "trajectory"),
    "grpo": ("token",),
    "gspo": ("trajectory",),
    "cispo": ("token",),
}
"""The levels that each method gates."""


@dataclass(frozen=True)
class ClosedGates:
    """Log ratios of a batch and the gates closed on them.

    log_ratio: [batch, time], nats, 0 under the mask. closed: level -> (low, high), each a boolean
    [batch, time]; a closed trajectory gate marks the tokens whose drift it holds. drift: (low,
    high), each [batch], how far the trajectory is down and up, in nats; for FiberPO as in the
    paper these are its two channels, else one number and its negative.
    """

    log_ratio: torch.Tensor
    closed: dict[str, tuple[torch.Tensor, torch.Tensor]]
    drift: tuple[torch.Tensor, torch.Tensor]


def closed_gates(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    method: str = "fiberpo",
    token: Bounds | None = None,
    trajectory: Bounds | None = None,
    variant: Variant = "paper",
) -> ClosedGates:
    """Find the closed gates of a batch, one trajectory a row.

    log_probs, old_log_probs, mask: [batch, time]; advantages: [batch] or [batch, time]; token,
    trajectory: bounds on the ratio at the levels the method has. PertokenError for inputs that the
    losses refuse, an unknown method, and bounds that are missing or not the method's.

    >>> log_probs = torch.tensor([[0.5, -0.5]])
    >>> found = closed_gates(
    ...     log_probs, torch.zeros(1, 2), torch.tensor([1.0]), torch.ones(1, 2),
    ...     method="grpo", token=(0.8, 1.2),
    ... )
    >>> [side.tolist() for side in found.closed["token"]]
    [[[False, False]], [[True, False]]]
    """
    check_bounds(method, token, trajectory)
    inputs = checked(log_probs.detach(), old_log_probs, advantages, mask)
    if token is not None and trajectory is not None:  # fiberpo alone has both
        return _fiberpo(inputs, token, trajectory, variant)
    mean = inputs.trajectories.mean(inputs.log_ratio)
    gated = inputs.log_ratio if token is not None else mean[:, None]
    low, high = log_bounds(token or trajectory or (0.0, torch.inf), LEVELS[method][0])
    below = (gated < low) & (inputs.advantages < 0)
    above = (gated > high) & (inputs.advantages > 0)
    keep = inputs.trajectories.mask
    return ClosedGates(
        inputs.log_ratio, {LEVELS[method][0]: (below & keep, above & keep)}, (-mean, mean)
    )


def check_bounds(method: str, token: Bounds | None, trajectory: Bounds | None) -> None:
    """Refuse an unknown method, and bounds that are missing, not the method's, or no bounds."""
    if method not in LEVELS:
        raise PertokenError(
            f"unknown method {method!r}{nearest(method, LEVELS)}; there is: {', '.join(LEVELS)}"
        )
    for level, bounds in (("token", token), ("trajectory", trajectory)):
        if level not in LEVELS[method]:
            if bounds is not None:
                raise PertokenError(f"{method} has no {level} gate: leave the {level} bounds out")
        elif bounds is None:
            raise PertokenError(f"{method} needs {level} bounds, such as (0.8, 1.25)")
        else:
            log_bounds(bounds, level)
    if method == "cispo" and token is not None and token[0] != 0:
        raise PertokenError(f"cispo has no lower bound: give (0, {token[1]:g}), not {token}")


def _fiberpo(inputs: Inputs, token: Bounds, trajectory: Bounds, variant: Variant) -> ClosedGates:
    log_ratio, keep = inputs.log_ratio, inputs.trajectories.mask
    gates = _Gates.of(inputs, {"trajectory": (None, trajectory)}, token, variant)
    up = log_ratio >= 0
    offsets = gates.offsets(gates.drift(log_ratio, up.to(log_ratio.dtype)))
    residual = log_ratio - gates.pick(offsets.centre, up.to(log_ratio.dtype))
    ((low, high),) = offsets.over
    if variant == "paper":  # each channel holds the tokens of its sign
        held = (low[:, None] & ~up & keep, high[:, None] & up & keep)
    else:
        held = (low[:, None] & keep, high[:, None] & keep)
    closed = {
        "token": ((residual < gates.low) & keep, (residual > gates.high) & keep),
        "trajectory": held,
    }
    return ClosedGates(log_ratio, closed, offsets.drift[0])

"""APC-Obj: trust-region optimisation of sampled data without a constraint (arXiv 2603.08239).

Sample-based TV-TRPO maximises sum A_i r_i under sum |r_i - 1| <= B and r >= 0, where B is twice
the number of samples times the radius in total variation. Two functions without a constraint have
the same maximum:

- the penalty sum A_i r_i - w max(0, sum |d_i| - B), d_i = r_i - 1, for every w >= max |A_i|:
  shrinking d onto the budget loses at most max |A_i| per unit of excess;
- the clip sum A_i (1 + clip(d_i, -rho_i, rho_i)) whose radius is the budget the other samples
  leave, rho_i = max(0, B - sum_{j != i} |d_j|). Over budget by e, every |d_i| becomes
  max(0, |d_i| - e), a feasible point, so the value is never above the optimum; within the budget
  nothing is clipped. A constant radius in its place is PPO's clip.

The clip is the paper's definition 3.2, equation 3, as an independent implementation states it (the
paper was seen by us as its abstract only); the penalty and the proofs above are ours. Both are
checked against linear programming in the tests.
"""

from __future__ import annotations

import torch

from pertoken.errors import PertokenError

__all__ = ["apc_clip", "tv_trpo_penalty"]


def apc_clip(ratio: torch.Tensor, advantages: torch.Tensor, budget: float) -> torch.Tensor:
    """The clip form: an objective to maximise, [...] for ratio and advantages [..., samples].

    budget: B, above 0, on the sum of |ratio - 1| over the last dimension. The gradient goes
    through the radius too: a sample over the budget is charged for closing the others. It is exact
    where ratios are 0 or above, as ratios are.

    >>> ratio, advantages = torch.tensor([1.5, 1.5]), torch.tensor([1.0, 2.0])
    >>> float(apc_clip(ratio, advantages, budget=1.0)), float(apc_clip(ratio, advantages, 0.5))
    (4.5, 3.0)
    """
    drift = _drift(ratio, advantages, budget)
    left = budget - drift.abs().sum(-1, keepdim=True) + drift.abs()
    radius = left.clamp(min=0)
    return (advantages * (1 + torch.maximum(torch.minimum(drift, radius), -radius))).sum(-1)


def tv_trpo_penalty(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    budget: float,
    weight: float | None = None,
) -> torch.Tensor:
    """The penalty form: an objective to maximise, [...] for ratio and advantages [..., samples].

    budget: as in `apc_clip`. weight: of the excess; the largest |advantage| where not given, and
    refused below it, since the maximum is another one there.

    >>> ratio, advantages = torch.tensor([1.5, 1.5]), torch.tensor([1.0, 2.0])
    >>> float(tv_trpo_penalty(ratio, advantages, budget=0.5))
    3.5
    """
    drift = _drift(ratio, advantages, budget)
    largest = advantages.abs().amax(-1)
    if weight is not None and not bool((largest <= weight).all()):
        raise PertokenError(
            f"the penalty is exact for a weight of at least the largest |advantage|, "
            f"{float(largest.max()):g}; got {weight:g}"
        )
    excess = (drift.abs().sum(-1) - budget).clamp(min=0)
    return (advantages * ratio).sum(-1) - (largest if weight is None else weight) * excess


def _drift(ratio: torch.Tensor, advantages: torch.Tensor, budget: float) -> torch.Tensor:
    if ratio.shape != advantages.shape or ratio.dim() == 0:
        raise PertokenError(
            "ratio and advantages must share a shape [..., samples], got "
            f"{tuple(ratio.shape)} and {tuple(advantages.shape)}"
        )
    if not budget > 0:
        raise PertokenError(f"budget must be above 0, got {budget:g}")
    return ratio - 1

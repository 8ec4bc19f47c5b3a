"""What FiberPO must satisfy exactly, as errors in float64 on random batches.

The batches lie on both sides of every bound; on-policy ones are exactly on-policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pertoken.train import (
    apc_clip,
    fiberpo_loss,
    fiberpo_ratio,
    gspo_loss,
    hierarchy_loss,
    policy_gradient_loss,
    reduce,
    tv_trpo_penalty,
)

VARIANTS = ("paper", "residual", "censor")
OPEN = (0.0, float("inf"))
ROWS, TIME = 6, 10
LEVELS: dict[str, Any] = {
    "token": (0.8, 1.28),
    "trajectory": (0.9, 1.1),
    "group": (0.93, 1.06),
    "domain": (0.95, 1.04),
    "group_ids": torch.tensor([0, 0, 1, 1, 2, 2]),
    "domain_ids": torch.tensor([0, 0, 0, 0, 1, 1]),
}
TWO: dict[str, Any] = {name: LEVELS[name] for name in ("token", "trajectory")}


def errors(seed: int, batches: int) -> dict[str, float]:
    """Identity -> the largest error over the batches and the three variants."""
    checks: dict[str, Callable[..., float]] = {
        "Jacobian on-policy = identity": _jacobian,
        "Jacobian between trajectories = 0": _between,
        "sum of the coefficients": _sum,
        "closed-form gradient = autograd's": _closed_form,
        "open gates = policy gradient": _open,
        "no room for residuals = GSPO": _gspo,
        "one and two levels = the named objectives": _depth,
        "micro-batches = one batch": _micro_batches,
    }
    found = dict.fromkeys([*checks, "APC-Obj, both forms = linear program"], 0.0)
    for number in range(seed, seed + batches):
        for variant in VARIANTS:
            batch = _Batch(number, variant)
            for name, check in checks.items():
                found[name] = max(found[name], check(batch))
        name = "APC-Obj, both forms = linear program"
        found[name] = max(found[name], _apc(number))
    return found


def first_order(seed: int) -> float:
    """Error of the linear surrogate at a step over that at half of it: 4 to first order."""
    ratios = []
    for variant in VARIANTS:
        batch = _Batch(seed, variant)
        direction = torch.where(batch.mask, batch.drift, 0.0)
        gaps = []
        for step in (2.0**-10, 2.0**-11):
            loss, _ = batch.loss(batch.old + step * direction, **LEVELS)
            linear = 1 + step * direction.sum(1) / batch.mask.sum(1)
            gaps.append(abs(float(loss.detach() + (batch.advantages * linear).mean())))
        ratios.append(gaps[0] / gaps[1])
    return min(ratios)


class _Batch:
    def __init__(self, seed: int, variant: str) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.variant: Any = variant
        self.old = normal(ROWS, TIME) - 3
        self.drift = 0.3 * normal(ROWS, TIME) + 0.15 * normal(ROWS, 1)
        lengths = torch.randint(1, TIME + 1, (ROWS,), generator=generator)
        self.mask = torch.arange(TIME) < lengths[:, None]
        self.advantages = normal(ROWS)

    @property
    def new(self) -> torch.Tensor:
        return (self.old + self.drift).requires_grad_()

    @property
    def args(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.old, self.advantages, self.mask

    def loss(self, new: torch.Tensor, **levels: Any) -> tuple[torch.Tensor, Any]:
        return fiberpo_loss(new, *self.args, variant=self.variant, **levels)

    def ratio(self, new: torch.Tensor, **levels: Any) -> torch.Tensor:
        return fiberpo_ratio(new, *self.args, variant=self.variant, **levels)


def _gradient(loss: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, at)
    return found


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).detach().abs().max())


def _both(batch: _Batch, loss: torch.Tensor, other: torch.Tensor, at: torch.Tensor) -> float:
    return max(_gap(loss, other), _gap(_gradient(loss, at), _gradient(other, at)))


def _jacobian(batch: _Batch) -> float:
    jacobian = torch.autograd.functional.jacobian(
        lambda new: batch.ratio(new, **LEVELS)[batch.mask], batch.old
    )
    return _gap(jacobian[:, batch.mask], torch.eye(int(batch.mask.sum()), dtype=torch.float64))


def _between(batch: _Batch) -> float:
    jacobian = torch.autograd.functional.jacobian(
        lambda new: batch.ratio(new, **TWO), batch.new.detach()
    )
    rows = torch.arange(ROWS)
    apart = jacobian.transpose(1, 2)[rows != rows[:, None]]
    return float(apart.abs().max())


def _sum(batch: _Batch) -> float:
    """The sum of a trajectory's coefficients is what moving all its tokens together changes."""
    new = batch.new
    total = _gradient(batch.loss(new, **TWO)[0], new).sum(1)
    step, moved = 1e-5, []
    for row in range(ROWS):
        shift = torch.zeros(ROWS, 1, dtype=torch.float64)
        shift[row] = step
        up = batch.loss(new.detach() + shift, **TWO)[0]
        down = batch.loss(new.detach() - shift, **TWO)[0]
        moved.append((up - down) / (2 * step))
    return _gap(total, torch.stack(moved))


def _closed_form(batch: _Batch) -> float:
    new = batch.new
    other = reduce(
        -batch.advantages[:, None] * batch.ratio(new, **LEVELS), batch.mask, "sequence_mean"
    )
    return _both(batch, batch.loss(new, **LEVELS)[0], other, new)


def _open(batch: _Batch) -> float:
    new = batch.new
    everything = dict.fromkeys(("token", "trajectory", "group", "domain"), OPEN)
    loss, _ = batch.loss(new, **{**LEVELS, **everything})
    return _both(batch, loss, policy_gradient_loss(new, *batch.args)[0], new)


def _gspo(batch: _Batch) -> float:
    if batch.variant != "paper":
        return 0.0  # their token gate is open inwards
    new, wide = batch.new, (0.01, 100.0)
    loss, _ = batch.loss(new, trajectory=wide, token=(1 - 1e-13, 1 + 1e-13))
    return _both(batch, loss, gspo_loss(new, *batch.args, trajectory=wide)[0], new)


def _depth(batch: _Batch) -> float:
    new = batch.new
    named: dict[str, Any] = {"trajectory": (None, TWO["trajectory"])}
    two, _ = hierarchy_loss(
        new, *batch.args, levels=named, token=TWO["token"], variant=batch.variant
    )
    one, _ = hierarchy_loss(new, *batch.args, levels={}, token=TWO["token"], variant=batch.variant)
    advantages = batch.advantages[:, None]
    log_ratio = torch.where(batch.mask, new - batch.old, 0.0)
    clip = log_ratio.clamp(*(math.log(bound) for bound in TWO["token"]))
    values = -advantages * torch.exp(clip)
    if batch.variant != "paper":
        values = torch.maximum(values, -advantages * torch.exp(log_ratio))
    wanted = reduce(values, batch.mask, "sequence_mean")
    return max(_both(batch, two, batch.loss(new, **TWO)[0], new), _both(batch, one, wanted, new))


def _micro_batches(batch: _Batch) -> float:
    worst = 0.0
    totals: dict[str, Any] = {"token_mean": batch.mask.sum(), "constant": 31.0}
    for how in ("token_mean", "sequence_mean", "sequence_sum", "constant"):
        new, total = batch.new, totals.get(how, ROWS)
        whole, _ = batch.loss(new, reduction=how, total=total, **TWO)
        parts = []
        for rows in (slice(0, 1), slice(1, 4), slice(4, ROWS)):
            part, _ = fiberpo_loss(
                new[rows],
                *(given[rows] for given in batch.args),
                variant=batch.variant,
                reduction=how,
                total=total,
                **TWO,
            )
            parts.append(part)
        worst = max(worst, _both(batch, whole, torch.stack(parts).sum(), new))
    return worst


def _apc(seed: int) -> float:
    """The linear program is solved by spending the budget where it earns most.

    A ratio may grow without end, but fall only to 0; so one sample takes what the samples with a
    larger negative advantage leave.
    """
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(7, generator=generator, dtype=torch.float64)
    budget = float(torch.rand((), generator=generator)) * 4 + 0.1
    left, drift = budget, torch.zeros(7, dtype=torch.float64)
    for i in advantages.abs().argsort(descending=True):
        spend = left if advantages[i] > 0 else min(left, 1.0)
        drift[i] = torch.sign(advantages[i]) * spend
        left -= spend
    best = float((advantages * (1 + drift)).sum())
    ratios = torch.rand(2000, 7, generator=generator, dtype=torch.float64) * 3
    worst = 0.0
    for form in (apc_clip, tv_trpo_penalty):
        over = float((form(ratios, advantages.expand_as(ratios), budget) - best).max())
        worst = max(worst, over, abs(float(form(1 + drift, advantages, budget)) - best))
    return worst

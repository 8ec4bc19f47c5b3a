"""FiberPO: the policy ratio of each token gated at two scales (arXiv 2603.08239).

Token-wise clipping (PPO, GRPO) does not see that a whole trajectory drifts; sequence-wise clipping
(GSPO) does not see one token that explodes. FiberPO splits the log ratio l of a token into the
drift of its trajectory and the rest, and gates both, each with a budget of its own.

With T tokens in a trajectory, and its tokens parted by the sign of l into two channels,

    S+ = 1/T sum max(l, 0),  S- = 1/T sum max(-l, 0),
    log G = g(S+, C+) - g(S-, C-) + clip(x) - clip(y)
    l >= 0: x = l - S+, y = -S-;    l < 0: x = l + S-, y = S+

g passes drift up to its budget C, falls back with slope T behind it and is 0 from C(1 + 1/T) on;
the loss is the mean over trajectories of the token means of -A G. While no bound is reached
log G = l, so near the sampling policy the gradient is the true one.

Source. These are eq. 1-5 of the JoyAI-LLM Flash report (arXiv 2604.03044, section 3.3.1), which
restates the two-level objective of arXiv 2603.08239 by the same authors; the paper itself was seen
by us as its abstract only. Ours: levels above the trajectory (the paper's FiberPO-Domain has four;
here the same gate acts on what each level drifts beyond the one above it, with the tokens of the
unit as slope), a token gate that need not be symmetric, and two other variants:

- ``variant="residual"``: one signed mean S = 1/T sum l instead of two channels, log G =
  clip(S) + clip(l - S), and only drift in the direction of the advantage is gated, as in PPO;
- ``variant="censor"``: the same, and a trajectory that is over its budget gives no gradient.

Against peers: PPO and GRPO clip l, GSPO clips S, CISPO never stops a gradient. In FiberPO a closed
trajectory gate stops the trajectory's common drift, not the differences between its tokens
(``censor`` stops both). Where all tokens drift alike G is GSPO's ratio; open bounds give A times
the ratio, the plain importance-weighted policy gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.autograd.function import once_differentiable

from pertoken.errors import PertokenError, nearest
from pertoken.train._inputs import Inputs, checked, log_bounds
from pertoken.train.hierarchy import Level, Tree, gate

__all__ = ["Stats", "Variant", "fiberpo_loss", "fiberpo_ratio", "hierarchy_loss"]

Bounds = tuple[float, float]
Stats = dict[str, torch.Tensor]
"""Name -> a scalar without gradient: what a loss did, level by level."""
Variant = Literal["paper", "residual", "censor"]
"""Of the gate: the paper's, and two of ours (see the module)."""


def fiberpo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    trajectory: Bounds,
    token: Bounds = (0.8, 1.25),
    group: Bounds | None = None,
    domain: Bounds | None = None,
    group_ids: torch.Tensor | None = None,
    domain_ids: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    variant: Variant = "paper",
    reduction: str = "sequence_mean",
    total: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, Stats]:
    """The loss to minimise, a scalar with gradient in `log_probs`, and what the gates did.

    log_probs, old_log_probs, mask: [batch, time], log p of the sampled tokens under the policy and
    under the policy that sampled them (no gradient), and which tokens count. advantages: [batch]
    or [batch, time]. Nothing under the mask is read.

    token, trajectory, group, domain: bounds (low, high) on the ratio at each level, low < 1 <
    high; the level's budgets are C- = -log(low) and C+ = log(high). `trajectory` has no default:
    the right one depends on the length of the texts and the size of the steps; GSPO's authors use
    0.0003 to 0.0004 around 1 for large models. The paper's token gate is symmetric in log space,
    as the default nearly is. group and domain need ids, [batch] or [batch, time], and whole
    groups in the batch: a group of one is refused.

    segment_ids: [batch, time], for packed rows, see `pertoken.train.Trajectories`. reduction,
    total: see `pertoken.train.reduce`.

    Stats per level: ``<level>/closed_low``, ``closed_high`` (share of tokens or trajectories whose
    drift is over the budget on that side) and ``drift_low``, ``drift_high`` (the largest drift,
    in nats). PertokenError before anything is computed for inputs that cannot be trained on.

    >>> log_probs = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]], requires_grad=True)
    >>> loss, stats = fiberpo_loss(
    ...     log_probs, log_probs.detach(), torch.tensor([1.0, -1.0]), torch.ones(2, 2),
    ...     trajectory=(0.9, 1.1),
    ... )
    >>> loss.backward()
    >>> log_probs.grad.tolist(), float(stats["trajectory/closed_high"])
    ([[-0.25, -0.25], [0.25, 0.25]], 0.0)
    """
    return hierarchy_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        levels=_levels(trajectory, group, domain, group_ids, domain_ids),
        token=token,
        segment_ids=segment_ids,
        variant=variant,
        reduction=reduction,
        total=total,
    )


def fiberpo_ratio(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    trajectory: Bounds,
    token: Bounds = (0.8, 1.25),
    group: Bounds | None = None,
    domain: Bounds | None = None,
    group_ids: torch.Tensor | None = None,
    domain_ids: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    variant: Variant = "paper",
) -> torch.Tensor:
    """The gated ratio G of every token, [batch, time], with gradient; 1 under the mask.

    Arguments as in `fiberpo_loss`, whose value is the reduced mean of ``-advantages * G``.
    """
    inputs = checked(log_probs, old_log_probs, advantages, mask, segment_ids)
    levels = _levels(trajectory, group, domain, group_ids, domain_ids)
    gates = _Gates.of(inputs, levels, token, variant)
    log_ratio = inputs.log_ratio
    up = (log_ratio >= 0).to(log_ratio.dtype)
    offsets = gates.offsets(gates.drift(log_ratio, up))
    inner = torch.clamp(log_ratio - gates.pick(offsets.centre, up), gates.low, gates.high)
    ratio = torch.exp(inner + gates.pick(offsets.shift, up))
    if variant == "censor":
        closed = gates.inputs.trajectories.spread(offsets.closed)
        ratio = torch.where(closed, ratio.detach(), ratio)
    return torch.where(inputs.trajectories.mask, ratio, 1.0)


def hierarchy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    levels: Mapping[str, Level],
    token: Bounds,
    segment_ids: torch.Tensor | None = None,
    variant: Variant = "paper",
    reduction: str = "sequence_mean",
    total: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, Stats]:
    """`fiberpo_loss` for a hierarchy of any depth.

    levels: name -> (ids, bounds) from the coarsest to the finest, ids as in `fiberpo_loss` or None
    for the trajectories themselves. No level at all leaves the token gate on the log ratio;
    ``{"trajectory": (None, bounds)}`` is FiberPO.
    """
    inputs = checked(log_probs.detach(), old_log_probs, advantages, mask, segment_ids)
    gates = _Gates.of(inputs, levels, token, variant)
    weights = inputs.trajectories.weights(reduction, total, inputs.log_ratio.dtype)
    stats: Stats = {}
    return _Loss.apply(log_probs, gates, weights, stats), stats


@dataclass(frozen=True)
class _Offsets:
    """What the levels above the token add: log G = clip(l - centre) + shift.

    centre, shift: [channels, trajectories]; closed: [trajectories], over a budget outwards;
    over: per level (low, high), which trajectories are over which budget; drift: per level.
    """

    centre: torch.Tensor
    shift: torch.Tensor
    closed: torch.Tensor
    over: list[tuple[torch.Tensor, torch.Tensor]]
    drift: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class _Gates:
    """The gates of one batch. low, high: of the token gate, numbers or [batch, time] or [batch, 1];
    sign: [trajectories], of the advantage."""

    inputs: Inputs
    tree: Tree
    variant: Variant
    token: Bounds
    low: Any
    high: Any
    sign: torch.Tensor

    @classmethod
    def of(
        cls, inputs: Inputs, levels: Mapping[str, Level], token: Bounds, variant: Variant
    ) -> _Gates:
        if variant not in get_args(Variant):
            raise PertokenError(
                f"unknown variant {variant!r}{nearest(variant, get_args(Variant))}; "
                f"there is: {', '.join(get_args(Variant))}"
            )
        low, high = log_bounds(token, "token")
        advantages, trajectories = inputs.advantages, inputs.trajectories
        if advantages.shape[1] == 1 and trajectories.index is None:
            sign = advantages[:, 0]
        else:
            sign = trajectories.mean(advantages)
        limits: tuple[Any, Any] = (low, high)
        if variant != "paper":
            infinite = torch.full_like(advantages, torch.inf)
            limits = (
                (-infinite).masked_fill(advantages < 0, low),
                infinite.masked_fill(advantages > 0, high),
            )
        tree = Tree.of(trajectories, levels)
        return cls(inputs, tree, variant, (low, high), *limits, sign.sign())

    def drift(self, log_ratio: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """S+ and S- of every trajectory, or its signed mean: [channels, trajectories].

        up: [batch, time], 1 for tokens of the + channel, 0 for the others. A log ratio of 0 is in
        the + channel: there every derivative is one-sided, and they sum to that of l itself.
        """
        trajectories = self.inputs.trajectories
        whole = trajectories.mean(log_ratio)
        if self.variant != "paper":
            return whole[None]
        rise = trajectories.dot(log_ratio, up) / trajectories.lengths.clamp(min=1)
        return torch.stack([rise, rise - whole])

    def pick(self, values: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Give every token the value of its trajectory and channel: [batch, time] or [batch, 1].

        By multiplication: on a CPU torch.where costs as much as a dozen such operations.
        """
        spread = self.inputs.trajectories.spread(values)
        if len(values) == 1:
            return spread[0]
        return torch.addcmul(spread[1], up, spread[0] - spread[1])

    def offsets(self, drift: torch.Tensor) -> _Offsets:
        """The gates of all levels above the token, applied to their drift."""
        if self.variant == "paper":
            return self._paper(drift)
        means = self.tree.means(drift)
        shift, closed = 0 * drift, torch.zeros_like(self.sign, dtype=torch.bool)
        over, sides = [], []
        for residual, (low, high) in zip(self.tree.residuals(means), self.tree.bounds, strict=True):
            shift = shift + gate(residual, low, high, sign=self.sign)
            below = (residual[0] < low) & (self.sign < 0)
            above = (residual[0] > high) & (self.sign > 0)
            closed = closed | below | above
            over.append((below, above))
            sides.append((-residual[0], residual[0]))
        return _Offsets(means[-1] if means else shift, shift, closed, over, sides)

    def _paper(self, drift: torch.Tensor) -> _Offsets:
        means = self.tree.means(drift)
        base, over, sides = 0 * drift[0], [], []
        for residual, (low, high), tokens in zip(
            self.tree.residuals(means), self.tree.bounds, self.tree.tokens, strict=True
        ):
            up, down = residual
            base = base + gate(up, -high, high, tokens) - gate(down, low, -low, tokens)
            over.append((down.abs() > -low, up.abs() > high))
            sides.append((down, up))
        up, down = means[-1] if means else 0 * drift
        low, high = self.token
        centre = torch.stack([up, -down])
        shift = torch.stack([base - (-down).clamp(low, high), base - up.clamp(low, high)])
        closed = torch.zeros_like(self.sign, dtype=torch.bool)
        return _Offsets(centre, shift, closed, over, sides)


class _Loss(torch.autograd.Function):
    """The loss with its gradient in closed form.

    A token moves the objective through its own residual and through the drift of its trajectory.
    The drift is a few numbers per trajectory: autograd takes the levels above the token, and what
    is as long as the batch is written out, in about the passes of a clipped ratio.
    """

    @staticmethod
    def forward(
        ctx: Any,
        log_probs: torch.Tensor,
        gates: _Gates,
        weights: torch.Tensor,
        stats: Stats,
    ) -> torch.Tensor:
        inputs, trajectories = gates.inputs, gates.inputs.trajectories
        log_ratio = inputs.log_ratio
        mask = trajectories.mask.to(log_ratio.dtype)
        up = (log_ratio >= 0).to(log_ratio.dtype)
        drift = gates.drift(log_ratio, up).requires_grad_()
        with torch.enable_grad():
            offsets = gates.offsets(drift)
        residual = log_ratio.sub_(gates.pick(offsets.centre.detach(), up)).mul_(mask)
        below, above = residual < gates.low, residual > gates.high
        _report(stats, gates, offsets, residual, below, above)

        # Each token's part of the loss; then the same without the tokens whose gate is closed.
        parts = residual.clamp_(gates.low, gates.high)
        parts = parts.add_(gates.pick(offsets.shift.detach(), up)).exp_()
        parts = parts.mul_(trajectories.spread(-weights) * inputs.advantages).mul_(mask)
        sums = trajectories.sum(parts)
        loss = sums.sum()
        if gates.variant == "censor":
            shut = trajectories.spread(offsets.closed)
            parts, sums = parts.mul_(~shut), sums.masked_fill(offsets.closed, 0.0)
        through = parts * below.logical_or_(above).logical_not_()

        by_shift, by_centre = sums[None], -trajectories.sum(through)[None]
        if len(drift) == 2:
            first, second = trajectories.dot(parts, up), -trajectories.dot(through, up)
            by_shift = torch.cat([first[None], by_shift - first])
            by_centre = torch.cat([second[None], by_centre - second])
        (by_drift,) = torch.autograd.grad(
            [offsets.centre, offsets.shift], drift, [by_centre, by_shift]
        )
        signs = by_drift.new_tensor([1.0, -1.0])[: len(drift), None]
        by_drift = by_drift * signs / trajectories.lengths.clamp(min=1)
        gradient = through.add_(gates.pick(by_drift, up)).mul_(mask)
        ctx.save_for_backward(gradient)
        ctx.dtype = log_probs.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[0]).to(ctx.dtype), None, None, None


def _report(
    stats: Stats,
    gates: _Gates,
    offsets: _Offsets,
    residual: torch.Tensor,
    below: torch.Tensor,
    above: torch.Tensor,
) -> None:
    """Write share closed and largest drift of every level and side into `stats`."""
    trajectories = gates.inputs.trajectories
    alive = trajectories.lengths > 0
    for name, (low, high), (down, up) in zip(
        gates.tree.names, offsets.over, offsets.drift, strict=True
    ):
        stats[f"{name}/closed_low"] = low[alive].to(residual.dtype).mean()
        stats[f"{name}/closed_high"] = high[alive].to(residual.dtype).mean()
        stats[f"{name}/drift_low"] = down.detach()[alive].max()
        stats[f"{name}/drift_high"] = up.detach()[alive].max()
    tokens = trajectories.lengths.sum()
    stats["token/closed_low"] = torch.count_nonzero(below) / tokens
    stats["token/closed_high"] = torch.count_nonzero(above) / tokens
    least, most = residual.aminmax()  # 0 under the mask, within every bound
    stats["token/drift_low"], stats["token/drift_high"] = -least, most


def _levels(
    trajectory: Bounds,
    group: Bounds | None,
    domain: Bounds | None,
    group_ids: torch.Tensor | None,
    domain_ids: torch.Tensor | None,
) -> dict[str, Level]:
    levels: dict[str, Level] = {}
    for name, bounds, ids in (("domain", domain, domain_ids), ("group", group, group_ids)):
        if bounds is None:
            continue
        if ids is None:
            raise PertokenError(f"{name}= is a gate on {name}s: pass {name}_ids= too")
        levels[name] = (ids, bounds)
    levels["trajectory"] = (None, trajectory)
    return levels

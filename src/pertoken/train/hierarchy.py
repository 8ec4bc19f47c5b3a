"""The gating hierarchy under FiberPO: levels, their drift, and the gates on it.

A batch is a tree: domains hold prompt groups, groups hold trajectories, trajectories hold tokens.
The drift of a trajectory is the mean log ratio of its tokens, that of a group the mean of its
trajectories, and so on. What a level drifts *beyond the level above it* is its residual; the
residuals of a token's levels sum to the log ratio of the token. Every level has a gate of its own
on its own residual, so the budgets do not share a bound, and with all gates open the sum is the
log ratio again. Any number of levels is the same computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pertoken.errors import PertokenError
from pertoken.train._inputs import log_bounds
from pertoken.train.reducer import Trajectories

__all__ = ["Level", "Tree", "gate", "log_ratio_levels"]

Level = tuple[torch.Tensor | None, tuple[float, float]]
"""(ids of who belongs together, None for a token by itself; bounds on the ratio)."""


def gate(
    x: torch.Tensor,
    low: float,
    high: float,
    slope: float | torch.Tensor = 0.0,
    sign: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pass `x` within [low, high]; beyond, hold the bound or fall back from it towards 0.

    x: any shape, in log space; low < 0 < high. slope: 0 holds the bound (clip); above 0 the output
    falls with that slope behind the bound and stays at 0 once it is there, so that the gradient
    pulls back (g^agg, eq. 4 of arXiv 2604.03044, has the number of tokens here). sign: of the
    advantage; then only drift in its direction is gated, as PPO's clip does.

    >>> gate(torch.tensor([-3.0, 0.5, 1.0, 1.25, 3.0]), -1.0, 1.0, slope=2.0).tolist()
    [0.0, 0.5, 1.0, 0.5, 0.0]
    >>> gate(torch.tensor([3.0, 3.0]), -1.0, 1.0, sign=torch.tensor([1.0, -1.0])).tolist()
    [1.0, 3.0]
    """
    above, below = x > high, x < low
    if sign is not None:
        above, below = above & (sign > 0), below & (sign < 0)
    behind = slope * ((x - high).clamp(min=0) - (low - x).clamp(min=0))
    held = x.clamp(low, high) - behind
    return torch.where(above, held.clamp(min=0), torch.where(below, held.clamp(max=0), x))


@dataclass(frozen=True)
class Tree:
    """The levels above the token, from the coarsest to the finest.

    names; units: [trajectories], the unit each trajectory belongs to at that level, None where
    it is one itself; bounds: on the log ratio; lengths: [trajectories], tokens of each; tokens:
    of the unit, per level.
    """

    names: list[str]
    units: list[torch.Tensor | None]
    bounds: list[tuple[float, float]]
    lengths: torch.Tensor
    tokens: list[torch.Tensor]

    @classmethod
    def of(cls, trajectories: Trajectories, levels: Mapping[str, Level]) -> Tree:
        """Build the tree of `levels`, name -> (ids, bounds), from the coarsest to the finest.

        ids: [batch], or [batch, time] for packed rows; None for the trajectories themselves.
        Raises PertokenError for ids of another shape, a unit that lies in two units of the level
        above, and a "group" of one trajectory.
        """
        alive = trajectories.lengths > 0
        units: list[torch.Tensor | None] = []
        tokens: list[torch.Tensor] = []
        above: tuple[str, torch.Tensor] | None = None
        for depth, (name, (ids, _)) in enumerate(levels.items()):
            if ids is None:
                if depth + 1 < len(levels):
                    raise PertokenError(f"{name} without ids is the trajectories: put it last")
                units.append(None)
                tokens.append(trajectories.lengths)
                continue
            found = trajectories.collect(ids, f"{name}_ids")
            unit = torch.unique(found, return_inverse=True)[1]
            _check_members(name, found, unit, alive)
            if above is not None:
                _check_nested(name, unit[alive], above[0], above[1][alive])
            above = name, unit
            units.append(unit)
            tokens.append(torch.bincount(unit, trajectories.lengths)[unit])
        bounds = [log_bounds(bounds, name) for name, (_, bounds) in levels.items()]
        return cls(list(levels), units, bounds, trajectories.lengths, tokens)

    def means(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Mean of every level, each at the resolution of trajectories: [channels, trajectories].

        values: [channels, trajectories], means over the tokens. A level's mean is over the units
        of the level below it, each counting once; trajectories without tokens do not count.
        """
        below = torch.arange(values.shape[1], device=values.device)
        current, counts = values, (self.lengths > 0).to(values.dtype)
        found = []
        for unit in reversed(self.units):
            if unit is None:
                found.append(values)
                continue
            size = int(unit.max()) + 1
            parent = unit.new_zeros(current.shape[1]).index_copy(0, below, unit)
            members = counts.new_zeros(size).index_add(0, parent, counts)
            sums = current.new_zeros(len(current), size).index_add(1, parent, current * counts)
            current = sums / members.clamp(min=1)
            counts = (members > 0).to(counts.dtype)
            below = unit
            found.append(current[:, unit])
        return found[::-1]

    def residuals(self, means: list[torch.Tensor]) -> list[torch.Tensor]:
        """What every level drifts beyond the level above it; the coarsest as it is."""
        return [mean if depth == 0 else mean - means[depth - 1] for depth, mean in enumerate(means)]


def log_ratio_levels(
    log_ratio: torch.Tensor,
    mask: torch.Tensor,
    levels: Mapping[str, torch.Tensor | None] | None = None,
    *,
    segment_ids: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Split each token's log ratio into what its levels add: name -> [batch, time], a sum.

    log_ratio, mask: [batch, time], nats. levels: name -> ids, from the coarsest to the finest, see
    `Tree.of`; the trajectories alone where not given. The last entry is "token", its residual.
    Everything is 0 under the mask.

    >>> parts = log_ratio_levels(torch.tensor([[0.25, 0.75]]), torch.ones(1, 2))
    >>> {name: part.tolist() for name, part in parts.items()}
    {'trajectory': [[0.5, 0.5]], 'token': [[-0.25, 0.25]]}
    """
    trajectories = Trajectories(mask, segment_ids)
    keep = trajectories.mask
    log_ratio = torch.where(keep, log_ratio, 0.0)
    chosen = {"trajectory": None} if levels is None else levels
    tree = Tree.of(trajectories, {name: (ids, (0.5, 2.0)) for name, ids in chosen.items()})
    parts: dict[str, torch.Tensor] = {}
    left = log_ratio
    means = tree.means(trajectories.mean(log_ratio)[None])
    for name, residual in zip(tree.names, tree.residuals(means), strict=True):
        parts[name] = torch.where(keep, trajectories.spread(residual[0]), 0.0)
        left = left - parts[name]
    return {**parts, "token": left}


def _check_members(name: str, ids: torch.Tensor, unit: torch.Tensor, alive: torch.Tensor) -> None:
    if name != "group":
        return
    alone = torch.bincount(unit[alive], minlength=int(unit.max()) + 1)[unit] == 1
    if bool((alone & alive).any()):
        which = int(ids[alone & alive][0])
        raise PertokenError(
            f"group {which} has a single trajectory here, so its gate and the trajectory's would "
            "be one: pass whole groups, or leave group=None"
        )


def _check_nested(name: str, unit: torch.Tensor, above: str, parent: torch.Tensor) -> None:
    pairs = torch.unique(torch.stack([unit, parent]), dim=1).shape[1]
    if pairs != len(torch.unique(unit)):
        raise PertokenError(f"a {name} lies in two units of the level {above!r}: levels must nest")

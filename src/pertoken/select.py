"""Which tokens to keep, given a score or a feature vector for each of them.

Every rule gives a bool mask [batch, time] that is True for what is kept, so rows may keep different
numbers of tokens; `indices` turns a mask into places. `candidates` [batch, time] leaves padding
and whatever may not be chosen out. Ties go to the earlier token; a budget beyond the candidates
keeps all of them; a NaN among the candidates is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pertoken.errors import PertokenError

__all__ = [
    "budget_of",
    "grid",
    "indices",
    "k_center",
    "max_min",
    "mmr",
    "random",
    "rounded_up",
    "threshold",
    "top_k",
    "top_p",
    "top_share",
]

_CHUNK = 4096  # rows of a distance matrix that are there at once


def budget_of(count: int, share: float) -> int:
    """Tokens that a share in (0, 1] of `count` tokens is; halves go to the even number.

    >>> budget_of(10, 0.6), budget_of(5, 0.5), budget_of(7, 0.5)
    (6, 2, 4)
    """
    if not 0 < share <= 1:
        raise PertokenError(f"the share to keep must be above 0 and at most 1, got {share}")
    return round(count * share)


def indices(kept: torch.Tensor) -> torch.Tensor:
    """Places [batch, kept] of the True values, in order; every row must have as many.

    >>> indices(torch.tensor([[True, False, True], [False, True, True]])).tolist()
    [[0, 2], [1, 2]]
    """
    counts = kept.sum(1)
    if int(counts.min()) != int(counts.max()):
        raise PertokenError(
            f"rows keep {int(counts.min())} to {int(counts.max())} tokens: places of equal "
            "number are wanted; use the mask"
        )
    return kept.nonzero()[:, 1].view(kept.shape[0], -1)


def top_k(
    scores: torch.Tensor, budget: int, candidates: torch.Tensor | None = None
) -> torch.Tensor:
    """The `budget` highest scores [batch, time] of each row.

    >>> top_k(torch.tensor([[0.1, 0.5, 0.5, 0.3]]), 2).int().tolist()
    [[0, 1, 1, 0]]
    """
    scores, candidates = _checked(scores, candidates, budget)
    return _highest(
        scores, candidates, torch.full_like(candidates[:, :1], budget, dtype=torch.long)
    )


def top_share(
    scores: torch.Tensor, share: float, candidates: torch.Tensor | None = None
) -> torch.Tensor:
    """The highest scores [batch, time] of each row: ⌈share · n⌉ of its n candidates.

    share: in (0, 1]. Unlike `top_k` rows of other lengths keep other numbers.

    >>> candidates = torch.tensor([[True, True, True, True], [True, True, False, False]])
    >>> top_share(torch.tensor([[0.1, 0.5, 0.5, 0.3]] * 2), 0.5, candidates).int().tolist()
    [[0, 1, 1, 0], [0, 1, 0, 0]]
    """
    scores, candidates = _checked(scores, candidates)
    return _highest(scores, candidates, rounded_up(candidates.sum(1, keepdim=True), share))


def rounded_up(counts: torch.Tensor, share: float) -> torch.Tensor:
    """⌈share · counts⌉, a whole product never rounded up by its floating-point error.

    >>> rounded_up(torch.tensor([10, 20, 3, 0]), 0.55).tolist()
    [6, 11, 2, 0]
    """
    if not 0 < share <= 1:
        raise PertokenError(f"the share to keep must be above 0 and at most 1, got {share}")
    return (counts.double() * share - 1e-9).ceil().long()


def top_p(
    scores: torch.Tensor, mass: float, candidates: torch.Tensor | None = None
) -> torch.Tensor:
    """The fewest highest scores that hold at least `mass` in (0, 1] of the row's sum.

    Raises PertokenError for negative scores; a row without any positive score keeps all.

    >>> top_p(torch.tensor([[0.1, 0.5, 0.2, 0.2]]), 0.6).int().tolist()
    [[0, 1, 1, 0]]
    """
    if not 0 < mass <= 1:
        raise PertokenError(f"the mass to keep must be above 0 and at most 1, got {mass}")
    scores, candidates = _checked(scores, candidates)
    if bool((scores[candidates] < 0).any()):
        raise PertokenError("top-p needs scores of at least 0")
    filled = scores.double().masked_fill(~candidates, 0.0)
    order = filled.argsort(dim=1, descending=True, stable=True)
    sorted_scores = filled.gather(1, order)
    before = sorted_scores.cumsum(1) - sorted_scores
    total = filled.sum(1, keepdim=True)
    # Sums are rounded: what is short of the mass by rounding only is enough.
    needed = before < mass * total * (1 - 1e-12)
    kept = torch.zeros_like(candidates).scatter_(1, order, needed)
    return candidates & (kept | (total <= 0))


def threshold(
    scores: torch.Tensor, least: float, candidates: torch.Tensor | None = None
) -> torch.Tensor:
    """All scores [batch, time] of at least `least`."""
    scores, candidates = _checked(scores, candidates)
    return candidates & (scores >= least)


def random(candidates: torch.Tensor, budget: int, *, seed: int = 0) -> torch.Tensor:
    """`budget` candidates [batch, time] of each row, every set of them equally likely."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(candidates.shape, generator=generator, dtype=torch.float64)
    return top_k(draw.to(candidates.device), budget, candidates)


def grid(candidates: torch.Tensor, budget: int) -> torch.Tensor:
    """`budget` candidates of each row, evenly spread over them.

    >>> grid(torch.ones(1, 6, dtype=torch.bool), 3).int().tolist()
    [[0, 1, 0, 1, 0, 1]]
    """
    _checked(candidates, None, budget)
    count = candidates.sum(1, keepdim=True)
    number = candidates.cumsum(1) - 1
    few = count.clamp(max=budget)
    # Candidate i is taken where the i-th of `count` equal steps ends a step of `few`.
    taken = ((number + 1) * few) // count.clamp(min=1) > (number * few) // count.clamp(min=1)
    return candidates & taken


def mmr(
    scores: torch.Tensor,
    features: torch.Tensor,
    budget: int,
    *,
    weight: float = 0.5,
    candidates: torch.Tensor | None = None,
) -> torch.Tensor:
    """Maximal marginal relevance: relevant tokens that are not like those kept already.

    Greedily takes the token with the largest weight·score − (1 − weight)·(largest cosine to a kept
    one), scores [batch, time], features [batch, time, hidden]. Source: Carbonell and Goldstein
    1998. Work is budget · time · hidden.
    """
    if not 0 <= weight <= 1:
        raise PertokenError(f"the weight of the scores must be 0 to 1, got {weight}")
    scores, candidates = _checked(scores, candidates, budget)
    unit = _unit(features, candidates)

    def gain(nearest: torch.Tensor | None) -> torch.Tensor:
        own = weight * scores.to(unit.dtype)
        return own if nearest is None else own - (1 - weight) * nearest

    return _greedy(unit, budget, candidates, gain)


def k_center(
    scores: torch.Tensor,
    features: torch.Tensor,
    budget: int,
    *,
    candidates: torch.Tensor | None = None,
) -> torch.Tensor:
    """Greedy k-centre: begins with the highest score, then takes the token furthest from all kept.

    Distance is 1 − cosine. Source: Gonzalez 1985 (farthest-point traversal, within twice the best
    covering radius for a metric).
    """
    scores, candidates = _checked(scores, candidates, budget)
    unit = _unit(features, candidates)

    def gain(nearest: torch.Tensor | None) -> torch.Tensor:
        return scores.to(unit.dtype) if nearest is None else -nearest

    return _greedy(unit, budget, candidates, gain)


def max_min(
    features: torch.Tensor, budget: int, *, candidates: torch.Tensor | None = None
) -> torch.Tensor:
    """Max-min diversity: begins with the token whose nearest other is furthest, then as `k_center`.

    No scores: what is kept only has to differ.
    """
    _, candidates = _checked(features[..., 0], candidates, budget)
    unit = _unit(features, candidates)
    first = torch.empty(candidates.shape, dtype=unit.dtype, device=unit.device)
    own = torch.arange(unit.shape[1], device=unit.device)
    for begin in range(0, unit.shape[1], _CHUNK):
        part = unit[:, begin : begin + _CHUNK]
        cosine = part @ unit.transpose(1, 2)
        cosine.masked_fill_(~candidates[:, None], -torch.inf)
        cosine.masked_fill_(own[begin : begin + _CHUNK, None] == own, -torch.inf)
        first[:, begin : begin + _CHUNK] = -cosine.amax(2)

    def gain(nearest: torch.Tensor | None) -> torch.Tensor:
        return first if nearest is None else -nearest

    return _greedy(unit, budget, candidates, gain)


def _highest(scores: torch.Tensor, candidates: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
    """The highest candidates, budgets [batch, 1] of them in each row."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    # A second stable sort puts what may not be chosen behind all candidates, whatever its score.
    last = (~candidates).gather(1, order).byte().argsort(dim=1, stable=True)
    chosen = torch.arange(order.shape[1], device=order.device) < budgets
    return candidates & torch.zeros_like(candidates).scatter(1, order.gather(1, last), chosen)


def _greedy(
    unit: torch.Tensor,
    budget: int,
    candidates: torch.Tensor,
    gain: Callable[[torch.Tensor | None], torch.Tensor],
) -> torch.Tensor:
    """Takes the token of the largest gain, again and again.

    gain: of each token, from its largest cosine to one that is kept; None while none is.
    """
    kept = torch.zeros_like(candidates)
    nearest: torch.Tensor | None = None
    rows = torch.arange(len(unit), device=unit.device)
    for _ in range(min(budget, int(candidates.sum(1).max()))):
        free = candidates & ~kept
        best = gain(nearest).masked_fill(~free, -torch.inf).argmax(1)
        kept[rows, best] |= free.any(1)  # a short row has nothing left
        cosine = (unit @ unit[rows, best].unsqueeze(-1)).squeeze(-1)
        nearest = cosine if nearest is None else torch.maximum(nearest, cosine)
    return kept


def _unit(features: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Features of length 1, in float32 or better; zero where there is nothing to choose."""
    if features.dim() != 3 or features.shape[:2] != candidates.shape:
        raise PertokenError(
            f"features must be [batch, time, hidden] for scores {list(candidates.shape)}, got "
            f"{list(features.shape)}"
        )
    wide = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    if not bool(torch.isfinite(wide[candidates]).all()):
        raise PertokenError("a feature is NaN or infinite")
    wide = wide.masked_fill(~candidates.unsqueeze(-1), 0.0)
    return torch.nn.functional.normalize(wide, dim=-1)


def _checked(
    scores: torch.Tensor, candidates: torch.Tensor | None, budget: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    if scores.dim() != 2:
        raise PertokenError(f"scores must be [batch, time], got {list(scores.shape)}")
    if budget < 1:
        raise PertokenError(f"the budget must be 1 token or more, got {budget}")
    if candidates is None:
        candidates = torch.ones_like(scores, dtype=torch.bool)
    if candidates.shape != scores.shape:
        raise PertokenError(
            f"candidates {list(candidates.shape)} do not fit scores {list(scores.shape)}"
        )
    candidates = candidates.bool()
    if scores.is_floating_point() and bool(scores[candidates].isnan().any()):
        raise PertokenError("a score is NaN")
    return scores, candidates

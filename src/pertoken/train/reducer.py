"""From one loss per token to one number: the reducer that every loss of this family uses.

The normaliser decides which tokens count how much, and it must not depend on how a batch was cut
into micro-batches. So every reduction is a sum divided by `total`, and `total` can be given: the
tokens or the sequences of the whole accumulated batch. Then the losses of the micro-batches add
up to the loss of the batch, gradients too.

| how | value | `total`, by default from this batch |
|---|---|---|
| ``token_mean`` | sum over tokens / total | unmasked tokens |
| ``sequence_mean`` | sum over sequences of their token means / total | sequences with tokens |
| ``sequence_sum`` | sum over tokens / total | sequences with tokens |
| ``constant`` | sum over tokens / total | must be given |

Values under the mask are replaced, never multiplied by zero: NaN and infinity there do no harm.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from pertoken.errors import PertokenError, nearest

__all__ = ["Reduction", "Trajectories", "reduce", "weighted_nll"]

Reduction = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]
"""How losses of tokens become one number, see `reduce`."""


class Trajectories:
    """Which trajectory every token belongs to: one per row, or several in a packed row.

    mask: [batch, time], true where a token counts. segment_ids: [batch, time] integers that tell
    the trajectories of a row apart; None where every row is one. Only tokens under a true mask
    are looked at.
    """

    def __init__(self, mask: torch.Tensor, segment_ids: torch.Tensor | None = None) -> None:
        if mask.dim() != 2:
            raise PertokenError(f"mask must be [batch, time], got shape {tuple(mask.shape)}")
        self.mask = mask if mask.dtype == torch.bool else mask != 0
        self.index: torch.Tensor | None = None
        self.lengths = torch.count_nonzero(
            self.mask, dim=1
        )  # tokens of each trajectory, [trajectories]
        if segment_ids is None:
            if not bool(self.lengths.any()):
                raise PertokenError("the mask hides every token: nothing to train on")
            return
        if segment_ids.shape != mask.shape:
            raise PertokenError(
                f"segment_ids must be [batch, time] like mask {tuple(mask.shape)}, "
                f"got {tuple(segment_ids.shape)}"
            )
        if not bool(self.lengths.any()):
            raise PertokenError("the mask hides every token: nothing to train on")
        rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
        pairs = torch.stack([rows[self.mask], segment_ids[self.mask].long()], dim=1)
        found, number = torch.unique(pairs, dim=0, return_inverse=True)
        self.index = torch.zeros_like(mask, dtype=torch.long)
        self.index[self.mask] = number
        self.lengths = torch.bincount(number, minlength=len(found))

    def __len__(self) -> int:
        return len(self.lengths)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of the tokens of each trajectory: [batch, time] -> [trajectories].

        values must be 0 under the mask.
        """
        if self.index is None:
            return values.sum(1)
        return values.new_zeros(len(self)).index_add(0, self.index.flatten(), values.flatten())

    def dot(self, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum of values times weights over the tokens of each trajectory."""
        if self.index is None:
            return torch.linalg.vecdot(values, weights)
        return self.sum(values * weights)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of the tokens of each trajectory, 0 where it has none."""
        return self.sum(values) / self.lengths.clamp(min=1)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Give every token the value of its trajectory: [..., trajectories] -> [..., batch, time].

        Without packing the last dimension is left at 1, to be broadcast.
        """
        if self.index is None:
            return values[..., None]
        return values[..., self.index]

    def collect(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """One value per trajectory from [batch] or [batch, time], which must agree within each.

        Raises PertokenError where they do not, or the shape is another.
        """
        if values.dim() == 1 and self.index is None and len(values) == len(self):
            return values
        if values.shape != self.mask.shape:
            wanted = "[batch, time]" if self.index is not None else "[batch] or [batch, time]"
            raise PertokenError(f"{name} must be {wanted}, got shape {tuple(values.shape)}")
        index = self.index
        if index is None:
            index = torch.arange(len(self), device=values.device)[:, None].expand_as(values)
        found = values.new_zeros(len(self))
        found[index[self.mask]] = values[self.mask]
        if not torch.equal(found[index[self.mask]], values[self.mask]):
            raise PertokenError(f"{name} differs between tokens of one trajectory")
        return found

    def weights(
        self, how: str, total: float | torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """What one token of each trajectory counts in the reduction `how`: [trajectories]."""
        if how not in get_args(Reduction):
            raise PertokenError(
                f"unknown reduction {how!r}{nearest(how, get_args(Reduction))}; "
                f"there is: {', '.join(get_args(Reduction))}"
            )
        if total is None:
            if how == "constant":
                raise PertokenError('reduction "constant" needs total=, the number to divide by')
            total = self.lengths.sum() if how == "token_mean" else (self.lengths > 0).sum()
        elif not bool(torch.as_tensor(total) > 0):
            raise PertokenError(f"total must be above 0, got {float(total)}")
        share = torch.ones_like(self.lengths, dtype=dtype) / total
        if how == "sequence_mean":
            share = share / self.lengths.clamp(min=1)
        return share.to(dtype)


def reduce(
    values: torch.Tensor,
    mask: torch.Tensor,
    how: str = "token_mean",
    total: float | torch.Tensor | None = None,
    *,
    segment_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reduce one value per token to a scalar, see the table above.

    values, mask: [batch, time]; segment_ids: [batch, time] where rows are packed, see
    `Trajectories`. total: the normaliser; give that of the whole accumulated batch when this is
    a micro-batch of it. Sums are taken in float32 for half precision. PertokenError for another
    shape, an unknown `how`, a mask that hides everything.

    >>> values = torch.tensor([[1.0, 3.0, float("nan")], [4.0, 4.0, 4.0]])
    >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    >>> [round(float(reduce(values, mask, how)), 2) for how in ("token_mean", "sequence_mean")]
    [3.2, 3.0]
    >>> float(reduce(values, mask, "constant", total=8))
    2.0
    """
    if values.shape != mask.shape:
        raise PertokenError(
            f"values and mask must both be [batch, time], got {tuple(values.shape)} "
            f"and {tuple(mask.shape)}"
        )
    trajectories = Trajectories(mask, segment_ids)
    values = torch.where(trajectories.mask, widened(values), 0.0)
    return (trajectories.sum(values) * trajectories.weights(how, total, values.dtype)).sum()


def weighted_nll(
    log_probs: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    normalizer: Literal["tokens", "weights"] = "tokens",
    *,
    total: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Negative log-likelihood in nats with one weight per token, as a scalar.

    log_probs, weights, mask: [batch, time], where column t holds log p(token t+1 | tokens <= t);
    the weight of token i therefore sits in column i-1. normalizer: divide by the unmasked
    "tokens" or by the sum of the "weights"; total: that number for the whole accumulated batch.

    A weight of 0 takes a token's gradient away; with "tokens" it still counts in the divisor,
    with "weights" it does not. A negative weight lowers a token's probability, without bound;
    "weights" refuses a sum that is not above 0. Weights of 1 are the ordinary mean loss.

    >>> log_probs = torch.log(torch.tensor([[0.5, 0.25]]))
    >>> ones = torch.ones(1, 2)
    >>> round(float(weighted_nll(log_probs, torch.tensor([[1.0, 0.0]]), ones)), 4)
    0.3466
    >>> round(float(weighted_nll(log_probs, torch.tensor([[1.0, 0.0]]), ones, "weights")), 4)
    0.6931
    """
    if not log_probs.shape == weights.shape == mask.shape:
        raise PertokenError(
            "log_probs, weights and mask must share the shape [batch, time], got "
            f"{tuple(log_probs.shape)}, {tuple(weights.shape)} and {tuple(mask.shape)}"
        )
    if normalizer not in ("tokens", "weights"):
        raise PertokenError(f'normalizer must be "tokens" or "weights", got {normalizer!r}')
    keep = Trajectories(mask).mask
    weights = torch.where(keep, widened(weights), 0.0)
    log_probs = torch.where(keep, widened(log_probs), 0.0)
    must_be_finite(weights, "weights")
    must_be_finite(log_probs, "log_probs")
    if total is None:
        total = keep.sum() if normalizer == "tokens" else weights.sum()
    if not bool(torch.as_tensor(total) > 0):
        raise PertokenError(f"the {normalizer} to divide by sum to {float(total)}, not above 0")
    return -(weights * log_probs).sum() / total


def widened(values: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def must_be_finite(values: torch.Tensor, name: str) -> None:
    """Raise PertokenError where `values` (0 under the mask) hold NaN or infinity."""
    # One sum is finite when all are; only an overflow needs the second look.
    if bool(torch.isfinite(values.detach().sum())):
        return
    bad = (~torch.isfinite(values.detach())).nonzero()
    if len(bad):
        where = ", ".join(str(int(i)) for i in bad[0])
        raise PertokenError(f"{name} is NaN or infinite at [{where}] ({len(bad)} such values)")

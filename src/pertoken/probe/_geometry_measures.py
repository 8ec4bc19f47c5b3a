"""How near a tokenwise map comes to a layer, and whether its error goes with the output's change.

Geometry: cosines, angles and energies of a layer's output y, the tokenwise part T(x) and the
residual r = y - T(x), each the mean over tokens. Function: Spearman's rank correlation over tokens,
with an interval from resampled documents, since tokens of one text are alike.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from pertoken._bootstrap import Interval, bootstrap

Floats = NDArray[np.float64]
DRAWS = 500  # of documents, for an interval
_OUTLIER = 5.0  # mean size over the median dimension's (our reading)


def outlier_dimensions(outputs: torch.Tensor) -> torch.Tensor:
    """The dimensions that are large on nearly all tokens [tokens, hidden]: bool [hidden].

    Those whose mean absolute value is over 5 times that of the median dimension.

    >>> outlier_dimensions(torch.tensor([[1.0, 1, 1, 9], [1, -1, 1, -9]])).tolist()
    [False, False, False, True]
    """
    sizes = outputs.abs().mean(0)
    return sizes > _OUTLIER * sizes.median()


def measure(
    inputs: torch.Tensor, outputs: torch.Tensor, mapped: torch.Tensor, rank: int
) -> dict[str, float]:
    """Geometry of outputs y and mapped T(x), all [tokens, hidden]; NaN where a vector is 0.

    >>> x = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    >>> found = measure(x, x + torch.tensor([0.0, 1.0]), x, 1)
    >>> found["angle"], found["explained"], found["residual_in_subspace"]
    (90.0, 0.0, 0.0)
    """
    residual, update, part = outputs - mapped, outputs - inputs, mapped - inputs
    turned = _cosine(residual, mapped)
    frame = _leading(mapped, rank)
    lost, whole = residual.square().sum(), update.square().sum()
    return {
        "cosine": _mean(_cosine(outputs, mapped)),
        "update_cosine": _mean(_cosine(update, part)),
        "residual_cosine": _mean(turned),
        "residual_update_cosine": _mean(_cosine(residual, part)),
        "angle": _mean(turned.clamp(-1, 1).arccos().rad2deg()),
        "error": _mean(residual.norm(dim=-1)),
        "relative_error": _mean(residual.norm(dim=-1) / outputs.norm(dim=-1)),
        "explained": float(1 - lost / whole) if whole > 0 else float("nan"),
        "output_in_subspace": _mean(_share(outputs, frame)),
        "residual_in_subspace": _mean(_share(residual, frame)),
    }


def _leading(vectors: torch.Tensor, rank: int) -> torch.Tensor:
    """The first `rank` principal directions [hidden, rank] of vectors [tokens, hidden]."""
    centred = vectors - vectors.mean(0)
    if len(centred) >= centred.shape[1]:
        return torch.linalg.eigh(centred.T @ centred)[1][:, -rank:]
    values, left = torch.linalg.eigh(centred @ centred.T)
    held = values[-rank:] > values[-1] * torch.finfo(values.dtype).eps * len(values)
    return torch.linalg.qr(centred.T @ left[:, -rank:][:, held])[0]


def _share(vectors: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    return (vectors @ frame).square().sum(-1) / vectors.square().sum(-1)


def _cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))


def _mean(values: torch.Tensor) -> float:
    return float(values[values.isfinite()].double().mean())


def spearman(first: Floats, second: Floats, weights: Floats | None = None) -> Floats:
    """Spearman's rank correlation of two columns [tokens]; ties share their middle rank.

    weights: [draws, tokens], how often each token counts in each draw; gives [draws]. NaN where a
    column does not vary.

    >>> float(spearman(np.array([1.0, 2, 3]), np.array([1.0, 8, 27])))
    1.0
    """
    counts = np.ones((1, len(first))) if weights is None else weights
    ranks = [_ranks(column, counts) for column in (first, second)]
    total = counts.sum(-1, keepdims=True)
    left, right = (rank - (counts * rank).sum(-1, keepdims=True) / total for rank in ranks)
    products = [(counts * a * b).sum(-1) for a, b in ((left, right), (left, left), (right, right))]
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = products[0] / np.sqrt(products[1] * products[2])
    return found[0] if weights is None else found


def _ranks(column: Floats, counts: Floats) -> Floats:
    """The middle rank of each entry [draws, tokens] where entry t is there counts[:, t] times."""
    _, place = np.unique(column, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    groups = np.add.reduceat(counts[:, order], starts, axis=-1)
    ranks: Floats = (groups.cumsum(-1) - (groups - 1) / 2)[:, place]
    return ranks


def over_documents(
    statistic: Callable[[Floats], Floats], documents: int, seed: int, draws: int = DRAWS
) -> Interval:
    """95 % interval of a statistic over resampled documents.

    statistic: from how often each document is drawn, [draws, documents], to [draws].
    """

    def resampled(picks: Floats) -> Floats:
        counts = np.zeros((len(picks), documents))
        np.add.at(counts, (np.arange(len(picks))[:, None], picks.astype(int)), 1.0)
        return statistic(counts)

    return bootstrap(resampled, list(range(documents)), seed=seed, draws=draws)

"""TurboQuant (arXiv 2504.19874): rotate at random, then one scalar codebook for every coordinate.

A unit vector turned by a random rotation has coordinates of one known law, whatever the vector was:
density proportional to (1 - x²)^((d - 3)/2), about N(0, 1/d) (Lemma 1). The best scalar quantiser
of that law (Lloyd-Max) is therefore computed once and needs no data (Algorithm 1). It shrinks inner
products; the second stage (Algorithm 2) spends one bit of each coordinate on the sign of a random
projection of the rest, QJL, which makes them unbiased.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from pertoken._shown import Shown
from pertoken.cache._code import Code, Kind, check, half, pack, unpack
from pertoken.errors import PertokenError

_GRID = 1 << 16


class TurboQuant(Shown):
    """`bits` per coordinate and a norm in float16 per vector.

    seed: of the rotation, an orthogonal matrix drawn uniformly (it ships with the settings).
    qjl: spend one of the bits on Algorithm 2, for unbiased inner products.

    >>> x = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    >>> code = TurboQuant(bits=3).encode(x)
    >>> code.bits == 10 * (16 * 3 + 16)
    True
    >>> TurboQuant(bits=3).decode(code).shape
    torch.Size([1, 2, 5, 16])
    """

    def __init__(self, *, bits: int = 3, seed: int = 0, qjl: bool = False) -> None:
        least = 2 if qjl else 1
        if not least <= bits <= 8:
            raise PertokenError(f"bits of TurboQuant must be {least} to 8, got {bits}")
        self.bits = bits
        self.seed = seed
        self.qjl = qjl

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"TurboQuant {self.bits} bits" + (" with QJL" if self.qjl else "")

    def encode(self, tensor: torch.Tensor, kind: Kind = "keys") -> Code:
        """Code of a tensor [batch, heads, time, dim]; keys and values are treated alike."""
        tensor = check(tensor)
        dim = tensor.shape[-1]
        rows = tensor.float().reshape(-1, dim)
        norms = half(rows.norm(dim=1), "norms of vectors")
        unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        turned = unit @ rotation(dim, self.seed).T
        levels = self._levels(dim)
        codes = torch.bucketize(turned, (levels[1:] + levels[:-1]) / 2)
        parts = {"codes": pack(codes, self._scalar_bits), "norms": norms}
        if self.qjl:
            rest = unit - levels[codes] @ rotation(dim, self.seed)
            signs = rest @ _projection(dim, self.seed).T >= 0
            parts["signs"] = pack(signs, 1)
            parts["rests"] = half(rest.norm(dim=1), "norms of residuals")
        return Code(parts, tuple(tensor.shape), tensor.dtype, kind)

    def decode(self, code: Code) -> torch.Tensor:
        """The tensor a code stands for, in the dtype it had."""
        dim = code.shape[-1]
        codes = unpack(code.parts["codes"], self._scalar_bits, code.values)
        unit = self._levels(dim)[codes.view(-1, dim)] @ rotation(dim, self.seed)
        if self.qjl:
            signs = unpack(code.parts["signs"], 1, code.values).view(-1, dim).float() * 2 - 1
            scale = math.sqrt(math.pi / 2) / dim * code.parts["rests"].float()
            unit = unit + scale[:, None] * (signs @ _projection(dim, self.seed))
        rows = unit * code.parts["norms"].float()[:, None]
        return rows.view(code.shape).to(code.dtype)

    @property
    def _scalar_bits(self) -> int:
        return self.bits - 1 if self.qjl else self.bits

    def _levels(self, dim: int) -> torch.Tensor:
        return torch.tensor(codebook(dim, self._scalar_bits), dtype=torch.float32)


@lru_cache(maxsize=64)
def codebook(dim: int, bits: int) -> tuple[float, ...]:
    """Lloyd-Max levels, ascending, of a coordinate of a random unit vector in `dim` dimensions.

    dim: 2 or more. The density is integrated on a grid of angles, where it has no poles.

    >>> [round(level * 8, 2) for level in codebook(64, 1)]  # a normal law has 0.80
    [-0.8, 0.8]
    """
    if dim < 2:
        raise PertokenError(f"a random rotation needs vectors of 2 or more numbers, got {dim}")
    # x = sin(angle) turns the law (1 - x²)^((d - 3)/2) dx into cos(angle)^(d - 2) d angle.
    angle = (np.arange(_GRID) + 0.5) / _GRID * math.pi - math.pi / 2
    points = np.sin(angle)
    weight = np.cos(angle) ** (dim - 2)
    mass = np.concatenate([[0.0], np.cumsum(weight)])
    moment = np.concatenate([[0.0], np.cumsum(weight * points)])
    count = 1 << bits
    # Start at the quantiles, where no cell is empty.
    targets = mass[-1] * (np.arange(count) + 0.5) / count
    levels = points[np.searchsorted(mass[1:], targets)]
    for _ in range(20_000):
        edges = np.concatenate([[0], np.searchsorted(points, (levels[1:] + levels[:-1]) / 2)])
        ends = np.concatenate([edges[1:], [_GRID]])
        found = (moment[ends] - moment[edges]) / (mass[ends] - mass[edges])
        found = (found - found[::-1]) / 2  # the law is symmetric, and so is its quantiser
        if np.abs(found - levels).max() < 1e-12:
            break
        levels = found
    return tuple(float(level) for level in levels)


@lru_cache(maxsize=16)
def rotation(dim: int, seed: int) -> torch.Tensor:
    """Orthogonal [dim, dim] drawn uniformly: QR of a normal matrix, signs fixed by R's diagonal."""
    drawn = np.random.default_rng([seed, dim, 0]).standard_normal((dim, dim))
    q, r = np.linalg.qr(drawn)
    return torch.from_numpy(q * np.sign(np.diag(r))).float()


@lru_cache(maxsize=16)
def _projection(dim: int, seed: int) -> torch.Tensor:
    """The normal matrix [dim, dim] of QJL."""
    drawn = np.random.default_rng([seed, dim, 1]).standard_normal((dim, dim))
    return torch.from_numpy(drawn).float()

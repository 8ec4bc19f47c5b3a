"""Norms that rescale by themselves, so that no dimension has to grow for it (arXiv 2601.22966).

An RMSNorm divides by the length of what it reads. A model that wants to make all other dimensions
small can let one of them grow: the outlier is a factor in disguise. Two ways to spare it that:

    PreAffine   RMSNorm(λ1 ⊙ x)                                  the factor is learned before it
    GatedNorm   y = RMSNorm(x);  σ(W_up swish(W_down y)) ⊙ y     the factor is a gate behind it

and `DynamicTanh`, γ tanh(α x) + β, where nothing is divided and outliers have no use at all.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["DynamicTanh", "GatedNorm", "PreAffine"]


class _RMSNorm(nn.Module):
    """λ ⊙ x / rms(x), as Llama has it; in float64 for a float64 model, else in float32."""

    def __init__(self, hidden: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same shape."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class PreAffine(_RMSNorm):
    """RMSNorm(λ1 ⊙ x) with a learned λ1, `scale` [hidden] (arXiv 2601.22966).

    λ1 starts at 1 (our reading): the plain norm, bit for bit.

    >>> norm = PreAffine(4)
    >>> with torch.no_grad():
    ...     norm.scale[0] = 3.0
    >>> norm(torch.tensor([1.0, 3.0, 3.0, 3.0])).round(decimals=4).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, hidden: int, *, eps: float = 1e-6) -> None:
        super().__init__(hidden, eps=eps)
        self.scale = nn.Parameter(torch.ones(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same shape."""
        return super().forward(self.scale * x)


class GatedNorm(_RMSNorm):
    """σ(W_up swish(W_down y)) ⊙ y with y = RMSNorm(x) (arXiv 2601.22966).

    rank: r, the width of the gate (paper: 16). Adds 2·r·hidden parameters.
    The paper does not say how the gate starts. Here W_up is 0, so that the gate is 1/2 everywhere,
    and λ starts at 2 (our reading): the plain norm, bit for bit, with room to shrink and to grow.

    >>> norm = GatedNorm(8, rank=2)
    >>> x = torch.arange(1.0, 9.0)
    >>> torch.equal(norm(x), x * torch.rsqrt((x * x).mean() + 1e-6))
    True
    """

    def __init__(self, hidden: int, *, rank: int = 16, eps: float = 1e-6) -> None:
        super().__init__(hidden, eps=eps)
        self.down = nn.Linear(hidden, rank, bias=False)
        self.up = nn.Linear(rank, hidden, bias=False)
        with torch.no_grad():
            self.weight.fill_(2.0)
            self.up.weight.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same shape."""
        y = super().forward(x)
        return torch.sigmoid(self.up(nn.functional.silu(self.down(y)))) * y


class DynamicTanh(nn.Module):
    """γ ⊙ tanh(α x) + β, in place of a norm (DyT, arXiv 2503.10622); α is one number.

    alpha: where α starts (DyT: 0.5).

    >>> DynamicTanh(3, alpha=1.0)(torch.tensor([0.0, 1.0, 100.0])).round(decimals=3).tolist()
    [0.0, 0.7620000243186951, 1.0]
    """

    def __init__(self, hidden: int, *, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.weight = nn.Parameter(torch.ones(hidden))
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same shape."""
        return self.weight * torch.tanh(self.alpha * x) + self.bias

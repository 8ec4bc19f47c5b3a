"""Eight-bit codes of keys and values, one scale per vector."""

from __future__ import annotations

import torch

__all__ = ["dequantize_int8", "quantize_int8"]


def quantize_int8(x: torch.Tensor, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric codes int8 of x's shape, and float32 scales with size 1 along `dim`.

    scale = max|x| / 127 along `dim`, code = round(x / scale): no value is off by more than half a
    scale, 1/254 of the largest value beside it. dim=-1, one scale per vector, suits values; keys
    have channels that are large in every token, so dim=-2 (time) gives smaller errors there.

    >>> codes, scale = quantize_int8(torch.tensor([[1.0, -0.5, 0.25]]))
    >>> codes.tolist()
    [[127, -64, 32]]
    >>> dequantize_int8(codes, scale)
    tensor([[ 1.0000, -0.5039,  0.2520]])
    """
    exact = x.to(torch.float32)
    scale = exact.abs().amax(dim, keepdim=True) / 127
    codes = (exact / scale.clamp(min=torch.finfo(torch.float32).tiny)).round()
    return codes.clamp(-127, 127).to(torch.int8), scale


def dequantize_int8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What the codes of `quantize_int8` stand for, in float32."""
    return codes.to(torch.float32) * scale

"""Quantisers of cached keys and values, with every bit counted.

`Int8` and `Int4` are plain; `KIVI` treats keys and values apart; `TurboQuant` rotates each vector;
`Predictive` codes a cache as the sequence it is. The first four take one tensor [batch, heads,
time, dim] of one layer, keys as they are cached (behind the rotary embedding); `Predictive` takes
all layers at once, keys before the rotation. `encode_cache` and `decode_cache` do the right thing
for each. A `Code` holds real packed bytes in main memory, so `Code.bits` cannot leave side
information out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pertoken._shown import Shown
from pertoken.cache._code import Code, Kind, Quantizer, check, half, pack, unpack
from pertoken.cache._predictive import Predictive, Predictor, fit_predictor
from pertoken.cache._rows import plain_cache, plain_rows
from pertoken.cache._turboquant import TurboQuant
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

__all__ = [
    "KIVI",
    "Code",
    "Int4",
    "Int8",
    "Predictive",
    "Predictor",
    "Quantizer",
    "Raw",
    "TurboQuant",
    "decode_cache",
    "encode_cache",
    "fit_predictor",
]


class Raw(Shown):
    """No quantisation: the tensor in a 16-bit type, as caches are usually held.

    bfloat16 stays bfloat16; float32 and float64 become float16.

    >>> code = Raw().encode(torch.ones(1, 2, 3, 4))
    >>> code.bits / code.values
    16.0
    """

    name = "raw, 16 bits"

    def encode(self, tensor: torch.Tensor, kind: Kind = "keys") -> Code:
        """Code of a tensor [batch, heads, time, dim]."""
        tensor = check(tensor)
        return Code({"rows": _full(tensor)}, tuple(tensor.shape), tensor.dtype, kind)

    def decode(self, code: Code) -> torch.Tensor:
        """The tensor a code stands for, in the dtype it had."""
        return code.parts["rows"].to(code.dtype)


class _Grouped(Shown):
    """Asymmetric uniform quantiser over groups of channels of one token's vector.

    Each group stores its least value and its step in float16 beside the codes.
    """

    bits: int

    def __init__(self, *, group: int = 32) -> None:
        if group < 1:
            raise PertokenError(f"group must be 1 or more channels, got {group}")
        self.group = group

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"int{self.bits}, groups of {self.group}"

    def encode(self, tensor: torch.Tensor, kind: Kind = "keys") -> Code:
        """Code of a tensor [batch, heads, time, dim]; keys and values are treated alike."""
        tensor = check(tensor)
        parts = _quantise(_groups(tensor, self.group), self.bits)
        return Code(parts, tuple(tensor.shape), tensor.dtype, kind)

    def decode(self, code: Code) -> torch.Tensor:
        """The tensor a code stands for, in the dtype it had."""
        size = min(self.group, code.shape[-1])
        found = _dequantise(code.parts, self.bits, size)
        return found.view(code.shape).to(code.dtype)


class Int8(_Grouped):
    """8 bits per value, and 32 bits for each group of channels.

    >>> code = Int8(group=4).encode(torch.randn(1, 1, 2, 8))
    >>> code.bits == 16 * 8 + 4 * 32
    True
    """

    bits = 8


class Int4(_Grouped):
    """4 bits per value, and 32 bits for each group of channels.

    >>> code = Int4(group=4).encode(torch.randn(1, 1, 2, 8))
    >>> code.bits == 16 * 4 + 4 * 32
    True
    """

    bits = 4


class KIVI(Shown):
    """KIVI (arXiv 2402.02750, Algorithm 1): keys per channel, values per token, newest rows whole.

    bits: 2 or 4. group: tokens of a key group, channels of a value group (paper: 32).
    residual: R; the newest R values and the newest time mod R keys stay in 16 bits (paper: 128).
        A multiple of `group`.

    >>> code = KIVI(bits=2, group=4, residual=4).encode(torch.randn(1, 1, 6, 8), "keys")
    >>> code.bits == 4 * 8 * 2 + 8 * 32 + 2 * 8 * 16
    True
    """

    def __init__(self, *, bits: int = 2, group: int = 32, residual: int = 128) -> None:
        if bits not in (2, 4):
            raise PertokenError(f"bits of KIVI must be 2 or 4, got {bits}")
        if group < 1 or residual < 0 or residual % group:
            raise PertokenError(
                f"residual must be a multiple of group, got residual={residual}, group={group}"
            )
        self.bits = bits
        self.group = group
        self.residual = residual

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"KIVI {self.bits} bits, newest {self.residual} whole"

    def encode(self, tensor: torch.Tensor, kind: Kind = "keys") -> Code:
        """Code of a tensor [batch, heads, time, dim]."""
        tensor = check(tensor)
        cut = self._quantised(tensor.shape[2], kind)
        old = tensor[:, :, :cut]
        if kind == "keys":
            grouped = _groups(old.transpose(2, 3), self.group)
        else:
            grouped = _groups(old, self.group)
        parts = {**_quantise(grouped, self.bits), "rows": _full(tensor[:, :, cut:])}
        return Code(parts, tuple(tensor.shape), tensor.dtype, kind)

    def decode(self, code: Code) -> torch.Tensor:
        """The tensor a code stands for, in the dtype it had."""
        batch, heads, time, dim = code.shape
        cut = self._quantised(time, code.kind)
        if code.kind == "keys":
            found = _dequantise(code.parts, self.bits, self.group)
            old = found.view(batch, heads, dim, cut).transpose(2, 3)
        else:
            found = _dequantise(code.parts, self.bits, min(self.group, dim))
            old = found.view(batch, heads, cut, dim)
        return torch.cat([old.to(code.dtype), code.parts["rows"].to(code.dtype)], 2)

    def _quantised(self, time: int, kind: Kind) -> int:
        """How many of the oldest rows are quantised."""
        if kind == "values":
            return max(0, time - self.residual)
        # Without a residual, what fills no group stays whole: a channel's group needs its tokens.
        return time - time % (self.residual or self.group)


def encode_cache(
    quantizer: Quantizer | Predictive,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: Any,
) -> list[Code]:
    """Codes of all keys and values of a cache.

    input_ids: [batch, time], the tokens that `cache` holds, without padding. The ids are taken as
    known to the decoder; they cost what the archive of a conversation says (`pertoken cache save
    --level tokens`).
    Raises PertokenError for a cache that does not hold every row (sliding, static, evicting).
    """
    rows = plain_rows(cache, input_ids.shape[1])
    if isinstance(quantizer, Predictive):
        return [quantizer.encode_cache(model, input_ids, rows)]
    return [
        quantizer.encode(tensor, kind)
        for pair in rows
        for tensor, kind in zip(pair, _KINDS, strict=True)
    ]


def decode_cache(
    quantizer: Quantizer | Predictive,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    codes: Sequence[Code],
) -> DynamicCache:
    """The cache that codes stand for, every layer a plain one (right for sliding models too)."""
    if isinstance(quantizer, Predictive):
        rows = quantizer.decode_cache(model, input_ids, codes[0])
    else:
        tensors = [quantizer.decode(code) for code in codes]
        rows = list(zip(tensors[::2], tensors[1::2], strict=True))
    return plain_cache([(keys.to(model.device), values.to(model.device)) for keys, values in rows])


_KINDS: tuple[Kind, Kind] = ("keys", "values")


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """Rows in 16 bits."""
    if tensor.dtype == torch.bfloat16:
        return tensor.clone()
    return half(tensor, "keys or values")


def _groups(tensor: torch.Tensor, group: int) -> torch.Tensor:
    """[groups, size]: runs of the last axis, float32."""
    last = tensor.shape[-1]
    size = min(group, last) if last else group
    if last % size:
        fitting = max(n for n in range(1, size + 1) if last % n == 0)
        raise PertokenError(
            f"groups of {group} do not divide {last} channels: take group={fitting}"
        )
    return tensor.float().reshape(-1, size)


def _quantise(grouped: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Packed codes of [groups, size], with offset and step of each group in float16."""
    if not grouped.numel():
        empty = torch.zeros(0, dtype=torch.float16)
        return {"codes": torch.zeros(0, dtype=torch.uint8), "least": empty, "step": empty}
    least, greatest = grouped.aminmax(dim=1)
    low = half(least, "least values of groups")
    step = half((greatest - least) / (2**bits - 1), "steps of groups")
    width = torch.where(step > 0, step.float(), 1.0)[:, None]
    codes = ((grouped - low.float()[:, None]) / width).round().clamp(0, 2**bits - 1)
    return {"codes": pack(codes, bits), "least": low, "step": step}


def _dequantise(parts: Any, bits: int, size: int) -> torch.Tensor:
    """[groups, size] in float32."""
    low, step = parts["least"].float(), parts["step"].float()
    codes = unpack(parts["codes"], bits, len(low) * size).view(-1, size)
    return codes * step[:, None] + low[:, None]

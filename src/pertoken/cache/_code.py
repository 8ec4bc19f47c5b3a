"""What a quantiser hands out: packed tensors whose bytes are the bits that are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from pertoken.errors import PertokenError

Kind = Literal["keys", "values"]


@dataclass(frozen=True)
class Code:
    """One coded tensor.

    parts: what is stored: packed codes, scales, offsets, norms, rows kept in full precision.
    shape, dtype, kind: of the tensor that was coded; a few bytes per session, not counted.

    >>> Code({"codes": torch.zeros(3, dtype=torch.uint8)}, (1, 1, 2, 4), torch.float32).bits
    24
    """

    parts: Mapping[str, torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind = "keys"

    @property
    def bits(self) -> int:
        """Bits of everything that is stored, side information included."""
        return 8 * sum(part.numel() * part.element_size() for part in self.parts.values())

    @property
    def values(self) -> int:
        """Numbers in the tensor that was coded."""
        return int(np.prod(self.shape))


class Quantizer(Protocol):
    """Codes keys or values of one layer, [batch, heads, time, dim].

    kind: a quantiser may treat keys and values differently (KIVI does).
    """

    @property
    def name(self) -> str: ...

    def encode(self, tensor: torch.Tensor, kind: Kind = "keys") -> Code: ...

    def decode(self, code: Code) -> torch.Tensor: ...


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes 0 … 2^bits - 1 as a stream of bytes, uint8 [ceil(bits · codes / 8)].

    >>> pack(torch.tensor([1, 2, 3]), 4).tolist()
    [33, 3]
    """
    flat = codes.reshape(-1).to(torch.uint8).numpy()
    if bits == 8:
        return torch.from_numpy(flat.copy())
    planes = (flat[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The `count` codes of `pack`, int64.

    >>> unpack(pack(torch.tensor([5, 0, 7]), 3), 3, 3).tolist()
    [5, 0, 7]
    """
    if bits == 8:
        return packed[:count].long()
    planes = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little")
    weights = 1 << np.arange(bits)
    return torch.from_numpy(planes.reshape(count, bits).astype(np.int64) @ weights)


def half(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """As float16; PertokenError where a number is not finite there."""
    found = tensor.to(torch.float16)
    if not bool(torch.isfinite(found).all()):
        raise PertokenError(
            f"{what} do not fit float16 (beyond 65,504, infinite or NaN): this cache cannot be "
            "quantised; keep it raw"
        )
    return found


def check(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in main memory; PertokenError for what is not [batch, heads, time, dim] floats."""
    if tensor.dim() != 4 or not tensor.is_floating_point():
        raise PertokenError(
            f"a quantiser takes floats [batch, heads, time, dim], got {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
    return tensor.detach().cpu()

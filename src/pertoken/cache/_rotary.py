"""Takes the rotation of positions off cached keys and puts it on again.

Caches hold keys after the rotary embedding. The rotation is linear and known from the position, so
turning back by the same angle gives the keys as the projection (and the norm behind it) made them.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rotary:
    """Rotation of the keys of a model, by the model's own functions.

    A model without a rotary embedding (GPT-2, OPT), or with one that does not stand at its decoder
    as `rotary_emb`, has its keys left as they are cached. Positions are 0, 1, … of each row: no
    left padding.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        decoder = model.get_decoder()
        self._embedding = getattr(decoder, "rotary_emb", None)
        self._apply = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
        types = getattr(decoder.config, "layer_types", None)
        # Gemma-3 has one base for each type of layer and asks for the type.
        asks = self._embedding is not None and "layer_type" in (
            inspect.signature(self._embedding.forward).parameters
        )
        self._types: list[str] | None = list(types) if types and asks else None

    def undo(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        """Keys [batch, heads, time, dim] of a cache as they were before the rotation, float32."""
        if self._embedding is None or self._apply is None:
            return keys.float()
        cos, sin = self._angles(keys, layer)
        scale = cos[..., :1] ** 2 + sin[..., :1] ** 2  # above 1 where the model scales attention
        return self._turn(keys.float(), cos / scale, -sin / scale)

    def redo(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        """The inverse of `undo`, float32."""
        if self._embedding is None or self._apply is None:
            return keys.float()
        return self._turn(keys.float(), *self._angles(keys, layer))

    def _angles(self, keys: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(keys.shape[2], device=keys.device)[None]
        like = torch.zeros(1, dtype=torch.float32, device=keys.device)
        assert self._embedding is not None
        if self._types is not None:
            found: tuple[torch.Tensor, torch.Tensor] = self._embedding(
                like, positions, self._types[layer]
            )
        else:
            found = self._embedding(like, positions)
        return found

    def _turn(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned = cos.shape[-1]  # Phi and GPT-NeoX turn only the first part of each head
        apply: Any = self._apply
        _, head = apply(keys[..., :turned], keys[..., :turned], cos, sin)
        return torch.cat([head, keys[..., turned:]], -1)

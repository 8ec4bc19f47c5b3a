"""Turning keys that a model has rotated further along the text, by the model's own code."""

from __future__ import annotations

import inspect
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch

from pertoken.cache._blocks import Blocks
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_turning: weakref.WeakKeyDictionary[Any, list[bool]] = weakref.WeakKeyDictionary()
_FAR = 7  # places: any number that turns a key visibly


class Rotation:
    """Moves keys to later places.

    turns: for every layer, whether its keys are rotated at all; keys of others need no move.
    Raises PertokenError where a key of the model, moved, is not the key of the later place.

    >>> from pertoken.testing import tiny_model
    >>> Rotation(tiny_model("llama")).turns, Rotation(tiny_model("gpt2")).turns
    ([True, True], [False, False])
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._rotary = getattr(model.get_decoder(), "rotary_emb", None)
        self._kinds = model.config.get_text_config(decoder=True)
        blocks = Blocks(model)
        self._apply = getattr(
            sys.modules[type(blocks.modules[0]).__module__], "apply_rotary_pos_emb", None
        )
        if self._rotary is not None:
            self._refuse_varying(model)
        if model not in _turning:
            _turning[model] = self._tried(model, blocks)
        self.turns = _turning[model]

    def turned(self, layer: int, keys: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """keys [batch, key heads, rows, dim], moved on by `places` [batch, 1]."""
        assert self._rotary is not None
        assert self._apply is not None
        wide = keys if keys.dtype == torch.float64 else keys.float()
        kind = ()
        if "layer_type" in inspect.signature(self._rotary.forward).parameters:
            kind = (self._kinds.layer_types[layer],)
        cos, sin = self._rotary(wide, places, *kind)
        length = (cos**2 + sin**2).sqrt()  # some models scale keys here; that was done once already
        rotated, rest = wide[..., : cos.shape[-1]], wide[..., cos.shape[-1] :]
        _, moved = self._apply(rotated, rotated, cos / length, sin / length)
        return torch.cat((moved, rest), -1).to(keys.dtype)

    @torch.no_grad()
    def _tried(self, model: PreTrainedModel, blocks: Blocks) -> list[bool]:
        """Whether keys turn, by a key at place 0 and the same one further on."""
        device = model.device
        ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        here, there = blocks.enter(ids, ids), blocks.enter(ids, ids + _FAR)
        draw = torch.randn(here.hidden.shape, generator=torch.Generator().manual_seed(0))
        hidden = draw.to(device, here.hidden.dtype)
        found = []
        for layer in range(len(blocks.modules)):
            old, _ = blocks.project(layer, hidden, here.calls[layer])
            new, _ = blocks.project(layer, hidden, there.calls[layer])
            turns = not torch.equal(old, new)
            if turns:
                known = self._rotary is not None and self._apply is not None
                moved = self.turned(layer, old, ids + _FAR) if known else old
                if (moved - new).abs().max() > 0.05 * new.abs().max():
                    raise PertokenError(
                        f"StreamingLLMCache cannot serve {type(model).__name__}: it does not know "
                        "how the model rotates its keys"
                    )
            found.append(turns)
        return found

    def _refuse_varying(self, model: PreTrainedModel) -> None:
        kinds = getattr(self._rotary, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in ("dynamic", "longrope"):
                raise PertokenError(
                    f"StreamingLLMCache cannot serve {type(model).__name__}: its rotation "
                    f"({kind}) changes with the length of the text"
                )

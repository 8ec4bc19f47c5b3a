"""Turning keys that a model has rotated further along the text, by the model's own code."""

from __future__ import annotations

import inspect
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch

from pertoken._blocks import Blocks
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Angles = dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]]
"""Cosines and sines [batch, 1, rotated dims], per kind of layer."""

_turning: weakref.WeakKeyDictionary[Any, list[bool]] = weakref.WeakKeyDictionary()
_FAR = 7  # places: any number that turns a key visibly


class Rotation:
    """Moves keys to later places.

    turns: for every layer, whether its keys are rotated at all; keys of others need no move.
    Raises PertokenError where a key of the model, moved, is not the key of the later place; `what`
    names who needs it.

    >>> from pertoken.testing import tiny_model
    >>> Rotation(tiny_model("llama"), "this").turns, Rotation(tiny_model("gpt2"), "this").turns
    ([True, True], [False, False])
    """

    def __init__(self, model: PreTrainedModel, what: str) -> None:
        self._refusal = f"{what} cannot serve {type(model).__name__}: "
        blocks = Blocks(model)
        home = sys.modules[type(blocks.modules[0]).__module__]
        self._apply = getattr(home, "apply_rotary_pos_emb", None)
        self._rotary = getattr(model.get_decoder(), "rotary_emb", None)
        # The argument that names a layer's frequencies, in models that have several.
        self._kinds: list[tuple[str, ...]] = [()] * len(blocks.modules)
        if self._rotary is not None:
            self._refuse_varying()
            if "layer_type" in inspect.signature(self._rotary.forward).parameters:
                types = model.config.get_text_config(decoder=True).layer_types
                self._kinds = [(kind,) for kind in types]
        if model not in _turning:
            _turning[model] = self._tried(blocks, model.device)
        self.turns = _turning[model]

    def angles(self, places: torch.Tensor, like: torch.Tensor) -> Angles:
        """What `turned` needs for a move by `places` [batch, 1]; like: keys."""
        assert self._rotary is not None
        found = {}
        for kind in dict.fromkeys(self._kinds):
            cos, sin = self._rotary(_wide(like), places, *kind)
            # Some models scale their keys here, and theirs are scaled already.
            length = (cos**2 + sin**2).sqrt()
            found[kind] = (cos / length, sin / length)
        return found

    def turned(self, layer: int, keys: torch.Tensor, angles: Angles) -> torch.Tensor:
        """keys [batch, key heads, rows, dim] of a layer, moved on."""
        assert self._apply is not None
        cos, sin = angles[self._kinds[layer]]
        rotated, rest = _wide(keys).split((cos.shape[-1], keys.shape[-1] - cos.shape[-1]), -1)
        _, moved = self._apply(rotated, rotated, cos, sin)
        return torch.cat((moved, rest), -1).to(keys.dtype)

    @torch.no_grad()
    def _tried(self, blocks: Blocks, device: torch.device) -> list[bool]:
        """Whether keys turn, by a key at place 0 and the same one further on."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        far = ids + _FAR
        here, there = blocks.enter(ids, ids), blocks.enter(ids, far)
        draw = torch.randn(here.hidden.shape, generator=torch.Generator().manual_seed(0))
        hidden = draw.to(device, here.hidden.dtype)
        found = []
        for layer in range(len(blocks.modules)):
            old, _ = blocks.project(layer, hidden, here.calls[layer])
            new, _ = blocks.project(layer, hidden, there.calls[layer])
            turns = not torch.equal(old, new)
            own_way = self._refusal + "it rotates its keys in a way of its own"
            if turns and (self._rotary is None or self._apply is None):
                raise PertokenError(own_way)
            if turns:
                try:
                    moved = self.turned(layer, old, self.angles(far, old))
                except TypeError:  # Gemma 3n rotates one tensor at a time
                    raise PertokenError(own_way) from None
                if bool((moved - new).abs().max() > 0.05 * new.abs().max()):
                    raise PertokenError(self._refusal + "its rotation of keys cannot be continued")
            found.append(turns)
        return found

    def _refuse_varying(self) -> None:
        kinds = getattr(self._rotary, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in ("dynamic", "longrope"):
                raise PertokenError(
                    f"{self._refusal}its rotation of keys ({kind}) changes with the text's length"
                )


def _wide(keys: torch.Tensor) -> torch.Tensor:
    return keys if keys.dtype == torch.float64 else keys.float()

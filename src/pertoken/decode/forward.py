"""One forward pass over token trees, for any decoder-only model of transformers.

Everything the library must know about a model to verify a tree stands here: which attention mask
it takes, what its layers' windows are, and whether it can do it at all. Masks are float, never bool
(eager attention adds a bool mask as 0 and 1); a caller's mask replaces a layer's own window, so the
window is applied here, measured in positions.
"""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any

import torch

from pertoken._forward import text_logits
from pertoken._takeover import FULL, SLIDING, implementation, layer_windows
from pertoken.decode.tree import ancestor_mask
from pertoken.errors import PertokenError
from pertoken.prompts import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


_verified: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], bool]] = weakref.WeakKeyDictionary()


def refuse_unfit(model: PreTrainedModel) -> None:
    """Raise PertokenError for a model whose text cannot be rolled back or masked as a tree."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise PertokenError(
            f"{name} is an encoder-decoder model; tree speculation needs a decoder-only model"
        )
    if getattr(model, "_is_stateful", False):
        raise PertokenError(
            f"{name} keeps a recurrent state, which cannot be rolled back after a rejected draft; "
            "decode it with transformers' own generate"
        )
    if not getattr(model, "_supports_attention_backend", False) or "position_ids" not in (
        inspect.signature(model.forward).parameters
    ):
        raise PertokenError(
            f"{name} takes no attention mask of the caller's own (ALiBi or an old attention), so a "
            "token tree cannot be verified with it; decode it with transformers' own generate"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if kinds:
        raise PertokenError(
            f"{name} has layers of type {', '.join(sorted(kinds))}; tree speculation knows full "
            "and sliding-window attention only"
        )
    attention = implementation(config)
    if attention not in ("sdpa", "eager"):
        raise PertokenError(
            f"the attention back end {attention!r} ignores masks of the caller's own; load the "
            'model with attn_implementation="sdpa" (or "eager") for tree speculation'
        )


def rotation_switch(model: PreTrainedModel) -> int | None:
    """Tokens above which a model rotates all of a text by other factors (LongRoPE), None if never.

    `generate` reads the text anew there; what holds a cache of its own cannot go beyond.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    switch: int | None = rope.get("original_max_position_embeddings")
    return switch or getattr(config, "original_max_position_embeddings", None)


class TextForward:
    """Next-token logits of growing texts: a model and the cache of what it has read.

    cache: one that holds a beginning of the texts already; empty by default.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache | None = None) -> None:
        from transformers import DynamicCache

        self.model = model
        if cache is None:
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.cache = cache

    def __call__(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits [batch, vocab] in float32, as `generate` takes them, behind whole texts.

        input_ids: [batch, time], of which the cache holds a beginning; mask: [batch, time].
        """
        new = input_ids[:, int(self.cache.get_seq_length()) :]
        return text_logits(self.model, new, mask, self.cache)[:, -1].float()

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these rows of the batch, in this order; a row may come several times."""
        self.cache.reorder_cache(rows)


class TreeForward:
    """Runs a model on token trees behind the text that a cache holds.

    Raises PertokenError for models and back ends that cannot do it (see `refuse_unfit`).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        refuse_unfit(model)
        config = model.config.get_text_config(decoder=True)
        self.model = model
        self.dtype = model.dtype
        self.lowest = torch.finfo(model.dtype).min
        windows = layer_windows(model)
        types = [FULL if window is None else SLIDING for window in windows]
        self.window = next((window for window in windows if window is not None), None)
        self.first_layer = {kind: types.index(kind) for kind in dict.fromkeys(types)}
        self.max_positions: int | None = positions(model)
        self.takes_dict = self._probe(bool(getattr(config, "layer_types", None)))

    def text(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        cache: Cache,
        *,
        all_logits: bool = False,
    ) -> torch.Tensor:
        """See `text_logits`."""
        return text_logits(self.model, input_ids, mask, cache, all_logits=all_logits)

    def tree(
        self,
        tokens: torch.Tensor,
        depths: torch.Tensor,
        visible: torch.Tensor,
        mask: torch.Tensor,
        cache: Cache,
    ) -> torch.Tensor:
        """Logits [batch, nodes, vocab] at the nodes of one tree per row.

        tokens, depths: [batch, nodes]; visible: bool [batch, nodes, nodes], see `ancestor_mask`;
        mask: [batch, seen], 1 for the text in the cache and 0 for left padding; or [batch, nodes,
        seen], where every node has its own text among the rows of the cache, in order.
        """
        positions = mask.sum(-1, keepdim=mask.dim() == 2) + depths
        masks = {
            kind: self._mask(kind, layer, positions, visible, mask, cache)
            for kind, layer in self.first_layer.items()
        }
        output = self.model(
            input_ids=tokens,
            attention_mask=masks if self.takes_dict else next(iter(masks.values())),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        logits: torch.Tensor = output.logits
        return logits

    def _mask(
        self,
        kind: str,
        layer: int,
        positions: torch.Tensor,
        visible: torch.Tensor,
        mask: torch.Tensor,
        cache: Cache,
    ) -> torch.Tensor:
        """Additive float mask [batch, 1, nodes, keys] for one type of layer."""
        nodes = positions.shape[1]
        seen = mask.shape[-1]
        length, offset = cache.layers[layer].get_mask_sizes(nodes) if seen else (nodes, 0)
        if mask.dim() == 2:
            mask = mask.unsqueeze(1)
        past = mask[..., offset:].bool().expand(-1, nodes, -1)
        allowed = torch.cat((past, visible), -1)
        if kind == SLIDING and self.window is not None:
            of_past = (mask.cumsum(-1) - 1)[..., offset:].expand(-1, nodes, -1)
            of_nodes = positions.unsqueeze(1).expand(-1, nodes, -1)
            of_keys = torch.cat((of_past, of_nodes), -1)
            # In positions, not in slots: siblings share a position but not a slot.
            allowed = allowed & (of_keys > positions.unsqueeze(-1) - self.window)
        beyond = length - allowed.shape[-1]  # free slots of a static cache
        additive = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device)
        additive.masked_fill_(~allowed, self.lowest)
        if beyond > 0:
            additive = torch.nn.functional.pad(additive, (0, beyond), value=self.lowest)
        return additive.unsqueeze(1)

    def _probe(self, has_types: bool) -> bool:
        """Whether the model takes a mask per layer type; raises if it does not obey masks at all.

        A node that must not see its parent's sibling, in some short texts: its logits are to be
        those of the text without the sibling, not those of a node that sees all before it. Both
        distances are the model's own, so no tolerance per type is needed. Done once per model and
        attention back end.
        """
        from transformers import DynamicCache

        model = self.model
        known = _verified.setdefault(model, {})
        key = (self.dtype, implementation(model.config.get_text_config(decoder=True)))
        if key in known:
            return known[key]
        vocab = model.get_input_embeddings().weight.shape[0]
        draw = torch.Generator().manual_seed(0)
        drawn = torch.randint(vocab, (_PROBES, 8), generator=draw).to(model.device)
        text, sibling = drawn[:, :7], drawn[:, 7:]
        tokens = torch.cat((text[:, 4:5], sibling, text[:, 5:]), -1)
        depths = torch.tensor([[0, 1, 1, 2]], device=model.device).expand(_PROBES, -1)
        visible = ancestor_mask([-1, 0, 0, 2]).to(model.device).expand(_PROBES, -1, -1)
        ones = torch.ones_like(text)
        with torch.no_grad():
            right = self.text(text, ones, DynamicCache())[:, 0].float()
            found: list[torch.Tensor] = []  # with the tree's mask, and with all before visible
            for takes_dict in (True, False) if has_types else (False,):
                self.takes_dict = takes_dict
                try:
                    for seen in (visible, torch.ones_like(visible).tril()):
                        cache = DynamicCache()
                        self.text(text[:, :4], ones[:, :4], cache)
                        logits = self.tree(tokens, depths, seen, ones[:, :4], cache)
                        found.append(logits[:, 3].float())
                except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
                    reason: Exception = error
                    continue
                break
        if not found:
            raise PertokenError(
                f"{type(model).__name__} does not take the mask of a token tree ({reason}); "
                "decode it with transformers' own generate"
            )
        off, full = (float((logits - right).abs().mean()) for logits in found)
        if off > 0.5 * full:
            raise PertokenError(
                f"{type(model).__name__} does not obey the mask of a token tree (its nodes see "
                "their siblings); decode it with transformers' own generate"
            )
        known[key] = self.takes_dict
        return self.takes_dict


_PROBES = 8  # texts; in bfloat16 a single one can be off by its sibling's effect

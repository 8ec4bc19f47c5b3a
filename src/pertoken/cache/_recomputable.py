"""What can be made again: options and models that are refused, and how large rows are."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from pertoken._blocks import Blocks
from pertoken._takeover import refuse_unfit
from pertoken.cache._evicted import Evicted
from pertoken.cache._held import size_of
from pertoken.errors import PertokenError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKPOINTS = ("tokens", "residual", "per_layer")
REMATERIALIZE = ("step", "turn")
_PROBE = 6  # tokens, in blocks of 4: one border between them

_tried: weakref.WeakKeyDictionary[Any, dict[torch.dtype, list[int]]] = weakref.WeakKeyDictionary()


def refuse_options(budget: int, checkpoint: str, rematerialize: str, block: int | None) -> None:
    """Raise PertokenError for options that name nothing or do not fit each other."""
    for name, value, known in (
        ("checkpoint", checkpoint, CHECKPOINTS),
        ("rematerialize", rematerialize, REMATERIALIZE),
    ):
        if value not in known:
            raise PertokenError(
                f"unknown {name} {value!r}{nearest(value, known)}: one of {', '.join(known)}"
            )
    if block is not None and block < 1:
        raise PertokenError(f"block must be 1 token or more, got {block}")
    if budget < (block or 1):
        raise PertokenError(
            f"budget must be 1 token or more, got {budget}"
            if block is None
            else f"budget must be at least one block ({block} tokens), got {budget}"
        )


def refuse_changing(model: PreTrainedModel, what: str) -> None:
    """Raise PertokenError for a model whose keys are not the same when they are made again."""
    refuse_unfit(model, what)
    refuse_training(model, what)
    config = model.config.get_text_config(decoder=True)
    given = getattr(config, "rope_parameters", None) or {}
    for each in (given, *given.values()):
        kind = each.get("rope_type") if isinstance(each, dict) else None
        if kind in ("dynamic", "longrope"):
            raise PertokenError(
                f"{what} cannot serve {type(model).__name__}: its rotations change with the length "
                f"of the text (rope_type {kind!r}), so a key made again is another one"
            )


def refuse_training(model: PreTrainedModel, what: str) -> None:
    """Raise PertokenError for a model in training mode: its dropout is drawn anew each time."""
    if model.training:
        raise PertokenError(f"{what} needs a model in evaluation mode: call model.eval()")


@torch.no_grad()
def row_bytes(
    model: PreTrainedModel, blocks: Blocks, windows: list[int | None], what: str
) -> list[int]:
    """Bytes of one token's keys and values in each layer, counted on a few tokens.

    Raises PertokenError if their recomputation does not give what the model caches. Done once per
    model and dtype.
    """
    known = _tried.setdefault(model, {})
    if model.dtype in known:
        return known[model.dtype]
    vocab = model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (1, _PROBE), generator=draw).to(model.device)
    full = DynamicCache()
    model.get_decoder()(input_ids=ids, past_key_values=full, use_cache=True)
    evicted = Evicted(blocks, windows, ids, 4, {})
    sizes = []
    for index, layer in enumerate(full.layers):
        pair = layer.keys, layer.values
        for mine, own in zip(evicted.rebuild(index), pair, strict=True):
            if mine.shape != own.shape or (mine - own).norm() > 0.05 * own.norm():
                raise PertokenError(
                    f"{what} cannot serve {type(model).__name__}: running block {index} again "
                    "does not give the keys and values that the model caches"
                )
        sizes.append(size_of(*pair) // _PROBE)
    known[model.dtype] = sizes
    return sizes

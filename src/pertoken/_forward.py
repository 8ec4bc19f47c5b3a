"""A forward of ordinary text behind a cache, with the arguments that this kind of model takes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

__all__ = ["text_logits"]

_names: dict[type[Any], frozenset[str]] = {}  # parameters of a kind of model's forward


def _forward_names(kind: type[Any]) -> frozenset[str]:
    if kind not in _names:
        _names[kind] = frozenset(inspect.signature(kind.forward).parameters)
    return _names[kind]


def text_logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    cache: Cache,
    *,
    all_logits: bool = False,
) -> torch.Tensor:
    """Forward of ordinary text behind a cache; logits [batch, 1 or time, vocab].

    input_ids: [batch, time], the tokens that the cache does not hold yet; mask: [batch, seen +
    time], 1 for tokens and 0 for left padding.
    """
    names = _forward_names(type(model))
    given: dict[str, Any] = {}
    if "position_ids" in names:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    if not all_logits and "logits_to_keep" in names:
        given["logits_to_keep"] = 1
    output = model(
        input_ids=input_ids,
        # As `generate` does: no mask where nothing is masked, which allows faster kernels.
        attention_mask=None if bool(mask.all()) else mask,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **given,
    )
    logits: torch.Tensor = output.logits
    return logits if all_logits else logits[:, -1:]

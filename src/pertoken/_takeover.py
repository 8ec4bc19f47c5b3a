"""A function that answers the attention of a model's blocks for the length of a `with`.

No modelling code is touched, so positions, norms, biases and scalings stay the model's own. While
it lasts the library builds no mask: the function knows, or decides, which keys a query sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from pertoken.errors import CannotServe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "pertoken_takeover"
FULL, SLIDING = "full_attention", "sliding_attention"

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""`(module, query, key, value, attention_mask, scaling=..., **kwargs)`, as transformers calls it;
query [batch, heads, time, dim], key and value [batch, key heads, time, dim]; gives the mixed values
[batch, time, heads, dim] and the weights or None."""


@dataclass
class _Taken:
    """A config that is taken over: what it runs else, and who answers, the innermost one last."""

    config: Any
    implementation: str
    answering: list[Attend] = field(default_factory=list)


_taken: dict[int, _Taken] = {}
"""By the id of the config: models of different threads do not answer for each other."""


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    answer = _taken[id(module.config)].answering[-1]
    return answer(module, query, key, value, *args, **kw)


class Takeover:
    """Lets a function answer the attention of a model's blocks for the length of a `with`.

    >>> from pertoken.testing import tiny_model
    >>> model, calls = tiny_model("llama"), []
    >>> def attend(module, query, key, value, *rest, **kwargs):
    ...     calls.append(module.layer_idx)
    ...     return sdpa(module, query, key, value, None, **kwargs)
    >>> with Takeover(model)(attend):
    ...     logits = model(torch.tensor([[5, 6, 7]])).logits
    >>> calls
    [0, 1]
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # No mask function is registered under this name, so the library leaves masks alone.
        if IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(IMPLEMENTATION, _attend)
        found: dict[int, Any] = {}
        for module in model.get_decoder().modules():
            config = getattr(module, "config", None)
            if hasattr(config, "_attn_implementation"):
                found[id(config)] = config
        self._configs = list(found.values())

    @contextmanager
    def __call__(self, attend: Attend) -> Iterator[None]:
        own = partial(attend)  # told from every other, also from one of the same function
        for config in self._configs:
            taken = _taken.setdefault(id(config), _Taken(config, config._attn_implementation))
            taken.answering.append(own)
            config._attn_implementation = IMPLEMENTATION
        try:
            yield
        finally:
            # An inner one may still be there, left open by an interrupt.
            for config in self._configs:
                taken = _taken[id(config)]
                taken.answering = [each for each in taken.answering if each is not own]
                if not taken.answering:
                    config._attn_implementation = _taken.pop(id(config)).implementation


def sdpa(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention through transformers' own sdpa function; output [batch, time, heads, dim].

    allowed: bool, to broadcast to [batch, heads, time, keys]; None where the new rows are all
        there is (causal) or everything is visible (one query).
    """
    out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, allowed, scaling=scaling, **kwargs
    )
    return out, None


def visible(
    query_positions: torch.Tensor, key_positions: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Which keys a query sees: bool [..., queries, keys] from token positions, -1 for padding.

    A query sees keys at its own position and before it, in a sliding layer the last `window` of
    them. A row of padding sees all keys that are no padding, so that its softmax is not empty.

    >>> visible(torch.tensor([2, 3]), torch.tensor([-1, 0, 1, 2, 3]), 2).int().tolist()
    [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    """
    queries, keys = query_positions.unsqueeze(-1), key_positions.unsqueeze(-2)
    allowed = keys <= queries
    if window is not None:
        allowed = allowed & (keys > queries - window)
    return (allowed & (keys >= 0)) | (queries < 0)


def layer_windows(model: PreTrainedModel) -> list[int | None]:
    """The sliding window of every layer in tokens, None where it sees everything.

    >>> from pertoken.testing import tiny_model
    >>> layer_windows(tiny_model("gemma3"))
    [8, None]
    """
    config = model.config.get_text_config(decoder=True)
    window: int | None = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        sliding = window is not None and getattr(config, "use_sliding_window", True)
        types = [SLIDING if sliding else FULL] * config.num_hidden_layers
    return [window if kind == SLIDING else None for kind in types]


def refuse_unfit(model: PreTrainedModel, what: str) -> None:
    """Raise CannotServe for a model whose attention cannot be taken over; `what` wants it."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    reason = None
    if model.config.is_encoder_decoder:
        reason = "is an encoder-decoder model"
    elif getattr(model, "_is_stateful", False):
        reason = "keeps a recurrent state instead of keys and values"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = "computes its attention itself (ALiBi or an old attention)"
    elif kinds := set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}:
        reason = f"has layers of type {', '.join(sorted(kinds))}"
    elif getattr(config, "attn_logit_softcapping", None):
        reason = "caps its attention scores (attn_logit_softcapping)"
    elif getattr(config, "use_bidirectional_attention", False):
        reason = "looks ahead (use_bidirectional_attention)"
    elif any(hasattr(module, "sinks") for module in model.get_decoder().modules()):
        reason = "has learned attention sinks"
    elif (own := implementation(config)) not in ("sdpa", "eager"):
        reason = f'runs {own!r}: load it with attn_implementation="sdpa"'
    if reason:
        raise CannotServe(f"{what} cannot serve {name}: it {reason}")


def implementation(config: Any) -> str:
    """The attention that a config runs by itself, also while it is taken over."""
    taken = _taken.get(id(config))
    return config._attn_implementation if taken is None else taken.implementation

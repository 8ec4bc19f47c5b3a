"""How a cache answers the attention of its model, whatever the model's architecture.

While a forward that uses the cache runs, and only then, the attention function of the model's
blocks is one of this file, which hands queries and the new keys and values to `ModelCache.attend`.
The library builds no mask then: a cache knows which rows it holds and masks them by position. No
modelling code is touched, so positions, norms, biases and scalings stay the model's own.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "pertoken_cache"
FULL, SLIDING = "full_attention", "sliding_attention"

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""`(module, query, key, value, attention_mask, scaling=..., **kwargs)`, as transformers calls it;
query [batch, heads, time, dim], key and value [batch, key heads, time, dim]; gives the mixed values
[batch, time, heads, dim] and the weights or None."""

_answering: list[Attend] = []  # the innermost one answers


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _answering[-1](module, query, key, value, *args, **kw)


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
        before = [config._attn_implementation for config in self._configs]
        for config in self._configs:
            config._attn_implementation = IMPLEMENTATION
        _answering.append(attend)
        try:
            yield
        finally:
            _answering.pop()
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name


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
    """Raise PertokenError for a model whose attention a cache cannot answer; `what` names it."""
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
    elif config._attn_implementation not in ("sdpa", "eager"):
        reason = f'runs {config._attn_implementation!r}: load it with attn_implementation="sdpa"'
    if reason:
        raise PertokenError(f"{what} cannot serve {name}: it {reason}")


@dataclass
class Forward:
    """What is known about a forward when it begins.

    input_ids: [batch, time], the new tokens; None where embeddings were given.
    position_ids: [batch, time], what the model numbers them with.
    positions: [batch, time], their numbers among the tokens of their row, -1 for padding.
    tree: the mask of a token tree per layer type (key None where it is one for all), float
        [batch, 1, time, rows + time]; None for ordinary text.
    """

    input_ids: torch.Tensor | None
    position_ids: torch.Tensor
    positions: torch.Tensor
    tree: dict[str | None, torch.Tensor] | None


class ModelCache(Cache):
    """Base of the caches that answer the attention of one model.

    A subclass keeps its rows as it likes. It writes `get_seq_length` (tokens seen), `begin`,
    `attend` and `end`; new rows belong to the cache from `end(True)` on, so that a forward that
    fails leaves it as it was. The hooks on the model do nothing unless a forward is given this
    very cache; `close()`, a `with`, or dropping the cache removes them.
    """

    def __init__(self, model: PreTrainedModel, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.model = model
        self.takeover = Takeover(model)
        self.windows = layer_windows(model)
        self.forward: Forward | None = None
        self._entered: AbstractContextManager[None] | None = None
        self._close = weakref.finalize(self, _remove, _watch(model, self))
        self._close.atexit = False

    def begin(self, forward: Forward) -> None:
        """A forward of `model` with this cache begins."""

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of the layer `module.layer_idx`; see `Attend`. Key and value: the new rows."""
        raise NotImplementedError

    def end(self, finished: bool) -> None:
        """The forward is over; `finished` is False where it failed."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives the new rows back: `attend` puts the others beside them."""
        if self.forward is None:
            raise PertokenError(
                f"this {type(self).__name__} was made for another model, or was closed: make one "
                "with the model that is to use it"
            )
        return key_states, value_states

    def close(self) -> None:
        """Remove the hooks from the model; the cache cannot be used any more."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, forward: Forward) -> None:
        self.begin(forward)
        self.forward = forward
        self._entered = self.takeover(self.attend)
        self._entered.__enter__()

    def _end(self, finished: bool) -> None:
        entered, self._entered = self._entered, None
        if entered is None:  # it failed before it began
            return
        entered.__exit__(None, None, None)
        try:
            self.end(finished)
        finally:
            self.forward = None


def _watch(model: PreTrainedModel, cache: ModelCache) -> list[Any]:
    """Hooks on the decoder that tell the cache of every forward it takes part in."""
    decoder = model.get_decoder()
    signature = inspect.signature(decoder.forward)
    weak: Callable[[], ModelCache | None] = weakref.ref(cache)

    def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of a forward that takes the cache, else None."""
        named = signature.bind_partial(*args, **kwargs).arguments
        named = {**named, **named.get("kwargs", {})}
        return None if named.get("past_key_values") is not weak() else named

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own, named = weak(), given(args, kwargs)
        if own is not None and named is not None:
            own._begin(_forward(named, own))

    def after(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        own, named = weak(), given(args, kwargs)
        if own is not None and named is not None:
            own._end(output is not None)

    return [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _forward(given: dict[str, Any], cache: ModelCache) -> Forward:
    """The arguments of a decoder's forward, its defaults filled in."""
    ids: torch.Tensor | None = given.get("input_ids")
    embeds: torch.Tensor | None = given.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    if tokens is None:
        raise PertokenError("a forward needs input_ids or inputs_embeds")
    batch, time = tokens.shape[:2]
    seen = int(cache.get_seq_length())
    mask, numbers = given.get("attention_mask"), given.get("position_ids")
    tree = None
    if isinstance(mask, dict):
        tree = {kind: each for kind, each in mask.items() if each is not None} or None
    elif isinstance(mask, torch.Tensor) and mask.dim() == 4:
        tree = {None: mask}
    if tree is None and isinstance(mask, torch.Tensor) and mask.dim() == 2:
        real = mask.to(tokens.device).bool()
        if real.shape[1] < seen + time:
            raise PertokenError(
                f"the attention mask covers {real.shape[1]} tokens, but the cache has seen {seen} "
                f"and {time} are new: it must cover all {seen + time}"
            )
        positions = torch.where(real, real.cumsum(-1) - 1, -1)[:, seen : seen + time]
        if numbers is None and not bool(real.all()):
            raise PertokenError("a padded batch needs position_ids (generate makes them)")
    else:
        positions = torch.arange(seen, seen + time, device=tokens.device).expand(batch, -1)
    if numbers is None:
        numbers = torch.arange(seen, seen + time, device=tokens.device)[None]
    elif tree is not None:
        positions = numbers.expand(batch, -1)
    return Forward(ids, numbers.expand(batch, -1), positions, tree)

"""How a cache answers the attention of its model, whatever the model's architecture.

While a forward that uses the cache runs, and only then, the attention function of the model's
blocks is `pertoken._takeover`'s, which hands queries and the new keys and values to
`ModelCache.attend`. The library builds no mask then: a cache knows which rows it holds and masks
them by position.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers.cache_utils import Cache

from pertoken._takeover import FULL, SLIDING, Takeover, layer_windows
from pertoken.errors import CannotServe, PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Forward", "ModelCache", "mask_of_layer", "opens", "shows"]


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
    very cache; `close()`, a `with`, or dropping the cache removes them. A forward that Ctrl-C broke
    off has no end (torch tells nobody of it): the model's next forward or `close()` ends it.
    """

    def __init__(self, model: PreTrainedModel, layers: list[Any]) -> None:
        _refuse_wrapped(model, type(self).__name__)
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
                f"this {type(self).__name__} was made for one {type(self.model).__name__} and is "
                "used with another model, or was closed: make one with the model that is to use it"
            )
        return key_states, value_states

    def close(self) -> None:
        """Remove the hooks from the model; the cache cannot be used any more."""
        self._end(False)
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
        if entered is None:  # none began, or it failed before
            return
        entered.__exit__(None, None, None)
        try:
            self.end(finished)
        finally:
            self.forward = None


def mask_of_layer(tree: dict[str | None, torch.Tensor], window: int | None) -> torch.Tensor:
    """The mask of a tree for a layer with this window."""
    kind = FULL if window is None else SLIDING
    return tree[kind] if kind in tree else tree[None]


def opens(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask lets see, bool."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def shows(mask: torch.Tensor | None) -> bool:
    """Whether any query sees any of the keys."""
    return mask is None or bool(opens(mask).any())


def _refuse_wrapped(model: PreTrainedModel, what: str) -> None:
    """Raise CannotServe for a text model inside of one that also reads pictures or sound.

    That hands its decoder embeddings and masks made before, not the ids and the padding.
    """
    if model.config.get_text_config(decoder=True) is not model.config:
        raise CannotServe(
            f"{what} cannot serve {type(model).__name__}: it reads more than text and hands its "
            f"{type(model.get_decoder()).__name__} embeddings; load a model of text alone"
        )


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
        if own is not None:
            own._end(False)  # of a forward that was broken off
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

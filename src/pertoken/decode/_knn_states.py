"""Where a model keeps the key of a context, and reading it: of whole texts, and while it decodes.

The key is what the feed-forward part of the last block reads, behind its norm (1911.00172, section
5). Blocks that run attention and feed-forward side by side (GPT-NeoX, Phi) give the feed-forward
part a norm of the block's input; that is the key there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pertoken._blocks import Blocks
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Watch", "key_place", "read", "windows"]

_PLACES = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "fc1")


def key_place(model: PreTrainedModel) -> torch.nn.Module:
    """The module whose input is the key.

    Raises PertokenError for what is no decoder-only model, and for a last block without such a
    module, whose parts it names.

    >>> from pertoken.testing import tiny_model
    >>> key_place(tiny_model("opt", layers=1))
    Linear(in_features=32, out_features=..., bias=True)
    """
    name = type(model).__name__
    if not hasattr(model, "get_decoder") or model.config.is_encoder_decoder:
        raise PertokenError(f"knn-lm needs a decoder-only model of transformers, not {name}")
    parts = dict(Blocks(model).modules[-1].named_children())
    for place in _PLACES:
        if place in parts:
            return parts[place]
    raise PertokenError(
        f"knn-lm takes its keys from the input of a block's feed-forward part; the last block of "
        f"{name} has no {', '.join(_PLACES)}, only {', '.join(parts)}"
    )


class Watch:
    """What the last forward read and the keys it made, noted by two hooks on the model.

    ids: [batch, time], the forward's tokens, None before the first and where embeddings were given;
    seen: tokens in the cache before them; positions: [batch, time] or None; keys: [batch, time,
    hidden].
    """

    def __init__(self, model: PreTrainedModel, place: torch.nn.Module) -> None:
        self.ids: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.keys: torch.Tensor | None = None
        self.seen = 0
        decoder = model.get_decoder()
        names = list(inspect.signature(decoder.forward).parameters)

        def begins(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(names, args, strict=False)) | kwargs
            cache = given.get("past_key_values")
            self.keys = None
            self.ids, self.positions = given.get("input_ids"), given.get("position_ids")
            self.seen = 0 if cache is None else int(cache.get_seq_length())

        def passes(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.ids is not None:
                self.keys = hidden.detach().reshape(*self.ids.shape, hidden.shape[-1])

        self._handles = (
            decoder.register_forward_pre_hook(begins, with_kwargs=True),
            place.register_forward_pre_hook(passes, with_kwargs=True),
        )

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def key_of(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Keys [batch, hidden] of whole texts [batch, time] if the last forward made them.

        Made they are at the column that stands for the text's last token, if the columns up to it
        are the text behind the cache. In a tree of drafts, whose nodes come parents first, columns
        whose positions go up by one are a path.
        """
        if self.ids is None or self.keys is None or len(self.ids) != len(input_ids):
            return None
        column = input_ids.shape[1] - self.seen - 1
        if not 0 <= column < self.ids.shape[1]:
            return None
        if not torch.equal(self.ids[:, : column + 1], input_ids[:, self.seen :]):
            return None
        if self.seen and column and self.positions is not None:
            steps = self.positions[..., : column + 1].diff(dim=-1)
            if not bool((steps == 1).all()):
                return None
        return self.keys[:, column]


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[Watch]:
    """A `Watch` on the model for the length of a `with`."""
    watch = Watch(model, key_place(model))
    try:
        yield watch
    finally:
        watch.remove()


@torch.no_grad()
def read(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    logits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys [batch, time, hidden] of texts from their beginning, and their logits if wanted.

    input_ids: [batch, time]; mask: [batch, time], 0 for left padding; logits: [batch, time, vocab].
    """
    reader: Any = model if logits else model.get_decoder()
    given: dict[str, Any] = {}
    if mask is not None and not bool(mask.all()):
        given["attention_mask"] = mask
        if "position_ids" in inspect.signature(reader.forward).parameters:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with watched(model) as watch:
        output = reader(input_ids=input_ids, use_cache=False, return_dict=True, **given)
    assert watch.keys is not None
    return watch.keys, output.logits if logits else None


def windows(length: int, context: int) -> list[tuple[int, int, int]]:
    """How a text of `length` tokens is read: (begin, first, stop) of each window.

    The model reads the tokens begin … stop - 1, and the keys of first … stop - 1 are taken, each to
    predict the token behind it. The first window is `context` long; each further one begins half a
    window later, so that no key but the first ones has read less than that (our reading).

    >>> windows(10, 4)
    [(0, 0, 4), (2, 4, 6), (4, 6, 8), (6, 8, 9)]
    """
    found: list[tuple[int, int, int]] = []
    begin = first = 0
    while first < length - 1:
        stop = min(begin + context, length - 1)
        found.append((begin, first, stop))
        begin, first = begin + max(1, context // 2), stop
    return found

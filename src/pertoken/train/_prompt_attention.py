"""How much of a token's attention lies on the prompt, from a forward that keeps no attention map.

The input of one block is noted while the model runs; behind it that block's own code is run up to
its attention once more, without gradient, and only the sums over the prompt's keys are taken, some
queries at a time. No eager attention, whatever the forward itself runs with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

from pertoken._blocks import Blocks
from pertoken._takeover import layer_windows, refuse_unfit, visible
from pertoken.errors import PertokenError

__all__ = ["Watch", "prompt_attention", "watching"]

Query = Literal["token", "predictor"]
_QUERIES = 256  # rows of attention that are there at once


class _Summed(Exception):
    """Ends a block at its attention."""


class Watch:
    """What a block was called with; `prompt_shares` after the model's forward."""

    def __init__(self, model: Any, layer: int) -> None:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        refuse_unfit(model, "attention on the prompt")
        self._blocks = Blocks(model)
        windows = layer_windows(model)
        if not -len(windows) <= layer < len(windows):
            raise PertokenError(f"layer must be 0 to {len(windows) - 1}, or from -1, got {layer}")
        self._window = windows[layer]
        self.block = self._blocks.modules[layer]
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def note(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook in front of the block; the first call counts."""
        if self._call is None:
            self._call = args, kwargs

    @torch.no_grad()
    def prompt_shares(
        self,
        prompt: torch.Tensor,
        real: torch.Tensor,
        *,
        query: Query = "token",
        exclude_sink: bool = False,
    ) -> torch.Tensor:
        """What `prompt_attention` gives, of the forward that was watched: [batch, time - 1].

        prompt: bool [batch, time]; real: [batch, time], 0 where there is padding.
        """
        if self._call is None:
            raise PertokenError("the model has not run while its attention was watched")
        positions = torch.where(real != 0, (real != 0).long().cumsum(1) - 1, -1)
        if exclude_sink:
            prompt = prompt & (positions != 0)
        found: list[torch.Tensor] = []

        def attend(
            _: Any, query: Any, key: Any, *__: Any, scaling: float | None = None, **___: Any
        ) -> Any:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            key = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            for start in range(0, query.shape[2], _QUERIES):
                rows = slice(start, start + _QUERIES)
                scores = (query[:, :, rows].float() * scale) @ key.transpose(2, 3)
                seen = visible(positions[:, rows], positions, self._window)
                scores.masked_fill_(~seen[:, None], -torch.inf)
                found.append((scores.softmax(-1) * prompt[:, None, None]).sum(-1).mean(1))
            raise _Summed

        args, kwargs = self._call
        try:
            with self._blocks.takeover(attend):
                self.block.forward(*args, **kwargs)
        except _Summed:
            shares = torch.cat(found, dim=1)
            return shares[:, 1:] if query == "token" else shares[:, :-1]
        raise PertokenError(f"{type(self.block).__name__} has no attention that could be watched")


@contextmanager
def watching(model: Any, layer: int = -1) -> Iterator[Watch]:
    """Watch a block for the length of a `with`; the model runs once in it."""
    watch = Watch(model, layer)
    handle = watch.block.register_forward_pre_hook(watch.note, with_kwargs=True)
    try:
        yield watch
    finally:
        handle.remove()


@torch.no_grad()
def prompt_attention(
    model: Any,
    input_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    layer: int = -1,
    query: Query = "token",
    exclude_sink: bool = False,
) -> torch.Tensor:
    """How much of each token's attention lies on the prompt, in [0, 1]: [batch, time - 1].

    input_ids, prompt_mask (bool), attention_mask: [batch, time]. Column t belongs to token t + 1,
    as in log-probabilities. layer: the block, the last one by default. query: "token" is the row
    of the token itself, as the authors' code takes it; "predictor" that of the token before, which
    its loss comes from. Heads are averaged. exclude_sink: the first token of each row, which often
    takes much of all attention whatever it says, does not count as prompt.

    PertokenError for models whose attention can't be taken over (ALiBi, recurrent, softcapped).

    >>> from pertoken.testing import tiny_model
    >>> prompt = torch.tensor([[True, True, False, False]])
    >>> prompt_attention(tiny_model("llama"), torch.tensor([[5, 6, 7, 8]]), prompt).shape
    torch.Size([1, 3])
    """
    if query not in get_args(Query):
        raise PertokenError(f'query must be "token" or "predictor", got {query!r}')
    if prompt_mask.shape != input_ids.shape:
        raise PertokenError(
            f"prompt_mask must be [batch, time] like input_ids {list(input_ids.shape)}, got "
            f"{list(prompt_mask.shape)}"
        )
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    with watching(model, layer) as watch:
        model(input_ids=input_ids, attention_mask=real, use_cache=False)
    prompt = prompt_mask.bool()
    return watch.prompt_shares(prompt, real, query=query, exclude_sink=exclude_sink)

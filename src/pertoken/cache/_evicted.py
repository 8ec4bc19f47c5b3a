"""Keys and values of evicted tokens, made again layer by layer from what is kept of them.

The evicted tokens lie in blocks with fixed borders, so a block is always recomputed in the same
shapes and gives the same bits. A layer's keys and values come from its block input (`project`); the
next layer's block input comes from running the block over the evicted tokens too (`advance`), with
causal attention among them, and takes the place of the old one.

One layer's keys and values of all evicted tokens are alive while they fit into `spare` rows: then a
layer takes one run of each block. Of a longer text two blocks' are alive. Then a layer goes from
the last block to the first (a block that was advanced is not read again in its layer), and makes
the blocks before each for the occasion: a block is projected once for every later block as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils.output_capturing import _active_collector

from pertoken._blocks import Blocks
from pertoken._takeover import sdpa, visible
from pertoken.cache._paged import Part, attend_part, merge, mixed_values

Pair = tuple[torch.Tensor, torch.Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]
See = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Takes the number of a block and its keys and values [batch, key heads, time, dim]."""


def token_positions(ids: torch.Tensor) -> torch.Tensor:
    """Numbers of the tokens of each row [batch, time], -1 at padding (ids below 0).

    >>> token_positions(torch.tensor([[-1, 7, 8], [7, 7, 7]])).tolist()
    [[-1, 0, 1], [0, 1, 2]]
    """
    real = ids >= 0
    return torch.where(real, real.cumsum(-1) - 1, -1)


def tensor_bytes(held: Any) -> int:
    """Bytes of all tensors in nested lists, tuples and mappings, shared memory once."""
    storages: dict[int, int] = {}

    def walk(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, Mapping):
            for each in item.values():
                walk(each)
        elif isinstance(item, list | tuple):
            for each in item:
                walk(each)

    walk(held)
    return sum(storages.values())


class Evicted:
    """The evicted tokens during one forward.

    ids: [batch, evicted], -1 at padding; size: tokens of a block; kept: block inputs
    [batch, evicted, hidden] of the layers that have them. spare: tokens whose keys and values may
    be alive in one layer. note: told of those that are, beside the cache's own, for counting.
    """

    def __init__(
        self,
        blocks: Blocks,
        windows: Sequence[int | None],
        ids: torch.Tensor,
        size: int,
        kept: Mapping[int, torch.Tensor],
        spare: int = 0,
        note: Callable[..., None] = lambda *_: None,
    ) -> None:
        self.blocks, self.windows, self.kept, self.note = blocks, windows, kept, note
        self._fits = ids.shape[1] <= spare
        self.positions = token_positions(ids)
        end = ids.shape[1]
        self.parts = [slice(start, min(start + size, end)) for start in range(0, end, size)]
        self.hidden: list[torch.Tensor | None] = []
        self.calls: list[list[Call]] = []
        for part in self.parts:
            entered = blocks.enter(ids[:, part].clamp(min=0), self.positions[:, part].clamp(min=0))
            self.calls.append(entered.calls)
            self.hidden.append(None if 0 in kept else entered.hidden)
        self._fixed = tensor_bytes((self.positions, self.calls))

    @property
    def nbytes(self) -> int:
        """Bytes of block inputs, rotations and positions, without what is kept between forwards."""
        return self._fixed + tensor_bytes(self.hidden)

    def page(self, layer: int, wanted: Sequence[bool], see: See) -> None:
        """Make one layer's keys and values, show them block by block, and go to the next layer.

        wanted: which blocks are to be shown. Layers must come in order.
        """
        order = range(len(self.parts))
        made: list[Pair] | None = [] if self._fits else None
        with _unrecorded():
            for index in order if self._fits else reversed(order):
                if self._advances(layer):
                    self._advance(layer, index, see if wanted[index] else None, made)
                elif wanted[index]:
                    pair = self._project(layer, index)
                    self.note(*pair)
                    see(index, *pair)

    def rebuild(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's keys and values [batch, key heads, evicted, dim], all of them at once."""
        made: list[Pair] = []
        with _unrecorded():
            for index in range(len(self.parts)):
                if self._advances(layer):
                    self._advance(layer, index, None, made)
                else:
                    _add(made, *self._project(layer, index))
        return made[0]

    def _advances(self, layer: int) -> bool:
        return layer + 1 < len(self.windows) and layer + 1 not in self.kept

    def _input(self, layer: int, index: int) -> torch.Tensor:
        hidden = self.hidden[index]
        if layer in self.kept:
            hidden = self.kept[layer][:, self.parts[index]]
        assert hidden is not None  # the layers come in order
        return hidden

    def _project(self, layer: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.blocks.project(layer, self._input(layer, index), self.calls[index][layer])

    def _advance(
        self,
        layer: int,
        index: int,
        see: See | None,
        made: list[Pair] | None,
    ) -> None:
        """Run one block of tokens through a layer.

        made: holds keys and values of all blocks before it, and then its own too; None to make
            them for the occasion.
        """
        part, window = self.parts[index], self.windows[layer]
        queries = self.positions[:, part]

        def attend(
            module: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: Any,
            scaling: float | None = None,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, None]:
            if see is not None:
                see(index, key, value)
            if made is not None:
                keys, values = _add(made, key, value)
                self.note(keys, values, key, value)
                seen = self.positions[:, : part.stop]
                allowed = visible(queries, seen, window)[:, None]
                return sdpa(module, query, keys, values, allowed, scaling=scaling)
            self.note(key, value)
            mixed: Part | None = None
            for before in range(index + 1):
                allowed = visible(queries, self.positions[:, self.parts[before]], window)[:, None]
                if not bool(allowed.any()):
                    continue
                keys, values = (key, value) if before == index else self._project(layer, before)
                self.note(key, value, keys, values)
                mixed = merge(mixed, attend_part(query, keys, values, allowed, scaling))
            assert mixed is not None  # a token sees itself
            return mixed_values(mixed, query.dtype), None

        self.hidden[index] = self.blocks.advance(
            layer, self._input(layer, index), self.calls[index][layer], attend
        )


def _add(made: list[Pair], keys: torch.Tensor, values: torch.Tensor) -> Pair:
    """Put keys and values behind those that the list holds as one pair; all of them."""
    if made:
        keys, values = torch.cat((made[0][0], keys), 2), torch.cat((made[0][1], values), 2)
    made[:] = [(keys, values)]
    return made[0]


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Blocks that run again are no part of what `output_hidden_states` collects."""
    token = _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.reset(token)

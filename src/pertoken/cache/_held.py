"""What a cache of recomputable tokens holds: ids of all, rows of the newest, block inputs.

A token before `first` is evicted: its keys and values are gone, its id and, where they are kept,
its block inputs are there. Any rows may be dropped at any time, since all of them can be made
again. Tensors are copied when they are cut, so that what is dropped is freed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers.cache_utils import DynamicLayer

Change = Callable[[torch.Tensor], torch.Tensor]


def size_of(*tensors: torch.Tensor | None) -> int:
    """Bytes of tensors that share no memory."""
    return sum(each.numel() * each.element_size() for each in tensors if each is not None)


class Rows(DynamicLayer):
    """Keys and values of one layer's newest tokens; `seen` counts all tokens of the cache."""

    seen = 0
    nbytes = 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def put(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        """Hold these rows [batch, key heads, rows, dim], or none."""
        self.keys, self.values = keys, values
        self.is_initialized = keys is not None
        self.nbytes = size_of(keys, values)

    def change(self, change: Change) -> None:
        """Replace keys and values by a function of each."""
        if self.keys is not None and self.values is not None:
            self.put(change(self.keys), change(self.values))


class Held:
    """Tokens of a batch of texts.

    ids: [batch, length], int32, -1 at padding; None while there are none. states: block inputs
    [batch, length, hidden] by layer. layers: the rows of the tokens from `first` on.
    """

    def __init__(self, layers: int) -> None:
        self.layers = [Rows() for _ in range(layers)]
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self.ids: torch.Tensor | None = None
        self.states: dict[int, torch.Tensor] = {}
        self.first = 0
        self.drop_rows()
        self._count()

    def copy(self, other: Held) -> None:
        """Hold what another holds, in tensors of its own."""
        self.ids = None if other.ids is None else other.ids.clone()
        self.states = {layer: state.clone() for layer, state in other.states.items()}
        self.first = other.first
        for rows, theirs in zip(self.layers, other.layers, strict=True):
            rows.put(theirs.keys, theirs.values)
            rows.change(torch.clone)
        self._count()

    @property
    def length(self) -> int:
        return 0 if self.ids is None else self.ids.shape[1]

    @property
    def batch(self) -> int:
        return 0 if self.ids is None else self.ids.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(rows.nbytes for rows in self.layers)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of ids and block inputs."""
        return size_of(self.ids, *self.states.values())

    def joined(self, new: torch.Tensor) -> torch.Tensor:
        """The ids with new ones [batch, time] behind them."""
        new = new.to(torch.int32)
        return new if self.ids is None else torch.cat((self.ids, new), 1)

    def take(self, ids: torch.Tensor, states: Mapping[int, torch.Tensor], first: int) -> None:
        """All ids from now on, block inputs of the new tokens, and where the rows begin."""
        self.ids, self.first = ids, first
        for layer, new in states.items():
            old = self.states.get(layer)
            self.states[layer] = new if old is None else torch.cat((old, new), 1)
        self._count()

    def drop_rows(self) -> None:
        """Evict every token."""
        self.first = self.length
        for rows in self.layers:
            rows.put(None, None)

    def evict(self, first: int) -> None:
        """Drop the rows of tokens before `first`."""
        drop = first - self.first
        if drop > 0:
            for rows in self.layers:
                rows.change(lambda old: old[:, :, drop:].clone())
            self.first = first

    def cut(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        if self.ids is None or length >= self.length:
            return
        self.ids = self.ids[:, :length].clone()
        self.states = {layer: old[:, :length].clone() for layer, old in self.states.items()}
        self.first = min(self.first, length)
        for rows in self.layers:
            rows.change(lambda old: old[:, :, : length - self.first].clone())
        self._count()

    def rearrange(self, source: torch.Tensor, mask: torch.Tensor) -> None:
        """Put token `source` [batch, length] to each place, padding where `mask` is 0.

        No token moves to the left of where rows begin unless all before it do too: sources rise
        within a row.
        """
        assert self.ids is not None
        length = source.shape[1]
        places = torch.arange(length, device=source.device)
        ids = torch.where(mask.bool(), self.ids.gather(1, source), -1).to(torch.int32)
        moved = ((source != places) | (ids != self.ids[:, :length])).any(0)
        if not bool(moved.any()):
            self.cut(length)
            return
        same = int(moved.int().argmax())
        # A row that shifts to the right brings evicted tokens behind the border: it shifts too.
        first = min(length, self.first + max(0, int((places - source).max())))
        for layer, state in self.states.items():
            index = source[:, same:, None].expand(-1, -1, state.shape[2])
            self.states[layer] = torch.cat((state[:, :same], state.gather(1, index)), 1)
        where = (source[:, first:] - self.first)[:, None, :, None]
        for rows in self.layers:
            rows.change(lambda old: old.gather(2, where.expand(-1, old.shape[1], -1, old.shape[3])))
        self.ids, self.first = ids, first
        self._count()

    def change_batch(self, change: Change) -> None:
        """Replace every tensor by a function of it that acts on the batch dimension."""
        if self.ids is None:
            return
        self.ids = change(self.ids)
        self.states = {layer: change(old) for layer, old in self.states.items()}
        for rows in self.layers:
            rows.change(change)

    def _count(self) -> None:
        for rows in self.layers:
            rows.seen = self.length

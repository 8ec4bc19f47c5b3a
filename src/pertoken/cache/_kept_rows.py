"""The rows a layer of an evicting cache holds: keys, values, places, and notes about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class KeptRows:
    """The rows of one layer.

    keys, values: [batch, key heads, rows, dim], keys as the model rotated them.
    positions: [batch, groups, rows], the rows' places in the text, -1 for padding; groups is the
        number of key heads where every head keeps its own rows, else 1.
    notes: [batch, groups, …, rows], what a method remembers of each row; None if nothing.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    notes: torch.Tensor | None = None

    @classmethod
    def none(cls) -> KeptRows:
        """Of a layer that has seen nothing."""
        return cls(torch.empty(0, 0, 0, 0), torch.empty(0, 0, 0, 0), torch.empty(0, 0, 0).long())

    # What `Cache` asks its layers.
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    @property
    def count(self) -> int:
        """Rows held for each batch row, padding included."""
        return self.positions.shape[-1]

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def note_bytes(self) -> int:
        """Bytes of all else."""
        return self.positions.nbytes + (0 if self.notes is None else self.notes.nbytes)

    def extended(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> KeptRows:
        """With new rows behind; `notes` are 0 for those."""
        if not self.count:
            return KeptRows(keys, values, positions)
        notes = self.notes
        if notes is not None:
            notes = torch.nn.functional.pad(notes, (0, keys.shape[2]))
        return KeptRows(
            torch.cat((self.keys, keys), 2),
            torch.cat((self.values, values), 2),
            torch.cat((self.positions, positions), 2),
            notes,
        )

    def take(self, index: torch.Tensor) -> KeptRows:
        """Only some rows: index [batch, groups, rows]."""
        notes = self.notes
        if notes is not None:
            between = notes.dim() - index.dim()
            where = index.reshape(*index.shape[:2], *([1] * between), -1)
            notes = notes.gather(-1, where.expand(*notes.shape[:-1], -1))
        return KeptRows(
            _rows_at(self.keys, index),
            _rows_at(self.values, index),
            self.positions.gather(2, index),
            notes,
        )

    def silenced(self, where: torch.Tensor) -> KeptRows:
        """With notes 0 for some rows: bool [batch, groups, rows]."""
        if self.notes is None:
            return self
        between = [1] * (self.notes.dim() - where.dim())
        where = where.reshape(*where.shape[:2], *between, -1)
        return replace(self, notes=self.notes.masked_fill(where, 0))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> KeptRows:
        """With every tensor changed in the same way."""
        notes = None if self.notes is None else change(self.notes)
        return KeptRows(change(self.keys), change(self.values), change(self.positions), notes)


def _rows_at(state: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """state [batch, key heads, rows, dim], index [batch, groups, kept]; copies what is kept."""
    batch, heads, _, _ = state.shape
    if batch == index.shape[1] == 1:
        return state.index_select(2, index[0, 0])
    rows = torch.arange(batch, device=state.device)[:, None, None]
    columns = torch.arange(heads, device=state.device)[None, :, None]
    return state[rows, columns, index.expand(-1, heads, -1)]

"""A corpus as keys and next tokens on disk, for KNN-LM (1911.00172, section 2).

For every token of every text but the first: the key is the model's state before it predicts that
token (the input of the last block's feed-forward part), the value is the token. A store is a
folder:

* ``keys.bin``: [entries, hidden] and ``values.bin``: int32 [entries], read by memory map;
* ``index.faiss``: with ``index="ivfpq"``;
* ``store.json``: what it was made with and of, and where each text's entries lie.

It is written in ``NAME.part`` beside it. After each window of text that folder notes how far it is,
once the bytes are on the disk; the finished folder is renamed into place. So a build that was
killed goes on at its last window, or starts anew where anything else than the same call comes, and
there is never a store that is half one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from pertoken.decode._knn_build import Build, digest, encode, header_of, made_with, read_header
from pertoken.decode._knn_search import (
    Span,
    exact_distances,
    open_inverted,
    search_all,
    search_inverted,
    squared_norms,
)
from pertoken.decode._knn_states import key_place
from pertoken.errors import PertokenError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["INDEXES", "KNNDatastore", "Neighbours"]

INDEXES = {
    "flat": "every key is read: exact, and linear in the entries",
    "ivfpq": "an inverted file of product-quantised keys (extra `knn`), for large stores",
}
"""How a store can be searched, by name."""
_QUERIES = 256  # that are searched for at a time
_OTHER = {
    "fingerprint": "another model, other weights or another dtype",
    "tokenizer": "another tokenizer",
    "texts": "other texts",
    "context": "another context",
    "index": "another index",
    "dtype": "another dtype of keys",
}


@dataclass(frozen=True)
class Neighbours:
    """What was found for n queries, nearest first.

    distances: squared L2, [n, k], infinite where an ivfpq store found no more; values: ids of the
    next tokens, [n, k]; entries: their numbers in the store, [n, k].
    """

    distances: torch.Tensor
    values: torch.Tensor
    entries: torch.Tensor


class KNNDatastore:
    """A store on disk, opened for the model and tokenizer that made it.

    path: the folder. Nothing of it stays in memory but a number per entry, or the index of an ivfpq
    store.

    Raises PertokenError for a folder that is no store or is damaged, and for another model (its
    weights and dtype count) or tokenizer.

    >>> import tempfile
    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> model, tokenizer = tiny_model("llama", vocab_size=258), ByteTokenizer()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/store"
    ...     store = KNNDatastore.build(model, tokenizer, ["abcabd", "xyz"], path)
    ...     same = KNNDatastore(model, tokenizer, path)
    >>> len(same), same.documents
    (7, [(0, 5), (5, 7)])
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, path: str | Path) -> None:
        self.model, self.tokenizer, self.path = model, tokenizer, Path(path)
        key_place(model)
        self.header = read_header(self.path)
        for name, own in made_with(model, tokenizer).items():
            if self.header[name] != own:
                raise PertokenError(
                    f"{self.path} was made with {self.header['model']}, and this is "
                    f"{_OTHER[name]}: open it with what made it, or build another"
                )
        entries, hidden = self.header["entries"], self.header["hidden"]
        # Mode "c": torch wants arrays it may write to; what is written never reaches the file.
        try:
            keys = np.memmap(self.path / "keys.bin", self.header["dtype"], "c")
            self.keys = keys.reshape(entries, hidden)
            self.values = np.memmap(self.path / "values.bin", "int32", "c").reshape(entries)
        except (OSError, ValueError, TypeError):
            raise PertokenError(
                f"{self.path} is damaged: it does not hold the keys and values of {entries} "
                "entries; delete it and build it again"
            ) from None
        inverted = self.header["index"] == "ivfpq"
        self._index = open_inverted(self.path / "index.faiss") if inverted else None

    @cached_property
    def _norms(self) -> torch.Tensor:
        return squared_norms(self.keys)

    def __len__(self) -> int:
        return int(self.header["entries"])

    def __repr__(self) -> str:
        return f"KNNDatastore({str(self.path)!r}, {len(self):,} entries)"

    @property
    def documents(self) -> list[Span]:
        """Of every text that has entries, the first and the one behind the last."""
        return [(first, stop) for _, first, stop in self.header["documents"]]

    def spans(self, ids: Sequence[int]) -> list[Span]:
        """Where a text of these ids lies in the store; empty if it is not in it."""
        name = digest(ids)
        return [(first, stop) for own, first, stop in self.header["documents"] if own == name]

    def search(self, queries: torch.Tensor, k: int, *, spared: Sequence[Span] = ()) -> Neighbours:
        """The k nearest entries to queries [n, hidden].

        spared: spans of entries that are left out, such as the query's own document. Distances are
        taken from the stored keys whatever the index (so the authors' code, unless told not to).

        Raises PertokenError where fewer than k entries are left.
        """
        left = len(self) - sum(stop - first for first, stop in spared)
        if not 1 <= k <= left:
            beside = " beside the text itself" if spared else ""
            raise PertokenError(
                f"k must be from 1 to the {left:,} entries of {self.path}{beside}, got {k}: take a "
                "smaller k, or more text"
            )
        dtype = torch.float64 if self.keys.dtype == np.float64 else torch.float32
        queries = queries.detach().to("cpu", dtype)
        parts = [torch.zeros(0, k, dtype=torch.long)]
        for start in range(0, len(queries), _QUERIES):
            some = queries[start : start + _QUERIES]
            if self._index is None:
                parts.append(search_all(some, self.keys, self._norms, k, spared))
            else:
                parts.append(search_inverted(some, self._index, k, spared))
        entries = torch.cat(parts)
        distances, order = exact_distances(queries, self.keys, entries).sort(dim=1, stable=True)
        entries = entries.gather(1, order)
        values = torch.from_numpy(self.values[entries.clamp(min=0).numpy()]).long()
        return Neighbours(distances, values, entries)

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        tokenizer: Any,
        texts: Sequence[str],
        path: str | Path,
        *,
        context: int | None = None,
        index: str = "flat",
        dtype: str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Self:
        """Read the texts with the model and store what follows what; the store, opened.

        texts: one per document. path: a folder that is not there yet, or this very store, which is
        then opened. context: tokens the model reads at a time, 1,024 or its positions if they are
        fewer. index: one of `INDEXES`. dtype: of the keys, the model's own if not given (float32
        for bfloat16); "float16" halves the disk. progress: called with (what, windows done, windows
        in all).

        Raises PertokenError for a corpus without a pair of tokens, something else at `path`, a
        build that is going on there, and a model that gives no key.
        """
        if index not in INDEXES:
            hint = nearest(index, INDEXES)
            raise PertokenError(f"unknown index {index!r}{hint}: {', '.join(INDEXES)}")
        key_place(model)
        place = Path(path)
        ids = [
            encode(model, tokenizer, text, f"text {number}") for number, text in enumerate(texts, 1)
        ]
        header = header_of(model, tokenizer, ids, context, index, dtype)
        if not place.exists():
            with Build(place, header) as build:
                build.run(model, ids, progress or (lambda what, done, total: None))
        there = read_header(place)
        for name, what in _OTHER.items():
            if there[name] != header[name]:
                raise PertokenError(f"{place} is a store of {what}: name another place")
        return cls(model, tokenizer, place)

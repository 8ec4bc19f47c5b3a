"""The nearest keys to a query: all keys read, or a product-quantised inverted file of faiss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pertoken._extras import need
from pertoken.errors import PertokenError

__all__ = [
    "check_inverted",
    "exact_distances",
    "open_inverted",
    "search_all",
    "search_inverted",
    "squared_norms",
    "write_inverted",
]

Span = tuple[int, int]  # entries first … stop - 1

ROWS = 1 << 16  # keys that are read at a time
LISTS = 4096  # of the inverted file, at most (the authors' code)
PROBES = 32  # lists that are looked into (the authors' code)
CODE = 64  # bytes of a quantised key, at most (the authors' code)
FEWEST = 39 * 256  # keys from which faiss learns 256 centroids without a warning
_TRAINED_ON = 64  # keys per list; faiss samples them itself above 256
_NUMBERS = 1 << 24  # numbers of a tensor that is made on the way


def squared_norms(keys: np.ndarray[Any, Any]) -> torch.Tensor:
    """Squared length of every key, [entries], in the dtype that keys are compared in."""
    blocks = (_block(keys, start) for start in range(0, len(keys), ROWS))
    return torch.cat([block.square().sum(-1) for block in blocks])


def _block(keys: np.ndarray[Any, Any], start: int) -> torch.Tensor:
    block = torch.from_numpy(np.asarray(keys[start : start + ROWS]))
    return block if block.dtype == torch.float64 else block.float()


def search_all(
    queries: torch.Tensor,
    keys: np.ndarray[Any, Any],
    norms: torch.Tensor,
    k: int,
    spared: Sequence[Span] = (),
) -> torch.Tensor:
    """Numbers [n, k] of the keys nearest to queries [n, hidden] in squared L2; every key is read.

    norms: `squared_norms` of the keys, which would take longer than one query's search. spared:
    entries that are left out.
    """
    best = queries.new_full((len(queries), 0), torch.inf)
    found = torch.zeros(len(queries), 0, dtype=torch.long)
    for start in range(0, len(keys), ROWS):
        block = _block(keys, start)
        # |q - k|² without |q|², which is the same for all keys
        distances = torch.addmm(norms[start : start + ROWS], queries, block.T, alpha=-2)
        for first, stop in spared:
            distances[:, max(0, first - start) : max(0, stop - start)] = torch.inf
        numbers = torch.arange(start, start + len(block)).expand(len(queries), -1)
        best, pick = torch.cat((best, distances), 1).topk(min(k, start + len(block)), largest=False)
        found = torch.cat((found, numbers), 1).gather(1, pick)
    return found


def exact_distances(
    queries: torch.Tensor, keys: np.ndarray[Any, Any], entries: torch.Tensor
) -> torch.Tensor:
    """Squared L2 distance [n, k] of queries [n, hidden] to the keys of entries [n, k].

    From the differences themselves, so that a key is at distance 0 from itself; infinite where the
    entry is -1, which an inverted file gives where it found too few.
    """
    n, k = entries.shape
    step = max(1, _NUMBERS // max(1, k * queries.shape[1]))
    parts = []
    for start in range(0, n, step):
        rows = keys[entries[start : start + step].clamp(min=0).numpy()]
        block = torch.from_numpy(rows).to(queries.dtype)
        parts.append((queries[start : start + step, None] - block).square().sum(-1))
    found = torch.cat(parts) if parts else queries.new_zeros(0, k)
    return found.masked_fill(entries < 0, torch.inf)


def check_inverted(entries: int) -> None:
    """PertokenError where no index could be made of so many entries, or faiss is not there."""
    need("faiss", "knn")
    if entries < FEWEST:
        raise PertokenError(
            f'index="ivfpq" learns from {FEWEST:,} entries or more, and there are {entries:,}; '
            'take index="flat"'
        )


def write_inverted(path: Path, keys: np.ndarray[Any, Any]) -> None:
    """Write an IVFPQ index of the keys [entries, hidden]: extra `knn`.

    Lists are 4,096 as in the authors' code, or the square root of the entries if that is less
    (ours: they had 103 million). Codes have 64 bytes, or the greatest divisor of `hidden` below.
    """
    faiss = need("faiss", "knn")
    entries, hidden = keys.shape
    check_inverted(entries)
    code = max(size for size in range(1, CODE + 1) if hidden % size == 0)
    lists = min(LISTS, round(entries**0.5))
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(hidden), hidden, lists, code, 8)
    index.cp.seed = 0
    chosen = np.linspace(0, entries - 1, min(entries, max(FEWEST, _TRAINED_ON * lists)), dtype=int)
    index.train(np.ascontiguousarray(keys[chosen], dtype=np.float32))
    for start in range(0, entries, ROWS):
        index.add(np.ascontiguousarray(keys[start : start + ROWS], dtype=np.float32))
    faiss.write_index(index, str(path))


def open_inverted(path: Path) -> Any:
    """The index that `write_inverted` wrote; PertokenError where there is none."""
    faiss = need("faiss", "knn")
    try:
        index = faiss.read_index(str(path))
    except RuntimeError:
        raise PertokenError(
            f"{path.parent} is damaged: {path.name} can't be read; delete it and build it again"
        ) from None
    index.nprobe = min(PROBES, index.nlist)
    return index


def search_inverted(
    queries: torch.Tensor, index: Any, k: int, spared: Sequence[Span] = ()
) -> torch.Tensor:
    """Numbers [n, k] of about the nearest keys, -1 where the lists held fewer."""
    faiss = need("faiss", "knn")
    choice: dict[str, Any] = {}
    if spared:
        kept = faiss.IDSelectorAll()
        for first, stop in spared:
            kept = faiss.IDSelectorAnd(
                kept, faiss.IDSelectorNot(faiss.IDSelectorRange(first, stop))
            )
        choice["params"] = faiss.SearchParametersIVF(sel=kept, nprobe=index.nprobe)
    _, found = index.search(np.ascontiguousarray(queries.numpy(), dtype=np.float32), k, **choice)
    return torch.from_numpy(found)

"""How long a look-up in a large store takes beside a step of decoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

ROWS = 1 << 16
CONTEXT = 128  # tokens in front of the timed step


def fill(path: Path, keys: np.ndarray[Any, Any], entries: int, seed: int = 0) -> None:
    """Write so many keys (float32 [entries, hidden]): the real ones, and their likes.

    A further key is a real one plus noise with half the spread of each of its numbers, so that keys
    lie in clusters as real ones do, and none is there twice.
    """
    draw = np.random.default_rng(seed)
    real = np.asarray(keys, dtype=np.float32)
    spread = 0.5 * real[:ROWS].std(0)
    with path.open("wb") as file:
        file.write(real[:entries].tobytes())
        for start in range(len(real), entries, ROWS):
            count = min(ROWS, entries - start)
            noise = draw.standard_normal((count, real.shape[1]), dtype=np.float32) * spread
            file.write((real[draw.integers(0, len(real), count)] + noise).tobytes())


def lookup_times(
    store: Any, entries: int, *, index: str = "ivfpq", turns: int = 40, seed: int = 0
) -> dict[str, Any]:
    """Median seconds of a look-up among `entries` and of a plain step, in turns in one process.

    A look-up is all that `KNNMemory` does in a step: search, distances of the 64 neighbours from
    the stored keys, votes, mixture over the vocabulary. store: of real text; its keys are filled up
    (see `fill`) in a folder that is gone afterwards. Also the seconds in which the index was made.
    """
    with TemporaryDirectory(dir=store.path.parent) as folder:
        made = time.perf_counter()
        large = _Large(store, Path(folder), entries, index, seed)
        made = time.perf_counter() - made
        step = _decoding(store, turns + 3)
        looks, steps = [], []
        for number in range(turns + 3):
            seconds, ids, scores, key = step()
            if number >= 3:  # the first ones bring the pages in
                steps.append(seconds)
            began = time.perf_counter()
            large.look(ids, scores, key)
            if number >= 3:
                looks.append(time.perf_counter() - began)
    found = {"lookup": median(looks), "step": median(steps), "lookups": looks, "steps": steps}
    return {**found, "entries": entries, "index": index, "index_seconds": made}


class _Large:
    """A store with more keys than were read: a memory of it, without a model's hooks."""

    def __init__(self, store: Any, folder: Path, entries: int, index: str, seed: int) -> None:
        import copy

        from pertoken.decode import KNNMemory
        from pertoken.decode._knn_search import open_inverted, write_inverted

        fill(folder / "keys.bin", store.keys, entries, seed)
        large = copy.copy(store)
        large.header = store.header | {"entries": entries}
        large.keys = np.memmap(folder / "keys.bin", "float32", "c").reshape(entries, -1)
        large.values = np.resize(np.asarray(store.values), entries)
        large._index = None
        if index == "ivfpq":
            write_inverted(folder / "index.faiss", large.keys)
            large._index = open_inverted(folder / "index.faiss")
        self.memory = KNNMemory(large, k=min(64, entries))
        self.memory.close()

    def look(self, ids: Any, scores: Any, key: Any) -> None:
        """All of a step but the state itself, which the model has computed anyway."""
        self.memory.keys = lambda _: key  # type: ignore[method-assign]
        self.memory(ids, scores)


def _decoding(store: Any, steps: int) -> Callable[[], tuple[float, Any, Any, Any]]:
    """A function that decodes a token: (seconds, text, scores, key)."""
    import torch
    from transformers import DynamicCache

    from pertoken.decode._knn_states import Watch, key_place

    model = store.model
    first = np.resize(np.asarray(store.values), CONTEXT)
    text = torch.tensor(first[None], dtype=torch.long)
    cache = DynamicCache(config=model.config)
    model(input_ids=text[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def step() -> tuple[float, Any, Any, Any]:
        nonlocal text
        watch = Watch(model, key_place(model))
        began = time.perf_counter()
        output = model(input_ids=text[:, -1:], past_key_values=cache, use_cache=True)
        scores = output.logits[:, -1].float()
        best = scores.argmax(-1, keepdim=True)
        seconds = time.perf_counter() - began
        key = watch.key_of(text)
        watch.remove()
        read, text = text, torch.cat((text, best), -1)
        return seconds, read, scores, key

    return step

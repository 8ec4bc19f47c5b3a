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
WARM_UP = 3  # turns that bring the pages in and are not counted


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
    from pertoken.decode import KNNMemory

    class Given(KNNMemory):
        """Looks a key up that is given."""

        key: Any = None

        def keys(self, input_ids: Any) -> Any:
            return self.key

    with TemporaryDirectory(dir=store.path.parent) as folder:
        made = time.perf_counter()
        large = _filled(store, Path(folder), entries, index, seed)
        made = time.perf_counter() - made
        step = _decoding(store)
        looks, steps = [], []
        with Given(large, k=min(64, entries)) as memory:
            for _ in range(WARM_UP + turns):
                seconds, ids, scores, memory.key = step()
                steps.append(seconds)
                began = time.perf_counter()
                memory(ids, scores)
                looks.append(time.perf_counter() - began)
    looks, steps = looks[WARM_UP:], steps[WARM_UP:]
    found = {"lookup": median(looks), "step": median(steps), "lookups": looks, "steps": steps}
    return {**found, "entries": entries, "index": index, "index_seconds": made}


def _filled(store: Any, folder: Path, entries: int, index: str, seed: int) -> Any:
    """The store with more keys than were read; it is not written as one."""
    import copy

    from pertoken.decode._knn_search import open_inverted, write_inverted

    fill(folder / "keys.bin", store.keys, entries, seed)
    large = copy.copy(store)
    large.header = store.header | {"entries": entries}
    large.keys = np.memmap(folder / "keys.bin", "float32", "c").reshape(entries, -1)
    large.values = np.resize(np.asarray(store.values), entries)
    large._index = None
    vars(large).pop("_norms", None)  # of the store's own keys
    if index == "ivfpq":
        write_inverted(folder / "index.faiss", large.keys)
        large._index = open_inverted(folder / "index.faiss")
    return large


def _decoding(store: Any) -> Callable[[], tuple[float, Any, Any, Any]]:
    """A function that decodes a token: (seconds, text, scores, key)."""
    import torch
    from transformers import DynamicCache

    from pertoken.decode._knn_states import Watch, key_place

    model = store.model
    first = np.resize(np.asarray(store.values), CONTEXT)
    text = torch.tensor(first[None], dtype=torch.long)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
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

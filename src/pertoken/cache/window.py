"""Window attention: only the newest tokens stay, the simplest eviction there is.

The baseline of the StreamingLLM paper (arXiv 2309.17453, section 3.1, "window attention"): cheap,
and it breaks down as soon as the first tokens of the text are gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken.cache._evicting import EvictingCache
from pertoken.cache._kept_rows import KeptRows

if TYPE_CHECKING:
    import torch


class WindowCache(EvictingCache):
    """Keeps the newest `budget` tokens of every layer; give it to `generate` as past_key_values.

    A query sees these and itself. Raises PertokenError for a budget below 1 and for models without
    a cache of keys and values that can be answered (recurrent, encoder-decoder, ALiBi).

    >>> import torch
    >>> from pertoken.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> cache = WindowCache(model, budget=4)
    >>> ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    >>> out = model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
    >>> cache.layers[0].positions.tolist()
    [[[3, 4, 5, 6]]]
    """

    slug = "window"

    def _priority(self, layer: int, rows: KeptRows) -> torch.Tensor:
        return rows.positions.double()

"""TOVA: the token that the newest query attends to least goes (arXiv 2401.06104).

"Transformers are Multi-State RNNs", section 3.2 (Token Omission Via Attention): after every step
the state keeps the tokens with the highest attention of the last query, averaged over the heads of
a layer, so that all heads of a layer keep the same tokens. Neither the first nor the newest tokens
are protected: whether they stay is up to their weight. After a prompt, or a further piece of text,
its last query alone decides, as in the authors' code.

Query heads that share keys vote like any other head: the average is over query heads, (our reading)
for models with grouped queries, as in the authors' code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pertoken.cache._evicting import EvictingCache
from pertoken.cache._kept_rows import KeptRows

if TYPE_CHECKING:
    import torch


class TOVACache(EvictingCache):
    """Keeps the `budget` tokens that the newest query attends to most.

    Raises PertokenError for a budget below 1 and for models without a cache of keys and values
    that can be answered (recurrent, encoder-decoder, ALiBi).

    >>> import torch
    >>> from pertoken.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> cache = TOVACache(model, budget=4)
    >>> ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    >>> out = model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
    >>> cache.layers[0].count, cache.get_seq_length()
    (4, 7)
    """

    slug = "tova"

    def _answer(
        self,
        module: Any,
        query: torch.Tensor,
        rows: KeptRows,
        allowed: torch.Tensor | None,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, weights = self._watch_last(1, module, query, rows, allowed, scaling)
        return out, weights.mean((1, 2))

    def _priority(self, layer: int, rows: KeptRows) -> torch.Tensor:
        assert rows.notes is not None
        return rows.notes

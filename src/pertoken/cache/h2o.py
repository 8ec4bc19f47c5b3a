"""H2O: tokens that have gathered most attention stay, beside the most recent ones.

"Heavy-Hitter Oracle for Efficient Generative Inference" (arXiv 2306.14048), Algorithm 1: every head
adds up, for each token it holds, the attention weights of all queries so far; after each step it
keeps the tokens with the greatest sums and the `recent` newest ones. Half of the budget each, as in
the paper's experiments. A token that is gone takes its sum with it.

Heads of a group share keys, so they decide together: their sums are added up (our reading; the
authors' code knows no grouped queries). Rows of a batch decide alone (the authors' code adds their
sums up, and asserts a batch of 1 in places).

All queries of a prompt vote, so their weights have to be computed. That is done in blocks of
queries which give the attention itself too, in place of a fused kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pertoken.cache._evicting import EvictingCache
from pertoken.cache._kept_rows import KeptRows
from pertoken.cache._weights import watched
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class H2OCache(EvictingCache):
    """Keeps the `recent` newest tokens and those with the most attention, `budget` in all per head.

    recent: tokens kept for being new; half of the budget, rounded down, by default.
    Raises PertokenError for a budget below 1, for `recent` outside 0 … budget, and for models
    without a cache of keys and values that can be answered (recurrent, encoder-decoder, ALiBi).

    >>> import torch
    >>> from pertoken.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> cache = H2OCache(model, budget=4)
    >>> ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    >>> out = model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
    >>> cache.layers[0].positions[..., 2:].tolist()  # of each head, the recent half
    [[[5, 6], [5, 6]]]
    """

    slug = "h2o"

    per_head = True

    def __init__(self, model: PreTrainedModel, budget: int, *, recent: int | None = None) -> None:
        super().__init__(model, budget)
        self.recent = recent
        self._newest_kept = budget // 2 if recent is None else recent
        if not 0 <= self._newest_kept <= budget:
            raise PertokenError(f"H2OCache: recent must lie in 0 … {budget}, got {recent!r}")

    def _answer(
        self,
        module: Any,
        query: torch.Tensor,
        rows: KeptRows,
        allowed: torch.Tensor | None,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Where no mask is needed there is no padding either.
        voting = None if allowed is None else self._now.positions >= 0
        out, sums = watched(query, rows.keys, rows.values, allowed, scaling, voting)
        return out, sums if rows.notes is None else rows.notes + sums

    def _priority(self, layer: int, rows: KeptRows) -> torch.Tensor:
        assert rows.notes is not None
        priority = rows.notes.clone()
        priority[..., rows.count - self._newest_kept :] = torch.inf
        return priority

"""SnapKV: the last queries vote for the tokens they attend to (arXiv 2404.14469).

"SnapKV: LLM Knows What You are Looking for Before Generation", section 4 and listing 1: the last
`window` queries are the observation window. Per head their attention weights are added up over the
window, for every token before it, and smoothed along the text by pooling with a kernel; the tokens
with the highest votes stay, and the window's own.

- Pooling is by average, the default of the authors' code, which also has max pooling (its LongBench
  settings use that one, with kernel 7 and window 32).
- Heads of a group share keys, so their votes are averaged (our reading; the authors' code repeats
  the keys first and lets every query head choose, which gives up what grouping saves).
- The authors' code selects once, from the prompt, and keeps every token decoded after it. Here the
  budget holds while decoding too, so the same rule is applied again after every token (our
  reading): the observation window is always the last `window` queries, with the weights they had
  when they attended. These weights are kept: `window` numbers per row and key head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pertoken.cache._evicting import EvictingCache
from pertoken.cache._kept_rows import KeptRows
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SnapKVCache(EvictingCache):
    """Keeps the last `window` tokens and those that their queries vote for, `budget` per head.

    window: queries that vote; kernel: width of the average pooling of votes, odd, in tokens.
    Raises PertokenError for a budget below 1 or below `window`, for an even kernel, and for models
    without a cache of keys and values that can be answered (recurrent, encoder-decoder, ALiBi).

    >>> import torch
    >>> from pertoken.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> cache = SnapKVCache(model, budget=4, window=2, kernel=3)
    >>> ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    >>> out = model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
    >>> cache.layers[0].positions[..., 2:].tolist()  # of each head, the window
    [[[5, 6], [5, 6]]]
    """

    slug = "snapkv"

    per_head = True

    def __init__(
        self, model: PreTrainedModel, budget: int, *, window: int = 32, kernel: int = 7
    ) -> None:
        super().__init__(model, budget)
        if not 1 <= window <= budget:
            raise PertokenError(
                f"SnapKVCache: the window of {window} must lie in 1 … {budget}, the budget: its "
                "tokens are always kept"
            )
        if kernel < 1 or kernel % 2 == 0:
            raise PertokenError(f"SnapKVCache: kernel must be odd and at least 1, got {kernel}")
        self.window, self.kernel = window, kernel

    def _answer(
        self,
        module: Any,
        query: torch.Tensor,
        rows: KeptRows,
        allowed: torch.Tensor | None,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, weights = self._watch_last(self.window, module, query, rows, allowed, scaling)
        weights = weights.mean(2)
        if rows.notes is not None:
            weights = torch.cat((rows.notes, weights), 2)
        if self._unsorted:
            weights = self._padding_first(weights)
        return out, weights[:, :, -self.window :]

    def _priority(self, layer: int, rows: KeptRows) -> torch.Tensor:
        assert rows.notes is not None
        votes = rows.notes.sum(2)
        before = rows.count - self.window  # at most 0 in a layer whose own window is smaller
        if before > 0:
            pooled = torch.nn.functional.avg_pool1d(
                votes[..., :before], self.kernel, stride=1, padding=self.kernel // 2
            )
            votes = torch.nn.functional.pad(pooled, (0, self.window), value=torch.inf)
        return votes

    def _padding_first(self, weights: torch.Tensor) -> torch.Tensor:
        """Queries [batch, heads, queries, rows] of padding before all others: no place for them."""
        positions = self._now.positions
        new = min(self.window, positions.shape[1])
        old = weights.shape[2] - new
        held = torch.arange(old, 0, -1, device=positions.device) <= self._newest + 1
        came = (positions >= 0).sort(-1).values[:, -new:]
        order = torch.cat((held, came), 1).int().argsort(dim=1, stable=True)
        return weights.gather(2, order[:, None, :, None].expand(weights.shape))

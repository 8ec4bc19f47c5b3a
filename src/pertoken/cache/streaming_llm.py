"""StreamingLLM: the first tokens and a window of the newest ones (arXiv 2309.17453).

"Efficient Streaming Language Models with Attention Sinks", section 3.2. Softmax must put its weight
somewhere, and models put it on the first tokens of a text, whatever they say. So those, the sinks,
are kept beside the newest tokens. Positions are those within the cache, not those of the text: with
sinks 0-3 and tokens 96-99 held, the next query stands at 8, not at 100.

The authors keep keys before their rotation and rotate all of them anew in every step. Keys come
here as the model rotated them, at their place in the text (our reading): scores of rotary positions
depend on distances only, and among the newest tokens those are right as they are. Too far away are
just the sinks, by the number of tokens evicted. So in every forward the sinks alone are turned
forward by that number, from their own rotation, so no error adds up.

- Models with learned absolute positions (GPT-2, OPT) cannot be re-indexed: positions went into the
  first hidden state and cannot be taken out of a key. There keys keep their places (our reading),
  and a text cannot be longer than the model's table of positions.
- In a layer with a sliding window, the window too is counted in places of the cache (our reading).
  If the window is not wider than the budget, the layer sees what it would see anyway, and the sinks
  go as soon as it has passed them.
- All tokens of one forward are placed behind what the cache holds, as in the authors' code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pertoken.cache._evicting import EvictingCache
from pertoken.cache._kept_rows import KeptRows
from pertoken.cache._rotation import Angles, Rotation
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pertoken.cache._attention import Forward


class StreamingLLMCache(EvictingCache):
    """Keeps the first `sinks` tokens and the newest ones, `budget` tokens in all.

    Raises PertokenError for a budget not above `sinks`, for models whose rotation of keys cannot be
    continued (its frequencies depend on the length of the text), and for models without a cache of
    keys and values that can be answered (recurrent, encoder-decoder, ALiBi).

    >>> from pertoken.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> cache = StreamingLLMCache(model, budget=4, sinks=2)
    >>> ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    >>> out = model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
    >>> cache.layers[0].positions.tolist()
    [[[0, 1, 5, 6]]]
    """

    slug = "streaming-llm"

    def __init__(self, model: PreTrainedModel, budget: int, *, sinks: int = 4) -> None:
        super().__init__(model, budget)
        if not 0 <= sinks < budget:
            raise PertokenError(
                f"StreamingLLMCache: the budget of {budget} must be above its {sinks} sinks, which "
                "are always kept"
            )
        self.sinks = sinks
        self._rotation = Rotation(model, "StreamingLLMCache")
        # A layer that sees no further than the budget anyway keeps its own window and no sinks.
        self._streams = [window is None or budget < window for window in self.windows]
        self._dead_beyond = [
            None if streams else window
            for window, streams in zip(self.windows, self._streams, strict=True)
        ]

    def begin(self, forward: Forward) -> None:
        super().begin(forward)
        self._moved = (self._newest + 1 - self.budget).clamp(min=0)  # [batch, 1], places
        self._angles: Angles = {}
        if any(self._rotation.turns) and bool(self._moved.any()):
            self._angles = self._rotation.angles(self._moved, self.layers[0].keys)

    def _looked_at(self, layer: int, rows: KeptRows) -> KeptRows:
        if not self._streams[layer] or rows.count == self._now.positions.shape[1]:
            return rows
        is_sink = (rows.positions >= 0) & (rows.positions < self.sinks)
        places = rows.positions + is_sink * self._moved.unsqueeze(-1)
        if not self._angles or not self._rotation.turns[layer]:
            return replace(rows, positions=places)
        # Sinks come first. Rows with padding before them have evicted nothing and move by 0, but
        # where rows were sorted anew, padding came in between.
        first = rows.count if self._unsorted else self.sinks
        keys = rows.keys[:, :, :first]
        turned = self._rotation.turned(layer, keys, self._angles)
        turned = torch.where(is_sink[:, :, :first, None], turned, keys)
        keys = torch.cat((turned, rows.keys[:, :, first:]), 2)
        return replace(rows, keys=keys, positions=places)

    def _priority(self, layer: int, rows: KeptRows) -> torch.Tensor:
        priority = rows.positions.double()
        if self._streams[layer]:
            priority = priority.masked_fill(rows.positions < self.sinks, torch.inf)
        return priority

"""A drafter on pertoken's loop, and a loop of its own."""

from __future__ import annotations

from typing import Any

import torch

from pertoken.decode import Drafter, TokenTree


class Echo(Drafter):
    """Drafts a run of the last token."""

    slug = "echo"
    default_budget = 3

    def propose(self, row: int, budget: int, room: int) -> TokenTree:
        last = self.contexts[row][-1]
        tree = TokenTree(last)
        tree.add_chain(0, [last] * min(budget, room))
        return tree


class OneByOne:
    """Takes no options, not even a streamer."""

    slug = "one-by-one"

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        ids, mask = input_ids, model_kwargs.get("attention_mask")  # None: no padding
        if mask is None:
            mask = torch.ones_like(ids)
        going = torch.ones(len(ids), dtype=torch.bool)
        while going.any():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            out = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
            scores = logits_processor(ids, out.logits[:, -1].float())
            if generation_config.do_sample:
                new = torch.multinomial(scores.softmax(-1), 1)[:, 0]
            else:
                new = scores.argmax(-1)
            new = torch.where(going, new, generation_config.pad_token_id or 0)
            ids = torch.cat([ids, new[:, None]], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            going &= ~stopping_criteria(ids, None)
        return ids

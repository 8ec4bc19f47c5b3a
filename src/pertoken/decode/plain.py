"""Plain decoding in the same loop: one token per forward pass, nothing drafted.

The denominator of every ratio, and what ``budget="auto"`` falls back to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pertoken.decode.drafter import Drafter


class Plain(Drafter):
    """Decodes one token at a time.

    Greedy and sampled output equal transformers' own `generate`, sampled under the same seed.

    Example: ``model.generate(**inputs, max_new_tokens=64, custom_generate=Plain())``
    """

    slug = "plain"
    default_budget = 0

    def __init__(
        self,
        *,
        keep: bool = False,
        streamer: Any = None,
        tokenizer: Any = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        super().__init__(
            keep=keep, streamer=streamer, tokenizer=tokenizer, stop_strings=stop_strings
        )

"""What a style costs: seconds to count a million tokens, and its share of a decoding step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

__all__ = ["overhead", "seconds_per_million"]


def seconds_per_million(tokenizer: Any, texts: Sequence[str]) -> float:
    """Seconds to train a style on the texts, for each million of their tokens."""
    from pertoken.decode import NGramStyle

    began = time.perf_counter()
    style = NGramStyle.train(texts, tokenizer)
    return (time.perf_counter() - began) * 1e6 / style.corpus.tokens


def overhead(model: Any, tokenizer: Any, style: Any, text: str, steps: int) -> list[float]:
    """The processor's time over that of the model's step, for each step of reading a text.

    Both are timed within a step, so that what else the machine does hits both.
    """
    import torch

    ids = torch.tensor([tokenizer(text)["input_ids"][: steps + 2]], device=model.device)
    processor = style(strength=0.1)
    found = []
    with torch.no_grad():
        out = model(input_ids=ids[:, :2], use_cache=True)
        for step in range(2, ids.shape[1]):
            began = time.perf_counter()
            new = ids[:, step : step + 1]
            out = model(input_ids=new, past_key_values=out.past_key_values, use_cache=True)
            between = time.perf_counter()
            processor(ids[:, : step + 1], out.logits[:, -1].float())
            found.append((time.perf_counter() - between) / (between - began))
    return found


def median_overhead(model: Any, tokenizer: Any, style: Any, text: str, steps: int) -> float:
    """The median of `overhead`."""
    return statistics.median(overhead(model, tokenizer, style, text, steps))

"""Tokens per second of every mode of KV-Direct beside the full cache, in turns on one machine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from pertoken.reproduce._cache_conversation import converse, questions
from pertoken.reproduce._cache_units import CHECKPOINTS, REMATERIALIZE, Models
from pertoken.reproduce._report import Row
from pertoken.reproduce._speculation import speed_row

TURNS, NEW_TOKENS, ROUNDS = 3, 6, 3
BUDGET = 32  # of about 75 to 110 tokens at the end
PAPER = "per operation, not per token: recomputing 0.17 to 0.3 of the time of reading at 500 tokens"


def speed_rows(models: Models, name: str) -> tuple[list[Row], dict[str, Any]]:
    """One row per mode, and what is to be said of the machine's quiet."""
    from pertoken.cache import make_cache
    from pertoken.cache.kv_direct import KVDirectCache
    from pertoken.timing import alternate

    model, tokenizer = models.get(name)
    smoke = models.context.smoke
    turns = questions(tokenizer, 2 if smoke else TURNS, letters=12 if smoke else None)
    new_tokens = 2 if smoke else NEW_TOKENS

    def timed(make: Callable[[], Any]) -> Callable[[int], int]:
        def once(_: int) -> int:
            cache = make()
            found = converse(model, cache, turns, new_tokens)
            if hasattr(cache, "close"):
                cache.close()
            return sum(map(len, found.answers))

        return once

    def direct(checkpoint: Any, again: Any) -> Callable[[], Any]:
        return lambda: KVDirectCache(model, BUDGET, checkpoint=checkpoint, rematerialize=again)

    contenders = {"full": timed(lambda: make_cache("full", model, BUDGET))}
    for checkpoint in CHECKPOINTS:
        for again in REMATERIALIZE:
            contenders[f"{checkpoint}/{again}"] = timed(direct(checkpoint, again))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        contenders["full"](0)  # warm up
        contenders["tokens/turn"](0)
        run = alternate(contenders, 1 if smoke else ROUNDS, watch=0.0 if smoke else 0.5)
    full = run.seconds("full")
    tokens = sum(run.values("full"))
    rows = [
        Row(
            f"tokens/s, {name}: full cache",
            tokens / sum(full) if full else float("nan"),
            "tokens/s",
            why="questions read and answers written, of the whole conversation",
        )
    ]
    rows += [
        speed_row(
            f"speed over the full cache, {name}: {mode}",
            run.seconds(mode),
            full,
            models.context.seed,
            paper_setting=PAPER,
        )
        for mode in contenders
        if mode != "full"
    ]
    return rows, run.noise()

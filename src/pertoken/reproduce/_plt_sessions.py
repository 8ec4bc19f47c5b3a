"""Chat sessions that share a system prompt, in one trie: what is held, and what comes back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Row
from pertoken.reproduce._spec_bench import select

SESSIONS, BLOCK, LONGEST = 12, 16, 192
SYSTEM = (
    "You are a careful assistant. Answer in plain words, say what you do not know, and keep to the "
    "question that was asked. Where a number is asked for, give it first and the way to it after."
)

BARS = {
    "sessions: dedup ratio over the hand count": "== 1",
    "sessions: not read back bit for bit": "== 0",
    "sessions: bytes held after all are released": "== 0",
}


def session_rows(context: Context, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows on sessions of report prompts behind one system prompt."""
    model, tokenizer = context.load()
    prompts = select(rows, split="report")
    wanted = 2 if context.smoke else SESSIONS
    prompts = [prompts[i * len(prompts) // wanted] for i in range(wanted)]
    system = SYSTEM[:40] if context.smoke else SYSTEM
    texts = [
        list(tokenizer(f"{system}\n\n{prompt.text}")["input_ids"])[:LONGEST] for prompt in prompts
    ]
    found = context.remember(["sessions"], partial(_sessions, model, texts))
    by_hand = sum(map(len, texts)) / blocks_by_hand(texts, BLOCK)
    return [
        Row("sessions: dedup ratio over the hand count", found["ratio"] / by_hand, "x"),
        Row(
            "sessions: dedup ratio",
            found["ratio"],
            "x",
            baseline=round(by_hand, 6),
            why=f"{len(texts)} prompts of up to {LONGEST} tokens behind one system prompt",
        ),
        Row("sessions: not read back bit for bit", found["wrong"], "sessions"),
        Row("sessions: bytes held after all are released", found["left"], "bytes"),
        Row(
            "sessions: seconds to fill all caches behind what is stored",
            found["shared seconds"],
            "s",
            baseline=round(found["fresh seconds"], 3),
            why="baseline: each from nothing",
        ),
    ]


def blocks_by_hand(texts: Sequence[Sequence[int]], block: int) -> int:
    """Rows that blocks hold where each is held once: a block is known by all tokens up to its end.

    >>> blocks_by_hand([[1, 2, 3], [1, 2, 4, 5]], 2)  # 1 2, then 3, then 4 5
    5
    """
    held = {}
    for text in texts:
        for start in range(0, len(text), block):
            end = min(start + block, len(text))
            held[(start, tuple(text[:end]))] = end - start
    return sum(held.values())


def _sessions(model: Any, texts: list[list[int]]) -> dict[str, float]:
    import torch

    from pertoken.cache._predictive import cached_rows
    from pertoken.cache.prefix_trie import PrefixTrie

    trie = PrefixTrie(model, block=BLOCK)
    put: dict[int, Any] = {}
    fresh = shared = 0.0
    for text in texts:
        ids = torch.tensor([text], device=model.device)
        began = time.perf_counter()
        cached_rows(model, ids)
        fresh += time.perf_counter() - began
        began = time.perf_counter()
        cache, length = trie.lookup(text[:-1])
        with torch.no_grad():
            model(input_ids=ids[:, length:], past_key_values=cache, use_cache=True)
        shared += time.perf_counter() - began
        put[trie.add(text, cache)] = cache
    wrong = sum(not _equal(trie.read(session), cache) for session, cache in put.items())
    ratio = trie.stats().dedup_ratio
    for session in put:
        trie.release(session)
    left = trie.stats().bytes_held
    return {
        "ratio": ratio,
        "wrong": wrong,
        "left": left,
        "fresh seconds": fresh,
        "shared seconds": shared,
    }


def _equal(found: Any, put: Any) -> bool:
    import torch

    return all(
        torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        for a, b in zip(found.layers, put.layers, strict=True)
    )

"""Reproduction of Token Recycling (arXiv 2408.08696) on SmolLM2-135M-Instruct and Spec-Bench.

The published method as it is (80 nodes, matrix of zeros, nothing from the prompt), cold and hot;
what harvesting the prompt adds; against other training-free drafters; wall clock.
The matrix of the hot runs lives through all prompts, in their order, as in the published runs.
"""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row
from pertoken.reproduce._spec_bench import encode, select
from pertoken.reproduce._speculation import (
    SMOKE_ROWS,
    Make,
    Unit,
    accepted,
    decode,
    fair_share,
    ratio_row,
    speed_row,
    stop_ids,
)

VERSION = 1
DTYPE = "float32"  # processors without bfloat16 kernels verify trees in it at a crawl
NEW_TOKENS = 128
PER_GROUP = 2

BARS = {
    "ids identical or numerical tie": ">= 1",
    "storage at a vocabulary of 32,000, 8-byte ids": "<= 2",
    "accepted: hot start over cold start": ">= 1",
    "accepted: hot start over prompt lookup": ">= 1",
    "accepted: hot start over lookahead": ">= 1",
    "wall clock: hot start, 80 nodes, over plain": ">= 1.3",
    "wall clock: hot start, auto budget, over plain": ">= 1",
}
REASONS = {
    "wall clock: hot start, 80 nodes, over plain": (
        "two tokens come out of a pass over 80, and such a pass costs about three and a half "
        "passes over one on this processor (this row and 'accepted per forward: hot'); the auto "
        "budget drafts nothing"
    ),
}


def run(context: Context) -> Reproduction:
    """All rows; about half an hour on two slow cores."""
    from pertoken.decode import Lookahead, Plain, PromptLookup, TokenRecycling
    from pertoken.timing import alternate

    new_tokens = 12 if context.smoke else NEW_TOKENS
    model, tokenizer = context.load()
    rows = context.data("spec-bench", smoke_rows=SMOKE_ROWS)
    chosen = select(rows, split="report", per_group=1 if context.smoke else PER_GROUP)
    prompts = {prompt.question_id: encode(tokenizer, prompt.text) for prompt in chosen}

    # The hot ones are one object for the whole run; the others start empty on every prompt.
    hot, hot_auto = TokenRecycling(keep=True), TokenRecycling(keep=True, budget="auto")
    contenders: dict[str, Make] = {
        "plain": Plain,
        "cold": TokenRecycling,
        "hot": lambda: hot,
        "harvest": lambda: TokenRecycling(harvest_prompt=True),
        "hot auto": lambda: hot_auto,
        "prompt lookup": PromptLookup,
        "lookahead": Lookahead,
    }
    for make in (Plain, PromptLookup, lambda: TokenRecycling(budget="auto")):
        decode(model, next(iter(prompts.values()))[:16], make, 8)  # warm up, measure the costs
    names = list(contenders)
    units: dict[int, dict[str, Any]] = {}
    kept = []
    for number, key in enumerate(context.track(list(prompts), "token recycling")):
        order = Random(context.seed + number).sample(names, len(names))
        turn = {
            name: partial(_run, model, prompts[key], contenders[name], new_tokens) for name in order
        }
        # No second try: the hot matrices have seen the prompt then.
        run = alternate(turn, 1, retries=0, watch=0.0 if context.smoke else 0.5)
        calls = (run.kept or run.dropped)[0].calls
        units[key] = {name: call.value for name, call in calls.items()}
        if run.kept:
            kept.append(key)

    def all_of(name: str) -> list[Unit]:
        return [unit[name] for unit in units.values()]

    def seconds(name: str) -> list[float]:
        return [units[key][name]["seconds"] for key in kept]

    judged: dict[Any, Any] = {}
    shares = [
        fair_share(
            model,
            prompts,
            {key: unit[name] for key, unit in units.items()},
            {key: unit["plain"] for key, unit in units.items()},
            new_tokens,
            stop_ids(model),
            judged,
        )
        for name in names
    ]
    notes = [
        f"{name} {note}" for name, share in zip(names, shares, strict=True) for note in share[1]
    ]
    speed = {"paper": 2.09, "paper_setting": "Vicuna-7B, Spec-Bench, GPU, fp16"}
    bytes_here = len(hot.matrix) * 8 * 4 if hot.matrix is not None else 0
    result = [
        Row(
            "ids identical or numerical tie",
            min(share for share, _ in shares),
            "share",
            why=f"{len(notes)} texts part at a numerical tie" if notes else "",
        ),
        Row(
            "storage at a vocabulary of 32,000, 8-byte ids",
            32_000 * 8 * 8 / 2**20,
            "MiB",
            paper="< 2 MB",
            paper_setting="vocabulary 32,000",
        ),
        Row("storage here, 4-byte ids", bytes_here / 2**20, "MiB"),
        ratio_row(
            "accepted: hot start over cold start", all_of("hot"), all_of("cold"), context.seed
        ),
        ratio_row(
            "accepted: hot start over prompt lookup",
            all_of("hot"),
            all_of("prompt lookup"),
            context.seed,
            paper="about +30 % over training-free methods",
            paper_setting="Vicuna, Spec-Bench, speed",
        ),
        ratio_row(
            "accepted: hot start over lookahead", all_of("hot"), all_of("lookahead"), context.seed
        ),
        ratio_row(
            "accepted: prompt harvested over cold start",
            all_of("harvest"),
            all_of("cold"),
            context.seed,
        ),
        speed_row(
            "wall clock: hot start, 80 nodes, over plain",
            seconds("hot"),
            seconds("plain"),
            context.seed,
            **speed,
        ),
        speed_row(
            "wall clock: hot start, auto budget, over plain",
            seconds("hot auto"),
            seconds("plain"),
            context.seed,
            **speed,
        ),
    ]
    result += [
        Row(f"accepted per forward: {name}", accepted(all_of(name)), "tokens") for name in names
    ]
    result += [Row(f"divergence: {note}", 1, "text") for note in notes[:20]]
    return context.reproduction(
        result,
        new_tokens=new_tokens,
        prompts=len(prompts),
        prompts_per_group=PER_GROUP,
        split="report: odd question ids, first turn, chat template",
        rounds_kept=len(kept),
        rounds_dropped=len(prompts) - len(kept),
    )


def _run(model: Any, ids: list[int], make: Make, new_tokens: int, _: int) -> Unit:
    return decode(model, ids, make, new_tokens)

"""Reproduction of KV-Direct (arXiv 2603.19664) on SmolLM2-135M-Instruct and Gemma-3-270M.

A conversation of 20 turns with the full cache, with KV-Direct in each of its modes at each budget,
and with five eviction methods at the same budgets: do the tokens stay the same, and what is held?
Then the paper's evidence: keys and values from the residual stream, patching, rank, decoding
without a cache. Last, the speed of every mode on a shorter conversation.

Nothing is chosen by result, so there is no dev split. WikiText-2 is not at hand: the perplexity
with a window is of GSM8K text, and only its ratio to the full cache's is comparable. Latency per
operation on an accelerator is not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pertoken.reproduce._cache_conversation import TURNS, parting
from pertoken.reproduce._cache_rows import (
    bfloat16_rows,
    bound_metric,
    bytes_metric,
    equal_metric,
    evicting_rows,
    evidence_rows,
    exact_rows,
    turn_rows,
    window_rows,
)
from pertoken.reproduce._cache_speed import BUDGET, speed_rows
from pertoken.reproduce._cache_units import (
    CHECKPOINTS,
    PERCENT,
    REMATERIALIZE,
    SECOND,
    Models,
    Unit,
    cache_free,
    divergence,
    evicting_units,
    evidence_units,
    exact_units,
    reference,
    tiny_units,
    window_units,
)
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row

VERSION = 1
DTYPE = "float32"
MODELS = ("smollm2", SECOND)
SHOWN_PERCENT = 25

BARS = {
    "tiny models of all architectures, float64: configurations with the full cache's tokens": (
        ">= 1"
    ),
    **{
        equal_metric(name, f"{checkpoint}/{again}"): ">= 1"
        for name in MODELS
        for checkpoint in CHECKPOINTS
        for again in REMATERIALIZE
    },
    **{bound_metric(name): "<= 1" for name in MODELS},
    **{
        bytes_metric(name, f"{checkpoint}/step", SHOWN_PERCENT): "<= 0.4077"  # 42/103
        for name in MODELS
        for checkpoint in ("tokens", "residual")
    },
    **{f"keys and values from the stream, {name}: greatest error": "<= 0" for name in MODELS},
    **{
        f"whole-sequence patching, {name}, float64: greatest KL to the donor": "< 1e-12"
        for name in MODELS
    },
    **{f"without a cache, {name}: equal tokens": ">= 30" for name in MODELS},
}
REASONS = {
    bytes_metric(SECOND, "residual/step", SHOWN_PERCENT): (
        "this model keeps little per token, one key head in 18 layers: 36,864 bytes. Behind the "
        "25 % an evicted token costs its residual row and its block input, 2,560 bytes each, and "
        "keys and values in one layer, 2,048, together a fifth of that; the newest turn is not "
        "evicted yet. The ids alone stay below the bar (row of tokens/step)"
    ),
}
_EASY_CONVERSATION = (
    "on this model only the smallest budget tells: at the others the five eviction methods write "
    "the same tokens too (their rows), and at the largest nothing is evicted; one conversation of "
    "short answers"
)
_LIMIT = "the cache's own limit: only a mistake could break it"
_SAME = "the same layer run again on the same input"
_SHARE = "the ratio follows from the budget: at half the length it is above the bar (its row)"
CAVEATS: dict[str, str] = {
    **dict.fromkeys(
        (bar for bar in BARS if bar.startswith("tokens equal to the full cache's, smollm2")),
        _EASY_CONVERSATION,
    ),
    **dict.fromkeys((bar for bar in BARS if bar.startswith("keys and values held")), _LIMIT),
    **dict.fromkeys(
        (bar for bar in BARS if bar.startswith("keys and values from the stream")), _SAME
    ),
    **dict.fromkeys((bar for bar in BARS if bar.startswith("peak bytes")), _SHARE),
}


def run(context: Context) -> Reproduction:
    """All rows; about an hour on two slow cores with two jobs, most of it in "step" modes."""
    models = Models(context)
    percents = (SHOWN_PERCENT,) if context.smoke else PERCENT
    rows = context.data(
        "gsm8k", smoke_rows=[{"question": "Two and two?", "answer": "2 + 2 = 4\n#### 4"}]
    )
    # First, since budgets are shares of their lengths; helpers find them in the checkpoint.
    full: dict[str, Unit] = {}
    for name in models.names:
        for dtype in ("float32", "bfloat16"):
            key = name if dtype == "float32" else f"{name}, {dtype}"
            full[key] = context.remember(["full", key], partial(reference, models, name, dtype))
    groups = {
        "exact": exact_units(models, full, percents),
        "evicting": evicting_units(models, full, percents),
        "evidence": evidence_units(models),
        "window": window_units(models, rows),
        "tiny": tiny_units(context.smoke),
    }
    done = context.remember_all(
        {(group, *key): unit for group, units in groups.items() for key, unit in units.items()},
        "conversations",
    )
    found: dict[str, dict[tuple[Any, ...], Unit]] = {group: {} for group in groups}
    for place, unit in done.items():
        found[place[0]][place[1:]] = unit
    partings = _partings(context, models, full, found["exact"])
    result = [_tiny_row(found["tiny"])]
    noise: dict[str, Any] = {}
    for name in models.names:
        free = context.remember(["without a cache", name], partial(cache_free, models, name))
        result += exact_rows(name, full[name], found["exact"], percents, partings)
        result += turn_rows(name, full[name], found["exact"], SHOWN_PERCENT)
        result += bfloat16_rows(name, full[f"{name}, bfloat16"], found["exact"], partings)
        result += evicting_rows(name, found["evicting"], percents)
        result += evidence_rows(name, found["evidence"], free)
        timed, noise[name] = speed_rows(models, name)
        result += timed
    result += window_rows(list(found["window"].values()))
    return context.reproduction(
        [*result, *_left_out(models.left_out)],
        models=models.names,
        left_out=models.left_out,
        turns=TURNS,
        new_tokens={name: models.new_tokens(name) for name in models.names},
        tokens_at_the_end={name: unit["tokens"][-1] for name, unit in full.items()},
        budgets_percent=list(percents),
        budget_timed=BUDGET,
        conversation="the 20 questions of pertoken.samples, answers greedy, one cache throughout",
        timing=noise,
    )


def _partings(
    context: Context,
    models: Models,
    full: Mapping[str, Unit],
    found: Mapping[tuple[Any, ...], Unit],
) -> dict[tuple[Any, ...], Unit]:
    """Where conversations left the full cache's, by configuration, and why."""
    partings = {}
    for key, unit in found.items():
        name, dtype = key[:2]
        right = full[name if dtype == "float32" else f"{name}, {dtype}"]
        if parting(right["answers"], unit["answers"]) is not None:
            partings[key] = context.remember(
                ["divergence", *key], partial(divergence, models, name, dtype, right, unit)
            )
    return partings


def _tiny_row(found: Mapping[Any, Unit]) -> Row:
    count = sum(unit["configurations"] for unit in found.values())
    wrong = sum(unit["wrong"] for unit in found.values())
    return Row(
        "tiny models of all architectures, float64: configurations with the full cache's tokens",
        1 - wrong / count,
        "share",
        why=f"{count} conversations of three turns on {len(found)} architectures",
    )


def _left_out(reasons: Mapping[str, str]) -> list[Row]:
    """A row without a figure for every bar on a model that is not there."""
    return [
        Row(metric, float("nan"), why=f"left out: {reason}")
        for name, reason in reasons.items()
        for metric in BARS
        if f", {name}" in metric
    ]

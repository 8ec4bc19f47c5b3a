"""The rows of KV-Direct's reproduction, from its units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pertoken.probe._stream import spread_out
from pertoken.reproduce._cache_conversation import token_match
from pertoken.reproduce._cache_units import (
    BFLOAT16_PERCENT,
    CHECKPOINTS,
    EVICTING,
    REMATERIALIZE,
    TEXTS,
    WINDOWS,
    Unit,
)
from pertoken.reproduce._report import Row

MIB = 2**20
SHOWN_TURNS = (5, 10, 15, 20)
Found = Mapping[tuple[Any, ...], Unit]


def equal_metric(name: str, mode: str) -> str:
    """The metric of the bar on equal tokens."""
    return f"tokens equal to the full cache's, {name}, {mode}: least of all budgets"


def bytes_metric(name: str, mode: str, percent: int) -> str:
    """The metric of a configuration's bytes."""
    return f"peak bytes over the full cache's at the end, {name}, {mode}, {percent} %"


def bound_metric(name: str) -> str:
    """The metric of the bar on what is held whatever the length."""
    return f"keys and values held over the budget's, {name}, step: greatest of all turns"


def exact_rows(
    name: str,
    full: Unit,
    found: Found,
    percents: Sequence[int],
    partings: Mapping[tuple[Any, ...], Unit],
) -> list[Row]:
    """Equal tokens, bytes at the end and through the turns, in float32.

    found, partings: by (name, dtype, checkpoint, rematerialize, percent).
    """
    rows, bytes_rows, held = [], [], []
    per_token = full["kv_bytes"][0] / full["tokens"][0]  # in the first turn no window is full
    for checkpoint in CHECKPOINTS:
        for again in REMATERIALIZE:
            mode = f"{checkpoint}/{again}"
            shares, notes = [], []
            for percent in percents:
                key = (name, "float32", checkpoint, again, percent)
                unit = found[key]
                shares.append(token_match(full["answers"], unit["answers"]))
                if key in partings:
                    notes.append(f"{percent} %: {_parting(partings[key])}")
                bytes_rows.append(_bytes_row(name, mode, percent, full, unit, shares[-1]))
                if again == "step":
                    held.append(max(unit["kv_bytes"]) / (unit["budget"] * per_token))
            rows.append(
                Row(
                    equal_metric(name, mode),
                    min(shares),
                    "share",
                    paper="100 %",
                    paper_setting="Qwen2.5, 512 tokens, 50 new",
                    why="; ".join(notes),
                )
            )
    rows.append(
        Row(
            bound_metric(name),
            max(held),
            "x",
            why="behind every forward, all checkpoints and budgets; peaks within a forward, and "
            "what is kept of evicted tokens, are in the rows of peak bytes",
        )
    )
    return [*rows, *bytes_rows]


def _bytes_row(name: str, mode: str, percent: int, full: Unit, unit: Unit, share: float) -> Row:
    return Row(
        bytes_metric(name, mode, percent),
        unit["peak_bytes"][-1] / full["peak_bytes"][-1],
        "x",
        paper="42/103 = 0.408",
        paper_setting="Gemma-3-4B, 20 turns",
        baseline=f"{full['peak_bytes'][-1] / MIB:.1f} MiB",
        why=f"{unit['peak_bytes'][-1] / MIB:.2f} MiB, of which keys and values "
        f"{unit['kv_bytes'][-1] / MIB:.2f}; budget {unit['budget']} tokens; "
        f"{100 * share:.4g} % of the tokens equal",
    )


def turn_rows(name: str, full: Unit, found: Found, percent: int) -> list[Row]:
    """Peak bytes through the turns, and by how much the process grew."""
    modes = [(checkpoint, "step") for checkpoint in CHECKPOINTS] + [("tokens", "turn")]
    rows = []
    for turn in SHOWN_TURNS:
        place = min(turn, len(full["tokens"])) - 1
        for checkpoint, again in modes:
            unit = found[name, "float32", checkpoint, again, percent]
            rows.append(
                Row(
                    f"peak at turn {turn}, {name}, {checkpoint}/{again}, {percent} %",
                    unit["peak_bytes"][place] / MIB,
                    "MiB",
                    baseline=full["peak_bytes"][place] / MIB,
                    why=f"{unit['tokens'][place]} tokens",
                )
            )
    for checkpoint, again in modes:
        unit = found[name, "float32", checkpoint, again, percent]
        rows.append(
            Row(
                f"peak grows per token, {name}, {checkpoint}/{again}, {percent} %",
                _growth(unit),
                "bytes",
                baseline=_growth(full),
                why="over the second half of the turns",
            )
        )
    unit = found[name, "float32", "tokens", "step", percent]
    note = "most the process had grown by since its first token; the allocator's rounding included"
    rows.append(
        Row(
            f"process grown, {name}, tokens/step, {percent} %",
            unit["rss_growth"] / MIB,
            "MiB",
            baseline=full["rss_growth"] / MIB,
            why=note,
        )
    )
    return rows


def _growth(unit: Unit) -> float:
    """Bytes per token between the peaks so far of the middle turn and of the last."""
    middle = len(unit["tokens"]) // 2
    more = max(unit["peak_bytes"]) - max(unit["peak_bytes"][:middle])
    return float(more / (unit["tokens"][-1] - unit["tokens"][middle - 1]))


def bfloat16_rows(
    name: str, full: Unit, found: Found, partings: Mapping[tuple[Any, ...], Unit]
) -> list[Row]:
    """Equal tokens in bfloat16, with the gap where the texts part."""
    rows = []
    for checkpoint in CHECKPOINTS:
        key = (name, "bfloat16", checkpoint, "turn", BFLOAT16_PERCENT)
        rows.append(
            Row(
                f"tokens equal in bfloat16, {name}, {checkpoint}/turn, {BFLOAT16_PERCENT} %",
                token_match(full["answers"], found[key]["answers"]),
                "share",
                why=f"{len(full['answers'])} turns"
                + (f"; {_parting(partings[key])}" if key in partings else ""),
            )
        )
    return rows


def evicting_rows(name: str, found: Found, percents: Sequence[int]) -> list[Row]:
    """Match, KL and top-1 of the eviction methods."""
    return [
        Row(
            f"tokens equal to the full cache's, {name}, {method}, {percent} %",
            _number(found[name, method, percent]["match"]),
            "share",
            paper="4-28 %, KL 7-14",
            paper_setting="Qwen2.5, 512 tokens, 50 new; budgets 32 to 384",
            baseline="1 (kv-direct)",
            why=f"fed the full cache's tokens: KL {_number(found[name, method, percent]['kl']):.3g}"
            f" nats, same best token {100 * _number(found[name, method, percent]['top1']):.1f} %",
        )
        for method in EVICTING
        for percent in percents
    ]


def window_rows(found: Sequence[Unit]) -> list[Row]:
    """Perplexity with a window over that of the full cache."""
    tokens = sum(unit["tokens"] for unit in found)
    full = math.exp(sum(unit["full"] for unit in found) / tokens)
    paper = {128: 38.2, 64: 65.3, 32: 135.4}
    rows = []
    for window in WINDOWS:
        own = math.exp(sum(unit[str(window)] for unit in found) / tokens)
        rows.append(
            Row(
                f"perplexity with a window of {window} over the full cache's",
                own / full,
                "x",
                paper=round(paper[window] / 26.46, 2),
                paper_setting=f"{paper[window]} over 26.46, SmolLM2-135M, WikiText-2",
                baseline=full,
                why=f"{own:.4g} on {TEXTS} texts of GSM8K, {tokens} tokens",
            )
        )
    return rows


def evidence_rows(name: str, found: Found, free: Unit) -> list[Row]:
    """Reconstruction, patching, rank, decoding without a cache."""
    made = [unit for key, unit in found.items() if key[:2] == ("reconstruction", name)]
    whole = found["patching", name]["all"]
    return [
        Row(
            f"keys and values from the stream, {name}: greatest error",
            max(_number(unit["greatest"]) for unit in made),
            paper="0; above 0 in Gemma-3's sliding layers",
            paper_setting="six models",
            why=f"float32 and bfloat16, 16 to 560 tokens, {made[0]['layers']} layers of which "
            f"{made[0]['sliding']} sliding: {sum(unit['exact'] for unit in made)} of "
            f"{sum(unit['compared'] for unit in made)} bit for bit",
        ),
        Row(
            f"whole-sequence patching, {name}, float64: greatest KL to the donor",
            max(map(abs, whole["to_donor"])),
            "nats",
            paper=0,
            paper_setting="SmolLM2-135M, 30 layers",
            baseline=whole["apart"],
            why="0 by construction where blocks read nothing but the stream; baseline: unpatched",
        ),
        Row(
            f"without a cache, {name}: equal tokens",
            free["equal"],
            f"of {free['of']}",
            paper="30 of 30",
            paper_setting="six models",
            why="" if free["equal"] == free["of"] else free["note"],
        ),
        Row(
            f"without a cache, {name}: seconds over those with one",
            free["slower"],
            "x",
            paper=1.7,
            paper_setting="SmolLM2-135M; 1.7 to 3.8 in all",
        ),
        *_patching_rows(name, found["patching", name]),
        *_rank_rows(name, found["rank", name]),
    ]


def _patching_rows(name: str, found: Unit) -> list[Row]:
    """Parts of the sequence, layer by layer."""
    rows: list[Row] = []
    for positions, what in (("last", "last position"), ("0.5", "last half")):
        part = found[positions]
        rows += [
            Row(
                f"patching the {what}, {name}, input of block {layer}: KL to the donor",
                part["to_donor"][layer],
                "nats",
                baseline=part["apart"],
                why=f"{part['to_recipient'][layer]:.3g} to the recipient",
            )
            for layer in spread_out(len(part["to_donor"]), 6)
        ]
    return rows


def _rank_rows(name: str, rank: Unit) -> list[Row]:
    return [
        Row(
            f"r*(0.9) of the query-key products, {name}: {form}",
            rank[figure],
            f"of {rank['head_dim']}",
            paper=21.2,
            paper_setting="SmolLM2-135M, mean, of 64; 27-33 % over the models",
            why=why,
        )
        for form, figure, why in (
            (
                "scores' form",
                "mean",
                f"over all heads; {rank['least']} to {rank['greatest']}",
            ),
            (
                "as printed",
                "printed",
                "the stored weights' W_q W_k^T, contracted over the stream",
            ),
        )
    ]


def _parting(unit: Unit) -> str:
    return f"turn {unit['turn']}, {unit['outcome']}, {unit['text']}"


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)

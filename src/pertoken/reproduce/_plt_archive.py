"""Conversations on disk: round trips, damage, other settings, bits per token, seconds and bytes."""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Row

TRIPS, DAMAGES, UNIT = 1000, 2000, 100
LEVELS = ("raw", "int8", "tokens")
THREADS = (1, 2, 4)
SHORT = 48  # tokens of the text that is written and read under other settings

BARS = {
    f"round trips of {TRIPS:,}: not exact": "== 0",
    f"byte flips and truncations of {DAMAGES:,}: neither named nor harmless": "== 0",
    "other thread counts and batch sizes: neither exact nor refused": "== 0",
    "tokens level: bits per token, distance from the cross-entropy": "<= 1",
}


def trip_rows(context: Context) -> list[Row]:
    """Round trips and damage, on a tiny model with as many layers as the laws need: two."""
    unit = 1 if context.smoke else UNIT
    trips, damages = (1, 6) if context.smoke else (TRIPS, DAMAGES)
    wrong = 0
    for start in context.track(range(0, trips, unit), "round trips"):
        wrong += context.remember(["trips", start], partial(_trips, context.seed, start, unit))
    outcomes: Counter[str] = Counter()
    for start in context.track(range(0, damages, unit), "damage"):
        found = context.remember(["damage", start], partial(_damage, context.seed, start, unit))
        outcomes.update(found)
    return [
        Row(
            f"round trips of {TRIPS:,}: not exact",
            wrong,
            "conversations",
            paper="lossless",
            paper_setting="in theory",
            why="a random two-layer model; ids of every level, keys and values of raw and tokens",
        ),
        Row(
            f"byte flips and truncations of {DAMAGES:,}: neither named nor harmless",
            outcomes["wrong"],
            "files",
            why=(
                f"{outcomes['named']} refused by name, {outcomes['mended']} named and mended by a "
                f"prefill, {outcomes['harmless']} harmless"
            ),
        ),
    ]


def settings_row(context: Context, text: Sequence[int]) -> Row:
    """Files written with one thread count or from a batch and read with another thread count."""
    short = list(text[: 8 if context.smoke else SHORT])
    outcomes: Counter[str] = Counter()
    model = context.load()[0]
    for level in context.track(LEVELS, "other settings"):
        found = context.remember(["settings", level], partial(_settings, model, short, level))
        outcomes.update(found)
    return Row(
        "other thread counts and batch sizes: neither exact nor refused",
        outcomes["wrong"],
        "files",
        why=f"{outcomes['exact']} exact, {outcomes['refused']} refused by name",
    )


def level_rows(
    context: Context, texts: Mapping[str, Sequence[int]]
) -> tuple[list[Row], float, float]:
    """Bits, bytes and seconds of each level; bits per token, seconds to restore 1,000 of them."""
    model = context.load()[0]
    units = [
        context.remember(["levels", name], partial(_levels, model, list(texts[name])))
        for name in context.track(list(texts), "levels")
    ]
    total = {key: sum(unit[key] for unit in units) for key in units[0]}
    tokens = total["tokens"]
    bits, entropy = total["coded bits"] / tokens, total["cross-entropy"] / tokens
    rows = [
        Row(
            "tokens level: bits per token, distance from the cross-entropy",
            100 * abs(bits / entropy - 1),
            "%",
            why="coded bits without the header, against one plain forward; first token log2 |V|",
        ),
        Row(
            "tokens level: bits per token",
            bits,
            "bits",
            paper="3.3 to 4.3",
            paper_setting="perplexity 10 to 20, in theory",
            baseline=round(entropy, 4),
        ),
        Row(
            "tokens level: header and checks per file",
            total["header bits"] / len(units) / 8,
            "bytes",
        ),
    ]
    for level in LEVELS:
        rows += [
            Row(
                f"bytes per token on disk: {level}",
                total[f"bytes, {level}"] / tokens,
                "bytes",
                baseline=round(total["cache bytes"] / tokens, 1),
                why="baseline: the cache in memory, in the model's dtype",
            ),
            Row(
                f"seconds to save 1,000 tokens: {level}",
                1000 * total[f"save, {level}"] / tokens,
                "s",
            ),
            Row(
                f"seconds to restore 1,000 tokens: {level}",
                1000 * total[f"restore, {level}"] / tokens,
                "s",
                paper=0 if level == "tokens" else None,
                paper_setting="recompute counted as free" if level == "tokens" else "",
                baseline=round(1000 * total["prefill"] / tokens, 2),
                why="baseline: a fresh prefill in the same chunks",
            ),
        ]
    return rows, bits, 1000 * total["restore, tokens"] / tokens


def _trips(seed: int, start: int, count: int) -> int:
    """How many of the conversations numbered from `start` come back other than they were."""
    from pertoken.cache.archive import prefill, restore_cache, save_cache

    model, wrong = _tiny(), 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(start, start + count):
            draw = Random(f"{seed} trip {number}")
            ids = [draw.randrange(1, 64) for _ in range(draw.randint(2, 24))]
            cache, exact = prefill(model, ids[:-1], chunk=8), True
            for level in LEVELS:
                path = Path(folder) / f"{level}.ptkv"
                save_cache(path, model, ids, level=level, chunk=8)
                found = restore_cache(path, model)
                exact &= found.input_ids[0].tolist() == ids
                exact &= level == "int8" or _near(found.cache, cache)
            wrong += not exact
    return wrong


def _damage(seed: int, start: int, count: int) -> dict[str, int]:
    """Outcomes of damaged files: refused by name, mended with the damage named, harmless, wrong."""
    from pertoken.cache.archive import restore_cache, save_cache
    from pertoken.errors import PertokenError

    model, outcomes = _tiny(), Counter(named=0, mended=0, harmless=0, wrong=0)
    draw = Random(f"{seed} text")
    ids = [draw.randrange(1, 64) for _ in range(24)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.ptkv"
        files, true = {}, {}
        for level in LEVELS:
            save_cache(path, model, ids, level=level, chunk=8)
            files[level] = path.read_bytes()
            true[level] = restore_cache(path, model).cache
        for number in range(start, start + count):
            draw = Random(f"{seed} damage {number}")
            level = LEVELS[number % 3]
            path.write_bytes(_damaged(files[level], draw, cut=number % 4 == 3))
            try:
                found = restore_cache(path, model)
            except PertokenError:
                outcomes["named"] += 1
                continue
            except Exception:
                outcomes["wrong"] += 1
                continue
            # Behind rows in 8 bits the model computes what is missing, so that it is near only.
            within = 0.03 if level == "int8" and found.damage else 0.0
            right = found.input_ids[0].tolist() == ids and _near(found.cache, true[level], within)
            outcomes[("mended" if found.damage else "harmless") if right else "wrong"] += 1
    return dict(outcomes)


def _damaged(data: bytes, draw: Random, cut: bool) -> bytes:
    """The file cut short, or with one byte changed."""
    place = draw.randrange(len(data))
    if cut:
        return data[:place]
    changed = bytearray(data)
    changed[place] ^= draw.randrange(1, 256)
    return bytes(changed)


def _settings(model: Any, ids: list[int], level: str) -> dict[str, int]:
    """Outcomes over thread counts of writer and reader, and for a cache out of a batch."""
    import torch

    from pertoken.cache.archive import prefill, save_cache

    outcomes: Counter[str] = Counter(exact=0, refused=0, wrong=0)
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "other.ptkv"
        try:
            for writer in THREADS[:2]:
                torch.set_num_threads(writer)
                cache = prefill(model, ids[:-1])
                save_cache(path, model, ids, level=level)
                for reader in THREADS:
                    torch.set_num_threads(reader)
                    outcomes[_read(model, path, ids, level, cache)] += 1
        finally:
            torch.set_num_threads(before)
        for rows in (2, 3):
            cache = _row_of_a_batch(model, ids[:-1], rows)
            save_cache(path, model, ids, cache=cache, level=level)
            kept = cache if level != "tokens" else prefill(model, ids[:-1])
            outcomes[_read(model, path, ids, level, kept)] += 1
    return dict(outcomes)


def _read(model: Any, path: Path, ids: list[int], level: str, cache: Any) -> str:
    """ "exact", "refused" or "wrong"; int8 is exact in its ids, and near in its rows."""
    from pertoken.cache.archive import restore_cache
    from pertoken.errors import PertokenError

    try:
        found = restore_cache(path, model)
    except PertokenError:
        return "refused"
    near = _near(found.cache, cache, within=0.02 if level == "int8" else 0.0)
    return "exact" if found.input_ids[0].tolist() == ids and near else "wrong"


def _row_of_a_batch(model: Any, ids: list[int], rows: int) -> Any:
    """The cache of a text that was prefilled beside others."""
    import torch

    from pertoken.cache._predictive import cached_rows
    from pertoken.cache._rows import plain_cache

    batch = torch.tensor([ids, *([ids[::-1]] * (rows - 1))], device=model.device)
    return plain_cache([(k[:1].clone(), v[:1].clone()) for k, v in cached_rows(model, batch)])


def _levels(model: Any, ids: list[int]) -> dict[str, float]:
    """Bytes and seconds of every level for one text, its cross-entropy and a fresh prefill."""
    import torch

    from pertoken.cache.archive import prefill, restore_cache, save_cache

    chunk = 256
    prefill(model, ids[:8], chunk=chunk)  # warm up
    began = time.perf_counter()
    cache = prefill(model, ids[:-1], chunk=chunk)
    found: dict[str, float] = {"prefill": time.perf_counter() - began, "tokens": len(ids)}
    found["cache bytes"] = sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )
    with torch.no_grad():
        laws = model(torch.tensor([ids], device=model.device)).logits[0].double().log_softmax(-1)
    chosen = laws[:-1].gather(1, torch.tensor(ids[1:], device=model.device)[:, None])
    found["cross-entropy"] = math.log2(laws.shape[-1]) - float(chosen.sum()) / math.log(2)
    with tempfile.TemporaryDirectory() as folder:
        for level in LEVELS:
            path = Path(folder) / f"{level}.ptkv"
            began = time.perf_counter()
            saved = save_cache(
                path,
                model,
                ids,
                level=level,
                chunk=chunk,
                cache=None if level == "tokens" else cache,
            )
            found[f"save, {level}"] = time.perf_counter() - began
            began = time.perf_counter()
            restore_cache(path, model)
            found[f"restore, {level}"] = time.perf_counter() - began
            found[f"bytes, {level}"] = saved.bytes
            if level == "tokens":
                found["coded bits"] = saved.payload_bits
                found["header bits"] = 8 * saved.bytes - saved.payload_bits
    return found


def _near(cache: Any, true: Any, within: float = 0.0) -> bool:
    """Whether every number is that of the true cache, within a share of its layer's largest."""
    for layer, other in zip(cache.layers, true.layers, strict=True):
        for found, right in ((layer.keys, other.keys), (layer.values, other.values)):
            if found.shape != right.shape:
                return False
            if bool(((found - right).abs() > within * right.abs().max()).any()):
                return False
    return True


def _tiny() -> Any:
    import torch

    from pertoken.testing import tiny_model

    return tiny_model("llama", dtype=torch.float32)

"""Reproduction of Goose (arXiv 2604.02047) on SmolLM2-135M-Instruct and Spec-Bench.

Accepted tokens per forward against balanced trees over the same table and budget (the paper's
topology control), against the other training-free drafters, ablations, wall clock with the measured
budget, and proof of losslessness. Every drafter starts empty on every prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
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
    enumeration_error,
    fair_share,
    ratio_row,
    speed_row,
    stop_ids,
)
from pertoken.stats_text import LOOPING_SHARE, repeated_4gram_share

VERSION = 1
DTYPE = "float32"  # processors without bfloat16 kernels verify trees in it at a crawl
NEW_TOKENS = 128
PER_GROUP = 8  # spread evenly over the split's ids
PER_GROUP_TIMED = 4
PER_GROUP_ABLATIONS = 1
BFLOAT16 = {"prompts": 6, "new_tokens": 48, "nodes": 16}
COSTS = (2, 8, 16, 32, 64)  # tokens per pass whose measured cost is shown

BARS = {
    "ids identical or numerical tie, all drafters, float32": ">= 1",
    "ids identical or numerical tie, all drafters, bfloat16": ">= 1",
    "ids identical, float64, nine tiny models, batch 1 and 4": ">= 1",
    "batch of 8 unequal prompts = 8 single runs, token by token": ">= 1",
    "sampling: chi-square p, smallest of all drafters": "> 0.001",
    "sampling: one step by exact enumeration, greatest error": "<= 1e-9",
    "accepted: paper shape over balanced k=3": ">= 1.12",
    "accepted: paper shape over balanced k=5": ">= 1.12",
    "accepted: optimal shape over paper shape": ">= 1",
    "accepted: optimal shape over token recycling": ">= 1",
    "accepted: optimal shape over prompt lookup": ">= 1",
    "accepted: optimal shape over lookahead": ">= 1",
    "accepted: optimal shape over suffix": ">= 1",
    "wall clock: goose (auto budget) over plain, all": ">= 1.5",
    "wall clock: goose (auto budget) over plain, best group": ">= 2.5",
    "wall clock: goose (auto budget) over plain, worst group": ">= 0.97",
    "wall clock: our plain loop over transformers' generate": ">= 0.98",
    "wall clock: our prompt lookup over transformers'": ">= 1",
    "share of a step outside the model, goose (auto budget)": "<= 0.08",
}
REASONS: dict[str, str] = {}
KEPT = "goose auto, kept"  # one object for all prompts, in their order


def _drafters() -> dict[str, Make]:
    from pertoken.decode import (
        Balanced,
        Goose,
        Lookahead,
        PromptLookup,
        SuffixTree,
        TokenRecycling,
    )

    return {
        "optimal shape": lambda: Goose(shape="optimal"),
        "paper shape": lambda: Goose(shape="paper"),
        "balanced k=3": lambda: Balanced(3),
        "balanced k=5": lambda: Balanced(5),
        "token recycling": TokenRecycling,
        "prompt lookup": PromptLookup,
        "lookahead": Lookahead,
        "suffix": SuffixTree,
    }


def _ablations() -> dict[str, Make]:
    from pertoken.decode import Goose

    return {
        "without consensus": lambda: Goose(shape="paper", consensus=False),
        "without bigram": lambda: Goose(shape="paper", bigram=False),
        "without prompt harvest": lambda: Goose(shape="paper", harvest_prompt=False),
        "spine only": lambda: Goose(shape="paper", branches=False),
        "branches only": lambda: Goose(shape="paper", spine=False),
    }


def _timed() -> dict[str, Make]:
    from pertoken.decode import Goose, Plain, PromptLookup

    return {
        "plain": Plain,
        "goose auto": lambda: Goose(budget="auto"),
        "prompt lookup": PromptLookup,
        "hf": dict,
        "hf prompt lookup": lambda: {"prompt_lookup_num_tokens": 10},
    }


def run(context: Context) -> Reproduction:
    """All rows; about three hours on two cores; the counts alone mind no other load."""
    new_tokens = 12 if context.smoke else NEW_TOKENS
    model, tokenizer = context.load()
    rows = context.data("spec-bench", smoke_rows=SMOKE_ROWS)
    chosen = select(rows, split="report", per_group=1 if context.smoke else PER_GROUP)
    prompts = {prompt.question_id: encode(tokenizer, prompt.text) for prompt in chosen}
    groups = {prompt.question_id: prompt.group for prompt in chosen}

    counts = _counts(context, model, prompts, groups, new_tokens)
    result = _identity_rows(context, model, prompts, counts, new_tokens)
    result += _bfloat16_rows(context, prompts)
    result += _lossless_rows(context, new_tokens)
    timed_keys = _first(groups, PER_GROUP_TIMED)
    timed = _run_timed(context, model, prompts, timed_keys, new_tokens)
    result += _accepted_rows(context, counts)
    result += _speed_rows(context, timed, groups)
    result += _cost_rows(model)
    plain = counts["plain"]
    looping = [k for k in groups if repeated_4gram_share(plain[k]["ids"]) >= LOOPING_SHARE]
    return context.reproduction(
        result,
        new_tokens=new_tokens,
        prompts=len(groups),
        split="report: odd question ids, first turn, chat template",
        prompts_per_group=PER_GROUP,
        prompts_per_group_timed=PER_GROUP_TIMED,
        prompts_per_group_ablations=PER_GROUP_ABLATIONS,
        start="every drafter empty on every prompt",
        prefill="included in wall clock, not in tokens per forward",
        looping_outputs=len(looping),
        timing=_noise(timed),
    )


def _counts(
    context: Context,
    model: Any,
    prompts: Mapping[int, list[int]],
    groups: Mapping[int, str],
    new_tokens: int,
) -> dict[str, dict[int, Unit]]:
    """Every drafter on every prompt: what does not mind what else runs on the machine."""
    counts: dict[str, dict[int, Unit]] = {}
    for name, make in ({"plain": _timed()["plain"]} | _drafters() | _ablations()).items():
        wanted = PER_GROUP_ABLATIONS if name in _ablations() else PER_GROUP
        counts[name] = {
            key: context.remember(
                ["counts", name, key], partial(decode, model, prompts[key], make, new_tokens)
            )
            for key in context.track(_first(groups, wanted), name)
        }
    return counts


def _first(groups: Mapping[int, str], wanted: int) -> list[int]:
    """The first `wanted` prompts of every group."""
    seen: Counter[str] = Counter()
    chosen = []
    for key, group in groups.items():
        seen[group] += 1
        if seen[group] <= wanted:
            chosen.append(key)
    return chosen


def _run_timed(
    context: Context,
    model: Any,
    prompts: Mapping[int, list[int]],
    keys: list[int],
    new_tokens: int,
) -> dict[int, dict[str, Any]]:
    """For every prompt all contenders in turn, each once, in shuffled order.

    A round in which others used the machine is marked as dropped.
    """
    from pertoken.decode import Goose
    from pertoken.timing import alternate, bandwidth, bytes_per_token

    for make in _timed().values():  # warm up, and measure the costs
        decode(model, prompts[keys[0]][:16], make, 8)
    kept = Goose(budget="auto", keep=True)
    makes = _timed() | {KEPT: lambda: kept}

    def once(number: int) -> dict[str, Any]:
        names = list(makes)
        Random(context.seed + number).shuffle(names)  # nobody always follows the same one
        ids = prompts[keys[number]]
        contenders = {
            name: partial(_ignore_index, partial(decode, model, ids, makes[name], new_tokens))
            for name in names
        }
        # No second try: the drafter that keeps what it learned would know the prompt.
        run = alternate(contenders, 1, retries=0, watch=0.0 if context.smoke else 0.5)
        rounds = run.kept or run.dropped
        unit = {name: call.value for name, call in rounds[0].calls.items()}
        limit = bandwidth(0.05) / bytes_per_token(model)
        return unit | {"kept": bool(run.kept), "foreign": rounds[0].foreign, "limit": limit}

    return {
        key: context.remember(["timed", key], partial(once, number))
        for number, key in enumerate(context.track(keys, "wall clock"))
    }


def _with_budget(make: Make, budget: int) -> Any:
    drafter = make()
    if drafter.budget is None and drafter.slug != "lookahead":  # its window needs its size
        drafter.budget = budget
    return drafter


def _ignore_index(run: Callable[[], Unit], _: int) -> Unit:
    return run()


def _lossless_rows(context: Context, new_tokens: int) -> list[Row]:
    """Exactness on tiny random models, and float32 on the real one."""
    import torch

    from pertoken.testing import ARCHITECTURES, check_distribution, tiny_model

    names = ["llama", "gemma3"] if context.smoke else [*ARCHITECTURES, "qwen3-sliding"]
    setups: dict[str, Make] = _drafters() | {"optimal, auto": _timed()["goose auto"]}
    same = batches = total = 0
    for name in names:
        tiny = tiny_model(name)
        draw = torch.Generator().manual_seed(context.seed)
        lengths = [3, 20, 8, 5, 13, 9, 4, 16]
        texts = [torch.randint(1, 64, (n,), generator=draw) for n in lengths]
        ids = torch.stack([torch.nn.functional.pad(t, (20 - len(t), 0)) for t in texts])
        mask = torch.stack([torch.arange(20) >= 20 - len(t) for t in texts]).long()
        options: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False}
        straight = tiny.generate(ids, attention_mask=mask, **options)
        for make in setups.values():
            four = tiny.generate(
                ids[:4], attention_mask=mask[:4], custom_generate=make(), **options
            )
            eight = tiny.generate(ids, attention_mask=mask, custom_generate=make(), **options)
            single = [
                tiny.generate(
                    t[None],
                    attention_mask=torch.ones_like(t[None]),
                    custom_generate=make(),
                    **options,
                )[0, len(t) :]
                for t in texts
            ]
            total += 1
            same += bool(torch.equal(four, straight[:4])) and all(
                torch.equal(s, r[20:]) for s, r in zip(single, straight, strict=True)
            )
            batches += all(torch.equal(s, r[20:]) for s, r in zip(single, eight, strict=True))
    rows = [
        Row("ids identical, float64, nine tiny models, batch 1 and 4", same / total, "share"),
        Row("batch of 8 unequal prompts = 8 single runs, token by token", batches / total, "share"),
    ]
    small = tiny_model("llama", vocab_size=8, seed=1)
    draws = 300 if context.smoke else 20_000

    def p_value(make: Make) -> float:
        return check_distribution(make(), small, [1, 2, 3, 1, 2], draws=draws).p_value

    # Four tokens over eight leave room for two drafted levels: small trees say as much as large.
    shallow = {name: partial(_with_budget, make, 8) for name, make in setups.items()}
    values = {
        name: context.remember(["chi-square", name], partial(p_value, make))
        for name, make in shallow.items()
    }
    least = min(values, key=lambda name: values[name])
    rows.append(
        Row(
            "sampling: chi-square p, smallest of all drafters",
            values[least],
            unit="p",
            paper_setting="greedy only in the paper",
            why=f"{draws} draws of 4 tokens over 8; smallest for {least}",
        )
    )
    error = enumeration_error(small, torch.tensor([[1, 2, 3, 1, 2]]))
    rows.append(Row("sampling: one step by exact enumeration, greatest error", error, unit="p"))
    return rows


def _identity_rows(
    context: Context,
    model: Any,
    prompts: Mapping[int, list[int]],
    counts: Mapping[str, Mapping[int, Unit]],
    new_tokens: int,
) -> list[Row]:
    """Every output against plain decoding; each divergence is a row."""
    found = _judged(model, prompts, counts, new_tokens, str(context.dtype))
    found[0].paper, found[0].paper_setting = 1.0, "claimed lossless under greedy decoding, fp16"
    return found


def _bfloat16_rows(context: Context, prompts: Mapping[int, list[int]]) -> list[Row]:
    """The same in bfloat16, on few prompts with small trees."""
    import torch

    from pertoken.loading import load

    new_tokens = 12 if context.smoke else BFLOAT16["new_tokens"]
    model = context.load()[0] if context.smoke else load(context.model, dtype="bfloat16")[0]
    if context.smoke:
        model = deepcopy(model).to(torch.bfloat16)
    few = list(prompts)[:: max(1, len(prompts) // BFLOAT16["prompts"])]
    makes = {name: partial(_with_budget, make, BFLOAT16["nodes"]) for name, make in _all().items()}
    units = {
        name: {
            key: context.remember(
                ["bfloat16", name, key], partial(decode, model, prompts[key], make, new_tokens)
            )
            for key in context.track(few, f"bfloat16, {name}")
        }
        for name, make in makes.items()
    }
    return _judged(model, prompts, units, new_tokens, "bfloat16")


def _judged(
    model: Any,
    prompts: Mapping[int, list[int]],
    runs: Mapping[str, Mapping[int, Unit]],
    new_tokens: int,
    dtype: str,
) -> list[Row]:
    judged: dict[Any, Any] = {}
    shares, notes = [], []
    for name, units in runs.items():
        share, found = fair_share(
            model, prompts, units, runs["plain"], new_tokens, stop_ids(model), judged
        )
        shares.append(share)
        notes += [f"{name} {note}" for note in found]
    texts = sum(len(units) for units in runs.values())
    row = Row(
        f"ids identical or numerical tie, all drafters, {dtype}",
        min(shares),
        unit="share",
        why=f"{texts} texts of {len(runs['plain'])} prompts, {new_tokens} tokens; "
        f"{len(notes)} part at a numerical tie",
    )
    return [row, *(Row(f"divergence, {dtype}: {note}", 1, unit="text") for note in notes[:40])]


def _all() -> dict[str, Make]:
    return {"plain": _timed()["plain"]} | _drafters() | {"goose auto": _timed()["goose auto"]}


def _accepted_rows(context: Context, counts: Mapping[str, Mapping[int, Unit]]) -> list[Row]:
    every = {name: list(units.values()) for name, units in counts.items()}

    def row(first: str, second: str, **more: Any) -> Row:
        both = [key for key in counts[second] if key in counts[first]]
        one, other = ([counts[name][key] for key in both] for name in (first, second))
        return ratio_row(f"accepted: {first} over {second}", one, other, context.seed, **more)

    isotropic = {"paper": "+12-33 %, +25.4 % on average", "paper_setting": "8B models, budget 60"}
    rows = [row("paper shape", f"balanced k={k}", **isotropic) for k in (3, 5)]
    rows += [
        row("optimal shape", name)
        for name in ("paper shape", "token recycling", "prompt lookup", "lookahead", "suffix")
    ]
    rows += [
        Row(
            f"accepted per forward: {name}",
            accepted(units),
            unit="tokens",
            why=f"{len(units)} prompts",
        )
        for name, units in every.items()
        if name in _drafters()
    ]
    for name in _ablations():
        whole = [counts["paper shape"][key] for key in counts[name] if key in counts["paper shape"]]
        part = [counts[name][key] for key in counts[name] if key in counts["paper shape"]]
        rows.append(
            ratio_row(
                f"ablation: {name} over the whole paper shape",
                part,
                whole,
                context.seed,
                paper="each part dropped costs 3-5 %",
                paper_setting="Qwen3-8B",
            )
        )
    return rows


def _speed_rows(
    context: Context, timed: Mapping[int, Mapping[str, Any]], groups: Mapping[int, str]
) -> list[Row]:
    kept = {key: unit for key, unit in timed.items() if unit["kept"]}
    calm = {
        key: unit
        for key, unit in kept.items()
        if repeated_4gram_share(unit["plain"]["ids"]) < LOOPING_SHARE
    }

    def row(metric: str, fast: str, slow: str, units: Any = None, **more: Any) -> Row:
        units = list((kept if units is None else units).values())
        seconds = {name: [u[name]["seconds"] for u in units] for name in (fast, slow)}
        return speed_row(metric, seconds[fast], seconds[slow], context.seed, **more)

    claim = {"paper": "1.9-4.3", "paper_setting": "7B-33B, GPU, fp16, batch 1"}
    metric = "wall clock: goose (auto budget) over plain"
    rows = [row(f"{metric}, all", "goose auto", "plain", **claim)]
    by_group = []
    for group in dict.fromkeys(groups.values()):
        units = {key: unit for key, unit in kept.items() if groups[key] == group}
        by_group.append(row(f"{metric}, {group}", "goose auto", "plain", units))
    ranked = sorted(by_group, key=lambda r: r.here)
    for word, found in (("best", ranked[-1]), ("worst", ranked[0])):
        rows.append(
            Row(
                f"{metric}, {word} group",
                found.here,
                unit="x",
                interval=found.interval,
                baseline=1.0,
                why=found.metric.rpartition(", ")[2],
            )
        )
    rows += by_group
    rows += [
        row(f"{metric}, outputs that do not loop", "goose auto", "plain", calm),
        row(f"{metric}, kept from prompt to prompt", KEPT, "plain"),
        row(f"{metric}, kept from prompt to prompt, outputs that do not loop", KEPT, "plain", calm),
        row("wall clock: our plain loop over transformers' generate", "plain", "hf"),
        row(
            "wall clock: our prompt lookup over transformers'", "prompt lookup", "hf prompt lookup"
        ),
        row(
            "wall clock: our prompt lookup over transformers', outputs that do not loop",
            "prompt lookup",
            "hf prompt lookup",
            calm,
        ),
        row("wall clock: transformers' prompt lookup over plain", "hf prompt lookup", "plain"),
        row("wall clock: our prompt lookup over plain", "prompt lookup", "plain"),
    ]
    goose = [unit["goose auto"] for unit in kept.values()]
    outside = sum(unit["seconds_outside"] for unit in goose)
    steps = sum(unit["seconds_steps"] for unit in goose)
    rows.append(
        Row(
            "share of a step outside the model, goose (auto budget)",
            outside / steps if steps else float("nan"),
            unit="share",
        )
    )
    rows.append(Row("accepted per forward: goose (auto budget)", accepted(goose), unit="tokens"))
    rows.append(
        Row(
            "accepted per forward: goose (auto budget), kept from prompt to prompt",
            accepted(unit[KEPT] for unit in kept.values()),
            unit="tokens",
        )
    )
    for name in (*_timed(), KEPT):
        tokens = sum(len(unit[name]["ids"]) for unit in kept.values())
        seconds = sum(unit[name]["seconds"] for unit in kept.values())
        speed = tokens / seconds if seconds else float("nan")
        limits = sorted(unit["limit"] for unit in kept.values())
        limit = limits[len(limits) // 2] if limits else float("nan")
        rows.append(
            Row(
                f"speed: {name}",
                speed,
                unit="tokens/s",
                why=f"{speed / limit:.0%} of what the memory's bandwidth allows for one-token steps"
                if limits
                else "",
            )
        )
    return rows


def _cost_rows(model: Any) -> list[Row]:
    """What a pass over several tokens costs here: it bounds what any drafter can bring."""
    from pertoken.decode.budget import measure_costs
    from pertoken.decode.forward import TreeForward

    costs = measure_costs(TreeForward(model))
    rows = [Row("cost of a pass over 1 token", 1000 * costs[1], unit="ms")]
    rows += [
        Row(f"cost of a pass over {n} tokens over one token", costs[n] / costs[1], unit="x")
        for n in COSTS
        if n in costs
    ]
    return rows


def _noise(timed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    from pertoken.timing import FOREIGN_LIMIT

    shares = [unit["foreign"] for unit in timed.values() if unit["foreign"] is not None]
    return {
        "rounds_kept": sum(bool(unit["kept"]) for unit in timed.values()),
        "rounds_dropped": sum(not unit["kept"] for unit in timed.values()),
        "foreign_share_max": max(shares, default=None),
        "foreign_limit": FOREIGN_LIMIT,
    }

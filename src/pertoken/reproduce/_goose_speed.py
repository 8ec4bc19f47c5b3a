"""Wall clock in the reproduction of Goose: contenders in turns, and what a pass costs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from typing import Any

from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Row
from pertoken.reproduce._speculation import Make, Unit, accepted, decode, speed_row
from pertoken.stats_text import LOOPING_SHARE, repeated_4gram_share

COSTS = (2, 8, 16, 32, 64)  # tokens per pass whose measured cost is shown
KEPT = "goose auto, kept"  # one object for all prompts, in their order


def timed() -> dict[str, Make]:
    from pertoken.decode import Goose, Plain, PromptLookup

    return {
        "plain": Plain,
        "goose auto": lambda: Goose(budget="auto"),
        "prompt lookup": PromptLookup,
        "hf": dict,
        "hf prompt lookup": lambda: {"prompt_lookup_num_tokens": 10},
    }


def run_timed(
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

    for make in timed().values():  # warm up, and measure the costs
        decode(model, prompts[keys[0]][:16], make, 8)
    kept = Goose(budget="auto", keep=True)
    makes = timed() | {KEPT: lambda: kept}

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


def _ignore_index(run: Callable[[], Unit], _: int) -> Unit:
    return run()


def speed_rows(
    context: Context, units_of: Mapping[int, Mapping[str, Any]], groups: Mapping[int, str]
) -> list[Row]:
    kept = {key: unit for key, unit in units_of.items() if unit["kept"]}
    return [
        *_ratio_rows(kept, groups, context.seed),
        *_step_rows([unit["goose auto"] for unit in kept.values()]),
        Row(
            "accepted per forward: goose (auto budget), kept from prompt to prompt",
            accepted(unit[KEPT] for unit in kept.values()),
            unit="tokens",
        ),
        *(_tokens_per_second(name, list(kept.values())) for name in (*timed(), KEPT)),
    ]


def _ratio_rows(
    kept: Mapping[int, Mapping[str, Any]], groups: Mapping[int, str], seed: int
) -> list[Row]:
    """One contender's wall clock over another's: all prompts, by group, those that do not loop."""
    calm = {
        key: unit
        for key, unit in kept.items()
        if repeated_4gram_share(unit["plain"]["ids"]) < LOOPING_SHARE
    }

    def row(metric: str, fast: str, slow: str, units: Any = None, **more: Any) -> Row:
        units = list((kept if units is None else units).values())
        seconds = {name: [u[name]["seconds"] for u in units] for name in (fast, slow)}
        return speed_row(metric, seconds[fast], seconds[slow], seed, **more)

    claim = {"paper": "1.9-4.3", "paper_setting": "7B-33B, GPU, fp16, batch 1"}
    metric = "wall clock: goose (auto budget) over plain"
    by_group = []
    for group in dict.fromkeys(groups.values()):
        units = {key: unit for key, unit in kept.items() if groups[key] == group}
        by_group.append(row(f"{metric}, {group}", "goose auto", "plain", units))
    ranked = sorted(by_group, key=lambda r: r.here)
    ours = "wall clock: our prompt lookup over transformers'"
    return [
        row(f"{metric}, all", "goose auto", "plain", **claim),
        *(
            Row(
                f"{metric}, {word} group",
                found.here,
                unit="x",
                interval=found.interval,
                baseline=1.0,
                why=found.metric.rpartition(", ")[2],
            )
            for word, found in (("best", ranked[-1]), ("worst", ranked[0]))
        ),
        *by_group,
        row(f"{metric}, outputs that do not loop", "goose auto", "plain", calm),
        row(f"{metric}, kept from prompt to prompt", KEPT, "plain"),
        row(f"{metric}, kept from prompt to prompt, outputs that do not loop", KEPT, "plain", calm),
        row("wall clock: our plain loop over transformers' generate", "plain", "hf"),
        row(ours, "prompt lookup", "hf prompt lookup"),
        row(f"{ours}, outputs that do not loop", "prompt lookup", "hf prompt lookup", calm),
        row("wall clock: transformers' prompt lookup over plain", "hf prompt lookup", "plain"),
        row("wall clock: our prompt lookup over plain", "prompt lookup", "plain"),
    ]


def _step_rows(goose: list[Unit]) -> list[Row]:
    outside = sum(unit["seconds_outside"] for unit in goose)
    steps = sum(unit["seconds_steps"] for unit in goose)
    return [
        Row(
            "share of a step outside the model, goose (auto budget)",
            outside / steps if steps else float("nan"),
            unit="share",
        ),
        Row("accepted per forward: goose (auto budget)", accepted(goose), unit="tokens"),
    ]


def _tokens_per_second(name: str, kept: list[Mapping[str, Any]]) -> Row:
    tokens = sum(len(unit[name]["ids"]) for unit in kept)
    seconds = sum(unit[name]["seconds"] for unit in kept)
    speed = tokens / seconds if seconds else float("nan")
    limits = sorted(unit["limit"] for unit in kept)
    bound = "of what the memory's bandwidth allows for one-token steps"
    why = f"{speed / limits[len(limits) // 2]:.0%} {bound}" if limits else ""
    return Row(f"speed: {name}", speed, unit="tokens/s", why=why)


def cost_rows(model: Any) -> list[Row]:
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


def noise(units_of: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    from pertoken.timing import FOREIGN_LIMIT

    shares = [unit["foreign"] for unit in units_of.values() if unit["foreign"] is not None]
    return {
        "rounds_kept": sum(bool(unit["kept"]) for unit in units_of.values()),
        "rounds_dropped": sum(not unit["kept"] for unit in units_of.values()),
        "foreign_share_max": max(shares, default=None),
        "foreign_limit": FOREIGN_LIMIT,
    }

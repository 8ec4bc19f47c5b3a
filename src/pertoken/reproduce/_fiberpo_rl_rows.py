"""FiberPO and its peers end to end: the units that are run, and the rows made of them.

Step sizes and budgets of the tiny policy were chosen for each objective and number of steps on
`DEV_SEEDS`, with as many tries for each: three step sizes by two pairs of budgets, or six step
sizes for the policy gradient, which has no budget; `TRIED` counts them. The greatest area won. Our
two other variants of FiberPO take what was chosen for it. Reported seeds are others, and so are the
problems that the policies are looked at with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean, median
from typing import Any

from pertoken._bootstrap import bootstrap_mean, bootstrap_ratio
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Row

Unit = dict[str, Any]
Key = tuple[Any, ...]

DEV_SEEDS = (0, 1)
SEEDS = 5
BUDGET = {1: 30_000, 4: 60_000, 16: 30_000}  # completion tokens of a run, by steps a batch
REACHED = 0.6  # of the fresh problems
RIVALS = ("GRPO", "GSPO", "CISPO")
BUDGETS = {"tight": ((0.8, 1.28), 0.05), "wide": ((0.5, 2.0), 0.2)}  # token ratios, nats
# (objective, steps) -> step size, budgets; the policy gradient has none.
CHOSEN: dict[tuple[str, int], tuple[float, str]] = {
    ("policy gradient", 1): (9e-4, "tight"),
    ("policy gradient", 4): (2e-4, "tight"),
    ("GRPO", 4): (1e-3, "tight"),
    ("GSPO", 4): (1e-3, "tight"),
    ("CISPO", 4): (3e-4, "wide"),
    ("FiberPO", 4): (3e-4, "wide"),
    ("policy gradient", 16): (5e-5, "tight"),
    ("GRPO", 16): (3e-4, "tight"),
    ("GSPO", 16): (3e-4, "tight"),
    ("CISPO", 16): (1e-4, "tight"),
    ("FiberPO", 16): (3e-4, "wide"),
}
TRIED = {
    "tiny policy": "6 settings of each objective at 4 and at 16 steps on seed 0, the best two of "
    "them again on seed 1, 15,000 tokens a run: step sizes 0.0003, 0.001, 0.003 (4 steps) or "
    "0.0001, 0.0003, 0.001 (16 steps) by two pairs of budgets; the policy gradient 0.0001, 0.0002, "
    "0.0003, 0.0006, 0.001, 0.003 and three times these on-policy. Above that, at 16 steps: 0.003 "
    "with both budgets for GRPO, before it was seen to be too much for any, and 0.00005 for the "
    "policy gradient, whose best was the least. None for our variants",
    "tiny policy, length": "a run of FiberPO at 1, 4 and 16 steps on seed 2 with what was chosen; "
    "as it stayed below 60% at 4 steps, the tokens there were doubled for all objectives, and as "
    "no step was near 0.05 nats, spikes are counted from 0.01",
    "tiny policy, task": "6 kinds of problem or start and 22 runs, nearly all of GRPO, until a "
    "policy learned within seconds: longer sums, modulo 5, a policy that knew less. FiberPO was "
    "in none of them",
    "SmolLM2": "4 steps of FiberPO on one batch, for their time and divergence; supervised steps "
    "until samples were right at times: 0, 8, 16 and 24 looked at, with one step size",
}
MODEL_METHODS = (*RIVALS, "FiberPO")
# Set, not chosen: no reward of a step size or budget was looked at on the model.
MODEL_STEPS, MODEL_STEP_SIZE = 4, 5e-6
MODEL_TOKEN, MODEL_TRAJECTORY = (0.8, 1.28), 0.1
MODEL_PROMPTS, MODEL_GROUP, MODEL_NEW_TOKENS, MODEL_BUDGET = 4, 8, 6, 1200
MODEL_FRESH = 32


def bars() -> dict[str, str]:
    """What must hold, by metric."""
    return {
        **{_best(steps): ">= 1" for steps in (4, 16)},
        **{_until(4, peer): "<= 1" for peer in ("GRPO", "GSPO")},
    }


def _head(steps: int) -> str:
    return f"tiny policy, {steps} step{'s' * (steps > 1)}"


def _best(steps: int) -> str:
    return f"{_head(steps)}: area of FiberPO over the best of {', '.join(RIVALS)}"


def _until(steps: int, peer: str) -> str:
    return f"{_head(steps)}: tokens until {REACHED:.0%} of FiberPO over {peer}'s"


def settings() -> dict[str, Any]:
    """What a report says of how the policies were trained."""
    from pertoken.reproduce._fiberpo_rl import SPIKE

    return {
        "rl_budget": {str(steps): tokens for steps, tokens in BUDGET.items()},
        "rl_seeds": SEEDS,
        "rl_spike_nats": SPIKE,
        "rl_budgets": {name: [list(token), nats] for name, (token, nats) in BUDGETS.items()},
        "rl_chosen": {f"{name}, {steps}": list(one) for (name, steps), one in CHOSEN.items()},
        "rl_model": {
            "steps": MODEL_STEPS,
            "step_size": MODEL_STEP_SIZE,
            "token": list(MODEL_TOKEN),
            "trajectory_nats": MODEL_TRAJECTORY,
            "prompts": MODEL_PROMPTS,
            "group": MODEL_GROUP,
            "new_tokens": MODEL_NEW_TOKENS,
            "budget": MODEL_BUDGET,
        },
    }


def chosen(name: str, steps: int) -> tuple[float, str]:
    """Step size and budgets of an objective; on-policy there is one for all."""
    from pertoken.reproduce._fiberpo_methods import FIBERPO

    if steps == 1:
        return CHOSEN["policy gradient", 1]
    return CHOSEN["FiberPO" if name in FIBERPO else name, steps]


def run_units(context: Context) -> dict[Key, Unit]:
    """Train every policy: (seed, steps, objective) and ("model", objective) -> what happened."""
    units: dict[Key, tuple[object, Callable[[], Unit]]] = {}
    for name in MODEL_METHODS:  # the longest first, so that two processes end together
        units["model", name] = (["rl", "model", name], partial(_model, context, name))
    for seed in _seeds(context):
        for steps, names in _grid().items():
            for name in names:
                key = ["rl", "tiny", seed, steps, name]
                compute = partial(_tiny, seed, steps, name, context.smoke)
                units[seed, steps, name] = (key, compute)
    return context.remember_all(units, "fiberpo, end to end")


def _seeds(context: Context) -> range:
    return range(context.seed, context.seed + (1 if context.smoke else SEEDS))


def _grid() -> dict[int, tuple[str, ...]]:
    """Steps a batch -> the objectives that are run."""
    from pertoken.reproduce._fiberpo_methods import FIBERPO, PEERS

    every = (*PEERS, *FIBERPO)
    return {1: (*PEERS, "FiberPO"), 4: every, 16: every}


def _tiny(seed: int, steps: int, name: str, smoke: bool) -> Unit:
    from pertoken.reproduce import _fiberpo_rl_tiny as tiny
    from pertoken.reproduce._fiberpo_methods import losses
    from pertoken.reproduce._fiberpo_rl import train

    step_size, budgets = chosen(name, steps)
    loss = losses(*BUDGETS[budgets], reduction="sequence_mean")[name]
    model = tiny.untrained(seed) if smoke else tiny.policy(seed)
    small = {"prompts": 2, "group": 2} if smoke else {}
    return train(
        model,
        tiny.quiz("report", 4 if smoke else None),
        loss,
        steps=min(steps, 2) if smoke else steps,
        step_size=step_size,
        budget=1 if smoke else BUDGET[steps],
        seed=seed,
        **small,
    )


def _model(context: Context, name: str) -> Unit:
    from pertoken.reproduce import _fiberpo_rl_task as of_task
    from pertoken.reproduce._fiberpo_methods import losses
    from pertoken.reproduce._fiberpo_rl import train

    model, tokenizer = of_task.policy(context)
    smoke = context.smoke
    quiz = of_task.quiz(
        model, tokenizer, 2 if smoke else MODEL_NEW_TOKENS, 2 if smoke else MODEL_FRESH
    )
    token, nats = MODEL_TOKEN, MODEL_TRAJECTORY
    return train(
        model,
        quiz,
        losses(token, nats, reduction="sequence_mean")[name],
        steps=1 if smoke else MODEL_STEPS,
        step_size=MODEL_STEP_SIZE,
        budget=1 if smoke else MODEL_BUDGET,
        seed=context.seed,
        prompts=2 if smoke else MODEL_PROMPTS,
        group=2 if smoke else MODEL_GROUP,
        every=10**6,
    )


def rows(found: Mapping[Key, Unit], context: Context) -> list[Row]:
    """The rows of all units of `run_units`."""
    from pertoken.reproduce._fiberpo_rl import SPIKE, area

    made: list[Row] = []
    for steps, names in _grid().items():
        runs = {name: [found[seed, steps, name] for seed in _seeds(context)] for name in names}
        made += tiny_rows(runs, steps, 1 if context.smoke else BUDGET[steps], context.seed)
    budget = 1 if context.smoke else MODEL_BUDGET
    for name in MODEL_METHODS:
        one = found["model", name]
        start, end = one["fresh"][0][1], one["fresh"][-1][1]
        why = (
            f"one seed, {len(one['tokens'])} batches: no claim; fresh problems {start:.3g} before, "
            f"{end:.3g} after; {one['spikes']} of {one['steps']} steps above {SPIKE} nats"
        )
        reward = area(one["tokens"], one["reward"], budget)
        made.append(
            Row(f"SmolLM2 on arithmetic, {MODEL_STEPS} steps: {name}, area", reward, why=why)
        )
    return made


def tiny_rows(runs: Mapping[str, Sequence[Unit]], steps: int, budget: int, seed: int) -> list[Row]:
    """The rows of one number of steps; runs: by objective, in the order of the seeds."""
    from pertoken.reproduce._fiberpo_rl import SPIKE, area, collapsed

    head = _head(steps)
    areas = {
        name: [area(one["tokens"], one["reward"], budget) for one in ones]
        for name, ones in runs.items()
    }
    made: list[Row] = []
    same = "on-policy all objectives have one gradient; they differ by rounding" * (steps == 1)
    for name, ones in runs.items():
        interval = bootstrap_mean(areas[name], seed=seed)
        made.append(Row(f"{head}: {name}, area", mean(areas[name]), interval=interval, why=same))
        last = [one["fresh"][-1][1] for one in ones]
        interval = bootstrap_mean(last, seed=seed)
        made.append(Row(f"{head}: {name}, reward at the end", mean(last), interval=interval))
        spikes, taken = sum(one["spikes"] for one in ones), sum(one["steps"] for one in ones)
        largest = max(one["largest"] for one in ones)
        made.append(
            Row(
                f"{head}: {name}, KL spikes",
                spikes,
                f"of {taken} steps",
                why=f"above {SPIKE} nats a token, old to new policy; the largest: {largest:.3g}",
            )
        )
        fallen = sum(collapsed(one["fresh"]) for one in ones)
        made.append(Row(f"{head}: {name}, collapses", fallen, f"of {len(ones)} runs"))
    best = max(RIVALS, key=lambda name: mean(areas[name]))
    mine, theirs = areas["FiberPO"], areas[best]
    gaps = [one - other for one, other in zip(mine, theirs, strict=True)]
    baseline = f"{mean(theirs):.4g} ({best})"
    gap = bootstrap_mean(gaps, seed=seed)
    made.append(
        Row(
            f"{head}: area of FiberPO minus the best peer's",
            mean(gaps),
            interval=gap,
            baseline=baseline,
        )
    )
    ratio = mean(mine) / mean(theirs) if mean(theirs) else float("nan")
    interval = bootstrap_ratio(mine, theirs, seed=seed)
    made.append(Row(_best(steps), ratio, "x", interval=interval, baseline=baseline))
    return made + _until_rows(runs, steps, budget)


def _until_rows(runs: Mapping[str, Sequence[Unit]], steps: int, budget: int) -> list[Row]:
    """Median tokens until `REACHED`; a run that never gets there counts as the whole budget."""
    from pertoken.reproduce._fiberpo_rl import tokens_until

    medians: dict[str, float] = {}
    made: list[Row] = []
    for name, ones in runs.items():
        reached = [tokens_until(one["fresh"], REACHED) for one in ones]
        never = sum(tokens is None for tokens in reached)
        medians[name] = median(float(budget) if one is None else one for one in reached)
        made.append(
            Row(
                f"{_head(steps)}: {name}, tokens until {REACHED:.0%}",
                medians[name],
                "tokens",
                why=f"{never} of {len(ones)} runs never; they count as {budget}" * (never > 0),
            )
        )
    for peer in ("GRPO", "GSPO"):
        mine, theirs = medians["FiberPO"], medians[peer]
        known = 0 < mine < budget and theirs > 0
        ratio = mine / theirs if known else float("nan")
        made.append(Row(_until(steps, peer), ratio, "x", baseline=theirs))
    return made

"""Reproduction of FiberPO (arXiv 2603.08239): its algebra, two scales, direction, learning.

Four parts. The identities the paper states, as errors in float64. Two-scale containment: a stale
batch of a tiny Llama reused for 16 steps of Adam, with its momentum and without, under two
stresses. The update direction against the true gradient on a problem small enough to enumerate.
End to end (`_fiberpo_rl_rows`): reinforcement learning of a tiny Llama on two-step sums with 1, 4
and 16 steps a batch, and of SmolLM2 on arithmetic. FiberPO as the authors write it is the row with
a bar; our two other variants (`pertoken.train.fiberpo`) stand beside it.

Budgets are matched by name, token and trajectory. The step sizes of the containment were chosen on
seeds 0 to 2 so that the unclipped objective ends near four budgets in the stressed measure; the
drift of the direction toy on seeds 0 to 39 so that gates are closed from its smallest drift on and
for about half of the texts at its largest. `TRIED` counts what was looked at. Reported seeds are
others.
"""

from __future__ import annotations

import math
from functools import partial
from statistics import mean, median
from typing import Any

from pertoken._bootstrap import bootstrap_mean
from pertoken.reproduce import _fiberpo_rl_rows as end_to_end
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row

VERSION = 2
MODEL = "tiny"
DTYPE = "float64"
SEED = 100_000
BATCHES = 20
CONTAINMENT_SEEDS = 5
DIRECTION_SEEDS = 100
TOKEN, TRAJECTORY = (0.8, 1.28), 0.1  # containment: ratios, nats
STEP_SIZES = {"common drift": 2e-5, "outlier token": 7.5e-6}
TOY_TOKEN, TOY_TRAJECTORY = 0.5, 0.3  # direction: nats
TRIED = {
    "containment": "14 pairs of stress and step size, 4 of them with all objectives; a first "
    "common drift (texts as sampled) was given up, since its tokens did not drift in common",
    "direction": "4 pairs of step size and share of reward, judged by the gates that are closed; "
    "the first one, with hardly a gate closed, with all objectives",
    **end_to_end.TRIED,
}

EXACT = (
    "Jacobian on-policy = identity",
    "Jacobian between trajectories = 0",
    "closed-form gradient = autograd's",
    "open gates = policy gradient",
    "no room for residuals = GSPO",
    "one and two levels = the named objectives",
    "micro-batches = one batch",
    "APC-Obj, both forms = linear program",
)
BARS = {
    **{f"algebra: {name}": "<= 1e-9" for name in EXACT},
    "algebra: error at a step over half of it, first order": ">= 3.9",
    "common drift: FiberPO, larger of both measures": "<= 1.5",
    "common drift: GRPO, trajectory": "> 1.5",
    "outlier token: FiberPO, larger of both measures": "<= 1.5",
    "outlier token: GSPO, token": "> 1.5",
    "direction: cosine of FiberPO minus GRPO's": "> 0",
    "direction: cosine of FiberPO minus GSPO's": "> 0",
    **end_to_end.bars(),
}
_MOMENTUM = (
    "a gate stops the gradient, not the step: Adam's momentum carries the drift past the bound, as "
    "it does for the objective that gates this scale alone (row '{}'); without momentum it ends "
    "little past the bound, below the bar (row '{}'{}); in brackets the least and the greatest of "
    "the seeds"
)
_DIRECTION = (
    "no trust region helps the direction here: the unclipped policy gradient lies above all that "
    "stop tokens (its row). Behind a budget the paper's gate pulls back by design (eq. 4), against "
    "the objective; our variants without that pull lie higher (their rows). The paper claims the "
    "direction near on-policy, where all are one"
)
REASONS = {
    "common drift: FiberPO, larger of both measures": _MOMENTUM.format(
        "common drift: GSPO, trajectory",
        "common drift, no momentum: FiberPO, larger of both measures",
        "",
    ),
    "outlier token: FiberPO, larger of both measures": _MOMENTUM.format(
        "outlier token: GRPO, token",
        "outlier token, no momentum: FiberPO, larger of both measures",
        ", the worst seed just over it",
    ),
    "direction: cosine of FiberPO minus GRPO's": _DIRECTION,
    "direction: cosine of FiberPO minus GSPO's": _DIRECTION,
    "tiny policy, 4 steps: area of FiberPO over the best of GRPO, GSPO, CISPO": (
        "not told apart from the best, GRPO: the interval of the ratio has 1 inside. That GRPO and "
        "GSPO have many more KL spikes goes with their larger step size (settings); CISPO, at "
        "FiberPO's, has none (rows of KL spikes). Our variant without its pull back has the "
        "greatest mean (row 'FiberPO residual, area'), its interval overlaps those of the peers"
    ),
    "tiny policy, 4 steps: tokens until 60% of FiberPO over GRPO's": (
        "in the median of five runs GRPO is there first; one of its runs never gets there, and "
        "none of FiberPO's fails to"
    ),
    "tiny policy, 16 steps: area of FiberPO over the best of GRPO, GSPO, CISPO": (
        "GSPO, which bounds the whole sequence alone, learns fastest from a batch used 16 times; "
        "FiberPO bounds each token too, and lies between GSPO and GRPO, which bounds tokens alone "
        "(their rows). The development seeds had the same order"
    ),
}
_LAW = "a law of the algebra: only a mistake could break it"
_UNBOUNDED = (
    "this objective has no bound on this scale, and the step size was chosen so that the "
    "unbounded one goes far beyond the bar; in brackets the least and the greatest of five seeds"
)
CAVEATS: dict[str, str] = {
    **dict.fromkeys((bar for bar in BARS if bar.startswith("algebra")), _LAW),
    "common drift: GRPO, trajectory": _UNBOUNDED,
    "outlier token: GSPO, token": _UNBOUNDED,
    "tiny policy, 4 steps: tokens until 60% of FiberPO over GSPO's": (
        "the two medians are of the same look at the policies, which comes every second batch, "
        "and differ by the length of the answers"
    ),
}


def run(context: Context) -> Reproduction:
    """All rows."""
    learned = end_to_end.run_units(context)  # first: helper processes run up to here
    rows = _algebra(context) + _containment(context) + _direction(context)
    rows += end_to_end.rows(learned, context)
    return context.reproduction(
        rows,
        batches=BATCHES,
        containment_seeds=CONTAINMENT_SEEDS,
        direction_seeds=DIRECTION_SEEDS,
        token=list(TOKEN),
        trajectory_nats=TRAJECTORY,
        step_sizes=STEP_SIZES,
        toy_token_nats=TOY_TOKEN,
        toy_trajectory_nats=TOY_TRAJECTORY,
        tried=TRIED,
        **end_to_end.settings(),
    )


def _algebra(context: Context) -> list[Row]:
    from pertoken.reproduce._fiberpo_algebra import errors, first_order

    def compute() -> dict[str, float]:
        return errors(context.seed, 1 if context.smoke else BATCHES)

    found = context.remember(["algebra"], compute)
    rows = [Row(f"algebra: {name}", found[name]) for name in EXACT]
    name = "sum of the coefficients"
    rows.append(Row(f"algebra: {name}", found[name], why="against central differences of 1e-5"))
    ratio = first_order(context.seed)
    return [*rows, Row("algebra: error at a step over half of it, first order", ratio, "x")]


def _containment(context: Context) -> list[Row]:
    from pertoken.reproduce._fiberpo_containment import STRESSES, contained
    from pertoken.reproduce._fiberpo_methods import losses

    budgets = (math.log(TOKEN[0]), math.log(TOKEN[1]))
    objectives = losses(TOKEN, TRAJECTORY)
    gated = {name: objectives[name] for name in ("GRPO", "GSPO", "FiberPO")}
    seeds = range(context.seed, context.seed + (1 if context.smoke else CONTAINMENT_SEEDS))
    steps = {"steps": 2} if context.smoke else {}
    settings = [(stress, label) for stress in STRESSES for label in ("", ", no momentum")]
    rows = []
    for stress, label in settings:
        chosen, momentum = (gated, 0.0) if label else (objectives, 0.9)
        runs: list[dict[str, Any]] = []
        for seed in context.track(list(seeds), f"fiberpo, {stress}{label}"):
            compute = partial(
                contained,
                chosen,
                stress,
                seed,
                STEP_SIZES[stress],
                budgets,
                TRAJECTORY,
                momentum=momentum,
                **steps,
            )
            runs.append(context.remember(["containment", stress, momentum, seed], compute))
        for name in chosen:
            for what, values in (
                ("token", [run[name][0] for run in runs]),
                ("trajectory", [run[name][1] for run in runs]),
                ("larger of both measures", [max(run[name]) for run in runs]),
            ):
                spread = (min(values), max(values))
                metric = f"{stress}{label}: {name}, {what}"
                rows.append(Row(metric, median(values), "budgets", interval=spread))
    return rows


def _direction(context: Context) -> list[Row]:
    from pertoken.reproduce._fiberpo_methods import FIBERPO, PEERS, losses
    from pertoken.reproduce._fiberpo_toy import DRIFTS, update_cosines

    token = (math.exp(-TOY_TOKEN), math.exp(TOY_TOKEN))
    objectives = losses(token, TOY_TRAJECTORY)
    seeds = 4 if context.smoke else DIRECTION_SEEDS
    cells: dict[str, dict[str, list[float]]] = {}
    for kind, steps in DRIFTS:

        def compute(kind: str = kind, steps: int = steps) -> dict[str, list[float]]:
            found = update_cosines(objectives, (kind, steps), seeds, context.seed)
            return {name: values.tolist() for name, values in found.items()}

        cells[f"{kind} {steps}"] = context.remember(["direction", kind, steps], compute)

    def over_cells(name: str) -> list[float]:
        return [mean(cell[name][seed] for cell in cells.values()) for seed in range(seeds)]

    def difference(mine: list[float], theirs: list[float]) -> list[float]:
        return [one - other for one, other in zip(mine, theirs, strict=True)]

    rows = [Row(f"direction: cosine of {name}", mean(over_cells(name))) for name in objectives]
    for name in FIBERPO:
        for peer in PEERS:
            gaps = difference(over_cells(name), over_cells(peer))
            rows.append(
                Row(
                    f"direction: cosine of {name} minus {peer}'s",
                    mean(gaps),
                    interval=bootstrap_mean(gaps, seed=context.seed),
                )
            )
    for cell, found in cells.items():
        for name in objectives:
            values = found[name]
            rows.append(Row(f"direction, {cell}: cosine of {name}", mean(values)))
    return rows

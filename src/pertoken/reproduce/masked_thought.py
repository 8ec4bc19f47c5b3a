"""Reproduction of masked thought (arXiv 2403.02178) on models small enough to train here.

The paper fine-tunes Llama-2-7B on GSM8K for many epochs; here tiny Llamas learn sums of three steps
with named numbers (`_worked_sums`) from 1,500 examples seen many times, which is the regime of the
claim. Four arms with the same data, order, steps and first weights for each seed: plain
fine-tuning, masked thought with a mask token and with random tokens, and, as a control, dropout of
the same rate and schedule on the answer's input embeddings. Greedy answers to 500 new problems are
right where their last number is; so are those to 500 with a number named that is not used (the
paper's GSM-IC).

The noise and rate of the bars were chosen on training seed 1000 and other problems, see `CHOSEN`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from pertoken.reproduce import _worked_sums as lab
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row
from pertoken.train import linear_rate, mask_thought, question_dependence, weighted_nll

VERSION = 1
DTYPE = "float32"

EXAMPLES, STEPS, SEEDS, TEST = 1500, 600, 5, 500
LEARNING_RATE = 2e-3
ARMS = ("sft", "mask", "random", "dropout")
RATE = 0.4
CHOSEN = "random"

GAIN = "accuracy, masked thought minus fine-tuning: mean of the seeds, points"
SURE = "accuracy, masked thought minus fine-tuning: mean less 2 standard errors, points"
IRRELEVANT = "the same gain with an irrelevant number less the plain gain, points"
DEPENDENCE = "dependence on the question, minus fine-tuning's: mean less 2 standard errors, nats"
BARS = {GAIN: ">= 2", SURE: "> 0", IRRELEVANT: ">= 0", DEPENDENCE: "> 0"}
REASONS: dict[str, str] = {}

Unit = dict[str, float]


def run(context: Context) -> Reproduction:
    """All rows; kept training by training."""
    seeds = [context.seed + place for place in range(1 if context.smoke else SEEDS)]
    units: dict[tuple[str, int], tuple[object, Callable[[], Unit]]] = {
        (arm, seed): ([arm, seed, RATE], partial(trained, arm, seed, RATE, smoke=context.smoke))
        for seed in seeds
        for arm in ARMS
    }
    found = context.remember_all(units, "trainings")
    table = {
        (arm, what): [found[arm, seed][what] for seed in seeds]
        for arm in ARMS
        for what in ("plain", "irrelevant", "dependence", "train_nll")
    }
    return context.reproduction(
        [*_judged(table), *_told(table)],
        examples=EXAMPLES,
        steps=STEPS,
        batch=lab.BATCH,
        learning_rate=LEARNING_RATE,
        layers=lab.LAYERS,
        hidden=lab.HIDDEN,
        rate=RATE,
        noise_of_the_bars=CHOSEN,
        training_seeds=seeds,
        test_problems=TEST,
        chosen_on="training seed 1000, its own problems",
    )


def trained(
    arm: str, seed: int, rate: float, *, smoke: bool = False, tests: str = "report"
) -> Unit:
    """Train one model and ask it."""
    count, steps, asked = (70, 2, 4) if smoke else (EXAMPLES, STEPS, TEST)
    rows = lab.sums(count, f"train {seed}")
    ids, labels = lab.encode(rows)
    model = lab.new_model(seed)
    loss_of = partial(_loss, arm, rate, seed)
    lab.learn(model, ids, labels, loss_of, steps=steps, learning_rate=LEARNING_RATE, seed=seed)
    plain = lab.sums(asked, f"{tests} {seed}", without=rows)
    more = lab.sums(asked, f"{tests} irrelevant {seed}", irrelevant=True)
    test_ids, test_labels = lab.encode(plain[:200])
    with torch.no_grad():
        nll = _loss("sft", 0.0, seed, model, ids[:256], labels[:256], 0, 1)
    right = [lab.solved(model, some) for some in (plain, more)]
    return {
        "plain": 100 * sum(right[0]) / asked,
        "irrelevant": 100 * sum(right[1]) / asked,
        "dependence": question_dependence(model, test_ids, test_labels).mean().item(),
        "train_nll": nll.item(),
    }


def _loss(
    arm: str,
    rate: float,
    seed: int,
    model: Any,
    ids: torch.Tensor,
    labels: torch.Tensor,
    step: int,
    steps: int,
) -> torch.Tensor:
    """The mean loss of the answers' tokens under the arm's noise."""
    now, own = linear_rate(step, steps, rate), seed * 100_003 + step
    more: dict[str, Any] = {"input_ids": ids}
    if arm in ("mask", "random"):
        given: dict[str, Any] = {"mask_id": lab.MASK, "vocab_size": lab.TOKENS, "noise": arm}
        more = {"input_ids": mask_thought(ids, labels, now, seed=own, **given)}
    elif arm == "dropout":
        embedded = model.get_input_embeddings()(ids)
        draw = torch.rand(embedded.shape, generator=torch.Generator().manual_seed(own))
        kept = (draw >= now) / (1 - now)
        answer = (labels != lab.IGNORED)[..., None]
        more = {"inputs_embeds": torch.where(answer, embedded * kept, embedded)}
    mask = labels[:, 1:] != lab.IGNORED
    return weighted_nll(lab.log_probs_of(model, ids, **more), torch.ones_like(mask), mask)


def _interval(found: tuple[float, float]) -> tuple[float, float]:
    return found[0] - 2 * found[1], found[0] + 2 * found[1]


def _judged(table: dict[tuple[str, str], list[float]]) -> list[Row]:
    """The rows with bars."""
    gains = {
        what: lab.gap(table[CHOSEN, what], table["sft", what])
        for what in ("plain", "irrelevant", "dependence")
    }
    extra = lab.gap(
        [
            a - b
            for a, b in zip(table[CHOSEN, "irrelevant"], table["sft", "irrelevant"], strict=True)
        ],
        [a - b for a, b in zip(table[CHOSEN, "plain"], table["sft", "plain"], strict=True)],
    )
    setting = "Llama-2-7B on GSM8K, greedy, random tokens at 0.4"
    plain = gains["plain"]
    return [
        Row(GAIN, plain[0], "points", 4.5, setting, _interval(plain), _mean(table["sft", "plain"])),
        Row(SURE, _interval(plain)[0], "points", interval=_interval(plain)),
        Row(
            IRRELEVANT,
            extra[0],
            "points",
            5.0,
            "GSM-IC against GSM8K: about 10 points against 5",
            _interval(extra),
            f"gain {gains['irrelevant'][0]:.3g}",
        ),
        Row(
            DEPENDENCE,
            _interval(gains["dependence"])[0],
            "nats per token",
            interval=_interval(gains["dependence"]),
            baseline=_mean(table["sft", "dependence"]),
        ),
    ]


def _told(table: dict[tuple[str, str], list[float]]) -> list[Row]:
    """Every arm as it is, and against the others."""
    rows = []
    for what, unit, name in (
        ("plain", "points", "accuracy"),
        ("irrelevant", "points", "accuracy with an irrelevant number"),
        ("dependence", "nats per token", "dependence on the question"),
        ("train_nll", "nats per token", "loss on training examples"),
    ):
        for arm in ARMS:
            values = table[arm, what]
            each = ", ".join(f"{one:.3g}" for one in values)
            rows.append(Row(f"{arm}: {name}", sum(values) / len(values), unit, baseline=each))
    for arm in ("mask", "random"):
        for rival in ("sft", "dropout"):
            found = lab.gap(table[arm, "plain"], table[rival, "plain"])
            metric = f"accuracy, {arm} minus {rival}"
            rows.append(Row(metric, found[0], "points", interval=_interval(found)))
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

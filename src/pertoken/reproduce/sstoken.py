"""Reproduction of ssToken (arXiv 2510.18250) on models small enough to train here.

The paper fine-tunes models of 3B to 14B parameters on 50,000 instructions. Here a tiny Llama first
learns sums of three steps (`_worked_sums`, without names); this is the base model and the history.
It is then fine-tuned for one pass on sums with named numbers, in whose worked answers a fifth of
the tokens is replaced by random ones, so that it is known which tokens are noise. Arms with the
same data, order, steps and first weights for each seed: all tokens, a random share of each answer,
and ssToken; the share is the paper's 0.6, and all three divide by the tokens they learn from.

With noise there are two more, of the same share and divisor: RHO-1, and the tokens of the highest
entropy. RHO-1's reference model has what ssToken does without: it is the same base model after one
pass, of as many steps, over clean answers to as many problems of a draw of its own. There are so
few problems that about a third of those that are tuned on, and of those that are held out, are
among them: RHO-1's row is flattered by that.

What is judged: whether the scores tell clean from noisy tokens after a third of the training (area
under the ROC curve over the tokens of 512 of the answers; each of the two scores alone stands
beside it), and the loss on clean answers to new problems. The same without noise is the paper's
claim proper; it has no bar here. Told beside them: which tenths of the answers are kept after a
third of the training, and the time of a step, in turns on one batch. In so small a model both the
history's forward and the last block, which is run up to its attention once more, are a larger part
of a step than in others.

What was looked at before, all with training seed 1000: a base model of 400 steps and 100 steps of
fine-tuning at 1e-3 (area .40 after a third, REL alone .42, attention alone .47), and a base model
of 100 steps with fine-tuning at 2e-3 (.43, REL alone .44 after 45 steps; .49, .52 after 120; .54,
.58 after 200 of 600). All seeds start from that one base model. So early the model learns to expect
noise, whose loss falls most, and the training is made longer, so that a third of it is past the
beginning. With the settings as they are now: .57, REL alone .64, attention alone .49 after a third;
.59, .67, .50 at the end. Nothing was changed after that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from pertoken.errors import PertokenError
from pertoken.reproduce import _worked_sums as lab
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row
from pertoken.reproduce._speculation import speed_row
from pertoken.reproduce._sstoken_speed import step_times
from pertoken.select import random as random_tokens
from pertoken.select import rounded_up, top_share
from pertoken.train import (
    retrospective_excess_loss,
    rho1_loss,
    ss_scores,
    sstoken_loss,
    top_entropy_loss,
    weighted_nll,
)
from pertoken.train._prompt_attention import watching
from pertoken.train.sstoken import kept_by_place

VERSION = 1
MODEL = "tiny"
DTYPE = "float32"

BASE_EXAMPLES, BASE_STEPS, BASE_RATE = 4000, 100, 2e-3
EXAMPLES, TEST, SEEDS = 1000 * lab.BATCH, 400, 3
LEARNING_RATE = 2e-3
NOISE, KEEP, GAMMA, WARM_UP = 0.2, 0.6, 0.5, 0.2
RATED = 512  # answers whose tokens' scores are held against the noise
DEV_SEED = 1000
ARMS = ("full", "random", "sstoken")
RIVALS = ("rho-1", "top-entropy")  # with noise only
SETTINGS = [(arm, NOISE) for arm in (*ARMS, *RIVALS)] + [(arm, 0.0) for arm in ARMS]
SCORES = {"score": GAMMA, "REL alone": 1.0, "attention alone": 0.0}
TENTHS = [f"tenth {place}" for place in range(1, 11)]

AUC = "area under the ROC curve, clean against noise, after a third of training: mean of the seeds"
OVER_FULL = "clean held-out loss, all tokens minus ssToken: mean less 2 standard errors, nats"
OVER_RANDOM = "clean held-out loss, random tokens minus ssToken: mean less 2 standard errors, nats"
BARS = {AUC: ">= 0.7", OVER_FULL: "> 0", OVER_RANDOM: "> 0"}
_BEGINNINGS = (
    "it keeps beginnings: attention on the prompt falls with the place in the answer, and of the "
    "last tenth hardly a token is kept (rows of the tenths); whether that is all was not tested. "
    "Without noise it loses too, where a random share of the same size does not (rows)"
)
REASONS = {
    AUC: "the excess loss alone does better and is below the bar too, attention alone tells clean "
    "from noise no better than chance (rows)",
    OVER_FULL: _BEGINNINGS,
    OVER_RANDOM: _BEGINNINGS,
}

Unit = dict[str, float]


def run(context: Context) -> Reproduction:
    """All rows; kept training by training."""
    seeds = [context.seed + place for place in range(1 if context.smoke else SEEDS)]
    units: dict[tuple[str, float, int], tuple[object, Callable[[], Unit]]] = {
        (arm, noise, seed): (
            [arm, noise, seed],
            partial(trained, arm, noise, seed, smoke=context.smoke),
        )
        for seed in seeds
        for arm, noise in SETTINGS
    }
    found = context.remember_all(units, "trainings")
    table = {
        (arm, noise, what): [found[arm, noise, seed][what] for seed in seeds]
        for arm, noise in SETTINGS
        for what in found[arm, noise, seeds[0]]
    }
    times = context.remember(["step times"], partial(_step_times, smoke=context.smoke))
    return context.reproduction(
        [*_judged(table), *_told(table), *_cost(times, context.seed)],
        base_examples=BASE_EXAMPLES,
        base_steps=BASE_STEPS,
        base_learning_rate=BASE_RATE,
        examples=EXAMPLES,
        batch=lab.BATCH,
        learning_rate=LEARNING_RATE,
        layers=lab.LAYERS,
        hidden=lab.HIDDEN,
        noise=NOISE,
        keep=KEEP,
        gamma=GAMMA,
        warmup=WARM_UP,
        training_seeds=seeds,
        test_problems=TEST,
        reference_examples=EXAMPLES,
        answers_rated=RATED,
        base_model="one for all seeds",
        chosen_on=f"training seed {DEV_SEED}, its own problems, the same base model",
        **times["noise"],
    )


def trained(arm: str, noise: float, seed: int, *, smoke: bool = False) -> Unit:
    """Fine-tune the base model and measure it on clean answers, the scores on the way."""
    count, asked = (2 * lab.BATCH, 8) if smoke else (EXAMPLES, TEST)
    rows = lab.sums(count, f"tune {seed}")
    clean, labels = lab.encode(rows)
    ids, noisy = spoilt(clean, labels, noise, seed)
    labels = torch.where(labels != lab.IGNORED, ids, lab.IGNORED)
    history = reference_model(smoke) if arm == "rho-1" else base_model(smoke)
    model = copy.deepcopy(base_model(smoke)).requires_grad_(True)
    steps = count // lab.BATCH
    found: Unit = {}

    def watch(done: int) -> None:
        if arm == "sstoken" and noise and done == max(1, steps // 3):
            some = slice(RATED)
            found.update(areas(model, history, ids[some], labels[some], noisy[some]))

    loss_of = partial(_loss, arm, seed, history)
    lab.learn(
        model,
        ids,
        labels,
        loss_of,
        steps=steps,
        learning_rate=LEARNING_RATE,
        seed=seed,
        watch=watch,
    )
    test = lab.sums(asked, f"report {seed}", without=rows)
    test_ids, test_labels = lab.encode(test)
    found["accuracy"] = 100 * sum(lab.solved(model, test)) / asked
    with torch.no_grad():
        found["loss"] = _mean_nll(model, test_ids, test_labels).item()
    return found


@cache
def base_model(smoke: bool) -> Any:
    """The model before its fine-tuning, the same in all units; trained once in a process."""
    rows = lab.sums(lab.BATCH if smoke else BASE_EXAMPLES, "base", names=False)
    return _on_clean(lab.new_model(0), rows, 2 if smoke else BASE_STEPS, BASE_RATE, 0)


@cache
def reference_model(smoke: bool) -> Any:
    """RHO-1's: the base model after a pass over clean answers, trained once in a process."""
    rows = lab.sums(2 * lab.BATCH if smoke else EXAMPLES, f"reference {DEV_SEED}")
    model = copy.deepcopy(base_model(smoke)).requires_grad_(True)
    return _on_clean(model, rows, len(rows) // lab.BATCH, LEARNING_RATE, DEV_SEED)


def _on_clean(model: Any, rows: list[lab.Sum], steps: int, rate: float, seed: int) -> Any:
    def loss_of(model: Any, ids: Any, labels: Any, step: int, steps: int) -> torch.Tensor:
        return _mean_nll(model, ids, labels)

    made = lab.learn(model, *lab.encode(rows), loss_of, steps=steps, learning_rate=rate, seed=seed)
    return made.requires_grad_(False)


def spoilt(
    ids: torch.Tensor, labels: torch.Tensor, noise: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with a share of the answers' tokens replaced by other ones, and which these are."""
    draw = torch.Generator().manual_seed(seed)
    hit = (torch.rand(ids.shape, generator=draw) < noise) & (labels != lab.IGNORED)
    first, count = lab.MASK + 1, len(lab.SIGNS)
    shift = torch.randint(1, count, ids.shape, generator=draw)
    # An end is replaced by any sign but the first, a sign by any other one.
    others = first + (torch.where(ids >= first, ids - first, 0) + shift) % count
    return torch.where(hit, others, ids), hit


def _loss(
    arm: str,
    seed: int,
    history: Any,
    model: Any,
    ids: torch.Tensor,
    labels: torch.Tensor,
    step: int,
    steps: int,
) -> torch.Tensor:
    """The mean loss of the tokens that an arm learns from."""
    mask = labels[:, 1:] != lab.IGNORED
    if arm == "full":
        return _mean_nll(model, ids, labels)
    if arm == "random":
        kept = _random_share(mask, seed * 100_003 + step)
        return weighted_nll(lab.log_probs_of(model, ids), kept, mask, "weights")
    if arm == "rho-1":
        log_probs, past = lab.log_probs_of(model, ids), _frozen(history, ids)
        return rho1_loss(log_probs, past, mask, keep=KEEP)[0]
    if arm == "top-entropy":
        every = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        log_probs = every.gather(-1, ids[:, 1:, None])[..., 0]
        entropy = torch.special.entr(every.detach().exp()).sum(-1)
        return top_entropy_loss(log_probs, entropy, mask, keep=KEEP)[0]
    gamma = 0.0 if step < WARM_UP * steps else GAMMA
    return _selected(model, _frozen(history, ids), ids, labels, gamma)


def _selected(
    model: Any, past: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor, gamma: float
) -> torch.Tensor:
    """ssToken's loss."""
    log_probs, attention = scored(model, ids, labels)
    mask = labels[:, 1:] != lab.IGNORED
    return sstoken_loss(log_probs, past, attention, mask, gamma=gamma, keep=KEEP)[0]


def scored(
    model: Any, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and attention on the prompt: [batch, time - 1]."""
    with watching(model) as watch:
        log_probs = lab.log_probs_of(model, ids)
    learned = labels != lab.IGNORED
    real = (learned.flip(1).cumsum(1).flip(1) > 0).long()  # up to the answer's end
    return log_probs, watch.prompt_shares((real != 0) & ~learned, real)


@torch.no_grad()
def _frozen(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return lab.log_probs_of(model, ids)


def _random_share(mask: torch.Tensor, seed: int) -> torch.Tensor:
    """As many tokens of each answer as ssToken keeps, at random."""
    kept = torch.zeros_like(mask)
    budgets = rounded_up(mask.sum(1), KEEP)
    for budget in budgets.unique().tolist():
        rows = budgets == budget
        kept[rows] = random_tokens(mask[rows], budget, seed=seed)
    return kept


def _mean_nll(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    mask = labels[:, 1:] != lab.IGNORED
    return weighted_nll(lab.log_probs_of(model, ids), torch.ones_like(mask), mask)


@torch.no_grad()
def areas(
    model: Any, history: Any, ids: torch.Tensor, labels: torch.Tensor, noisy: torch.Tensor
) -> Unit:
    """How well each score tells clean tokens from noise, and how it follows the place."""
    log_probs, attention = scored(model, ids, labels)
    mask = labels[:, 1:] != lab.IGNORED
    rel = retrospective_excess_loss(log_probs, _frozen(history, ids), mask)
    clean = ~noisy[:, 1:][mask]
    found = {
        name: area(ss_scores(rel, attention, mask, gamma)[mask], clean)
        for name, gamma in SCORES.items()
    }
    number = (mask.cumsum(1) - 1)[mask].double()
    both = torch.stack([attention[mask].double(), number])
    kept = top_share(ss_scores(rel, attention, mask, GAMMA), KEEP, mask)
    tenths = dict(zip(TENTHS, kept_by_place(kept, mask).tolist(), strict=True))
    return {**found, "attention by place": torch.corrcoef(both)[0, 1].item(), **tenths}


def area(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """The chance that a positive scores above a negative, ties counting half.

    >>> area(torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([True, False, True, False]))
    0.875
    """
    values, places = np.unique(scores.numpy(), return_inverse=True)
    counts = np.zeros((2, len(values)))
    np.add.at(counts, (positive.numpy().astype(int), places.ravel()), 1)
    below = np.cumsum(counts[0]) - counts[0]
    wins = (counts[1] * (below + counts[0] / 2)).sum()
    return float(wins / (counts[0].sum() * counts[1].sum()))


def _judged(table: dict[tuple[str, float, str], list[float]]) -> list[Row]:
    """The rows with bars."""
    scores = table["sstoken", NOISE, "score"]
    own = table["sstoken", NOISE, "loss"]
    rows = [Row(AUC, sum(scores) / len(scores), "", baseline=_each(scores))]
    for metric, rival in ((OVER_FULL, "full"), (OVER_RANDOM, "random")):
        mean, error = lab.gap(table[rival, NOISE, "loss"], own)
        interval = (mean - 2 * error, mean + 2 * error)
        rows.append(
            Row(metric, interval[0], "nats per token", None, "", interval, f"mean {mean:.3g}")
        )
    return rows


def _told(table: dict[tuple[str, float, str], list[float]]) -> list[Row]:
    """Each score alone, what is kept where, and every arm as it is."""
    rows = []
    for name in (*list(SCORES)[1:], "attention by place"):
        values = table["sstoken", NOISE, name]
        told = "correlation" if name == "attention by place" else "area under the ROC curve"
        rows.append(
            Row(
                f"{name}: {told}, after a third of training",
                sum(values) / len(values),
                baseline=_each(values),
            )
        )
    for name in TENTHS:
        values = table["sstoken", NOISE, name]
        metric = f"tokens kept in {name} of the answers, after a third of training"
        rows.append(Row(metric, sum(values) / len(values), "share", baseline=_each(values)))
    for noise, label in ((NOISE, f"{NOISE:.0%} noise"), (0.0, "no noise")):
        for what, unit in (("loss", "nats per token"), ("accuracy", "points")):
            for arm in [arm for arm, own in SETTINGS if own == noise]:
                values = table[arm, noise, what]
                metric = f"{label}, {arm}: clean held-out {what}"
                rows.append(Row(metric, sum(values) / len(values), unit, baseline=_each(values)))
    for rival, noise in (*[(one, NOISE) for one in RIVALS], ("full", 0.0), ("random", 0.0)):
        mean, error = lab.gap(table[rival, noise, "loss"], table["sstoken", noise, "loss"])
        label = f"{NOISE:.0%} noise" if noise else "no noise"
        rows.append(
            Row(
                f"{label}, clean held-out loss, {rival} minus sstoken",
                mean,
                "nats per token",
                "up to +4.3 % over all tokens" if rival == "full" else None,
                "benchmarks, 3B to 14B" if rival == "full" else "",
                (mean - 2 * error, mean + 2 * error),
            )
        )
    return rows


def _step_times(*, smoke: bool) -> dict[str, Any]:
    """Seconds of a step of fine-tuning and of ssToken, by where the history's losses come from."""
    history = base_model(smoke)
    ids, labels = lab.encode(lab.sums(lab.BATCH, f"time {DEV_SEED}"))
    past = _frozen(history, ids)
    losses = {
        "full": lambda model: _mean_nll(model, ids, labels),
        "in each step": lambda model: _selected(model, _frozen(history, ids), ids, labels, GAMMA),
        "before training": lambda model: _selected(model, past, ids, labels, GAMMA),
    }
    found = step_times(history, losses, smoke=smoke)
    if not found["full"]:
        raise PertokenError(
            "no round of the step times was quiet: stop what else runs here, then run it again "
            "with --resume, which keeps the trainings"
        )
    return found


def _cost(times: dict[str, Any], seed: int) -> list[Row]:
    """Overhead of a step of ssToken over fine-tuning's."""
    return [
        speed_row(
            f"time of a step of ssToken over one of fine-tuning, history run {when}",
            times["full"],
            times[when],
            seed,
        )
        for when in ("in each step", "before training")
    ]


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{one:.3g}" for one in values)

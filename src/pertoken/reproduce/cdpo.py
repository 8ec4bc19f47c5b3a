"""Reproduction of critical-token DPO (arXiv 2411.19943) on models small enough to train here.

The paper has Llama-3 and DeepSeek-math on GSM8K and MATH. Here tiny Llamas learn sums of three
steps (`_worked_sums`) until they are right about half the time, and are then what the paper's
models are: they sample 64 answers to each of 1,500 training questions, two copies learn the right
and the wrong ones (`contrast_data`), and the pairs train the policy. All else is the library's own:
`rollout_scores`, `replaced`, `scored`, `token_dpo_loss`.

Three claims. (a) Wrong answers to new questions: with another token in the place of the critical
one they become right, against going on behind it and against another token in a random place of the
same answer. "Going on behind it" is sampled afresh, since the token was chosen for its zeros. A
random place may be behind the critical one, where little can be right by its definition (a row says
how often); a place drawn among those before it stands beside that, without a bar. (b) The
critical token is among the three lowest s_t, against rankings by entropy, by probability and by the
log ratio of the two copies. (c) Preference training that blames critical tokens against DPO,
against the released mean over positions, against TDPO, and, as a control, against the same weights
shuffled within each answer. Learning rates are chosen by the run itself on training seed 1000 and
its own problems, of the same three for every arm.

What was looked at before, all with training seed 1000. Ten wrong answers: eight critical tokens
were among the three lowest s_t, nine among the three of lowest probability. Preference training of
a policy that is right in 47.4 of 100: with 300 questions and 60 steps 44.4 (DPO) and 44.6 (cDPO) at
a rate of 3e-6, 21.2 and 33.8 at 1e-5, 2.0 and 29.6 at 3e-5; with β of 1 40 to 46 at all three; with
1,500 questions and the authors' three epochs 48.0 and 48.0 at 1e-6, 39.4 and 43.2 at 3e-6, 4.6 and
31.2 at 1e-5. So both do harm where they move the policy at all, DPO far more; the rates that are
tried were lowered for that, and β stayed the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pertoken._bootstrap import bootstrap_mean
from pertoken.reproduce import _own_answers as own
from pertoken.reproduce import _worked_sums as lab
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row
from pertoken.train import pass_at_k

VERSION = 1
MODEL = "tiny"
DTYPE = "float32"

RATES = (3e-7, 1e-6, 3e-6)
WRONG, SEEDS = 30, 5
DEV_SEED = 1000
LOWEST = 3
ARMS = ("dpo", "cdpo", "cdpo by position", "tdpo", "shuffled weights")

FIXED = "pass@64 with another token in the critical place less going on behind it, points"
CONTROL = "the same less another token in a random place, points"
FOUND = "critical tokens among the 3 lowest s_t, over chance"
GAIN = "accuracy, cDPO minus DPO: mean less 2 standard errors, points"
BARS = {FIXED: ">= 20", CONTROL: ">= 10", FOUND: ">= 2", GAIN: "> 0"}
REASONS = {
    GAIN: "not told apart: the interval has 0 inside. At the rate that the development seed chose "
    "for each, the lowest that was tried, both move the policy a little and alike; the highest "
    "harms both (settings). With the weights shuffled within each answer it does no harm, and "
    "accuracy rises most (its row): what helps here is not which tokens are blamed"
}

Unit = dict[str, Any]


def run(context: Context) -> Reproduction:
    """All rows; kept seed by seed, the development seed first."""
    smoke = context.smoke
    own_dev: dict[str, tuple[object, Callable[[], dict[str, float]]]] = {
        arm: (["dev", arm], partial(tried, arm, smoke=smoke)) for arm in ARMS
    }
    tries = context.remember_all(own_dev, "arms at three rates").values()
    dev = {name: value for one in tries for name, value in one.items()}
    rates = {arm: max(RATES, key=lambda rate: dev[f"{arm} {rate:g}"]) for arm in ARMS}
    seeds = [context.seed + place for place in range(1 if smoke else SEEDS)]
    units: dict[int, tuple[object, Callable[[], Unit]]] = {
        seed: ([seed], partial(one_seed, seed, rates, smoke=smoke)) for seed in seeds
    }
    found = list(context.remember_all(units, "seeds").values())
    return context.reproduction(
        [*_replacing(found, context.seed), *_ranking(found, context.seed), *_training(found)],
        base_examples=own.BASE_EXAMPLES,
        base_steps_at_most=own.BASE_STEPS,
        base_stops_at_accuracy=own.ENOUGH,
        base_learning_rate=own.BASE_RATE,
        layers=lab.LAYERS,
        hidden=lab.HIDDEN,
        questions=own.QUESTIONS,
        samples=own.SAMPLES,
        temperature=own.TEMPERATURE,
        copy_steps=own.COPY_STEPS,
        copy_learning_rate=own.COPY_RATE,
        dpo_epochs=own.EPOCHS,
        dpo_batch=own.DPO_BATCH,
        beta=own.BETA,
        learning_rates=rates,
        dev_accuracy=dev,
        wrong_answers=WRONG,
        training_seeds=seeds,
        test_problems=own.TEST,
        intervals="over the answers of all seeds; of accuracies 2 standard errors over seeds",
        chosen_on=f"training seed {DEV_SEED}, its own problems",
    )


def tried(arm: str, *, smoke: bool = False) -> dict[str, float]:
    """The accuracy of an arm at every rate, on the development seed's problems."""
    start = own.start(DEV_SEED, smoke)
    return {f"{arm} {rate:g}": start.accuracy(start.trained(arm, rate), "dev") for rate in RATES}


def one_seed(seed: int, rates: Mapping[str, float], *, smoke: bool = False) -> Unit:
    """Everything of a training seed: its wrong answers looked at, its policies trained."""
    start = own.start(seed, smoke)
    critical = start.critical(2 if smoke else WRONG)
    accuracy = {arm: start.accuracy(start.trained(arm, rates[arm]), "report") for arm in ARMS}
    return {
        "critical": critical,
        "accuracy": {"before": start.accuracy(start.policy, "report"), **accuracy},
        "pairs": len(start.pairs),
    }


def _replacing(units: Sequence[Unit], seed: int) -> list[Row]:
    """Claim (a): pass@n and the share that is right, for the three ways to go on."""
    every = [one for unit in units for one in unit["critical"]]
    rates = {
        way: [100 * pass_at_k(one["n"], one[way], one["n"]) for one in every]
        for way in ("behind", "instead", "random")
    }
    later = [one for one in every if one["before"] is not None]
    shares = {way: [100 * one[way] / one["n"] for one in every] for way in rates}
    names = {
        "behind": "going on behind the critical token",
        "instead": "another token in the critical place",
        "random": "another token in a random place",
    }
    rows = []
    for metric, one, other in ((FIXED, "instead", "behind"), (CONTROL, "instead", "random")):
        gaps = [a - b for a, b in zip(rates[one], rates[other], strict=True)]
        row = Row(
            metric,
            sum(gaps) / len(gaps),
            "points",
            interval=bootstrap_mean(gaps, seed),
            baseline=f"{len(gaps)} wrong answers",
        )
        rows.append(row)
    gaps = [100 * (pass_at_k(one["n"], one["instead"], one["n"]) - _earlier(one)) for one in later]
    behind = sum(one["other"] > one["place"] for one in every) / len(every)
    rows += [
        Row(
            "the same less another token in a random place before the critical one, points",
            sum(gaps) / len(gaps) if gaps else math.nan,
            "points",
            interval=bootstrap_mean(gaps, seed) if gaps else None,
            baseline=f"{len(gaps)} wrong answers",
        ),
        Row("random places behind the critical one", behind, "share"),
    ]
    for label, table in (("pass@64", rates), ("right", shares)):
        for way, name in names.items():
            mean = sum(table[way]) / len(every)
            interval = bootstrap_mean(table[way], seed)
            rows.append(Row(f"{name}: {label}", mean, "points", interval=interval))
    return rows


def _earlier(one: Unit) -> float:
    """pass@n with another token in a place before the critical one."""
    return float(pass_at_k(one["n"], one["earlier"], one["n"]))


def _ranking(units: Sequence[Unit], seed: int) -> list[Row]:
    """Claim (b): how often the critical token is among the lowest, over chance."""
    every = [one for unit in units for one in unit["critical"]]
    chance = sum(min(1.0, LOWEST / one["length"]) for one in every) / len(every)
    rows = []
    for rival in ("log ratio", "probability"):
        gaps = [
            float(one["ranks"]["s_t"] < LOWEST) - float(one["ranks"][rival] < LOWEST)
            for one in every
        ]
        metric = f"critical tokens among the 3 first by s_t minus by {rival}"
        rows.append(
            Row(metric, sum(gaps) / len(gaps), "share", interval=bootstrap_mean(gaps, seed))
        )
    for name in ("s_t", "log ratio", "probability", "entropy"):
        hits = [float(one["ranks"][name] < LOWEST) / chance for one in every]
        metric = (
            FOUND if name == "s_t" else f"critical tokens among the 3 first by {name}, over chance"
        )
        interval = bootstrap_mean(hits, seed)
        rows.append(
            Row(
                metric,
                sum(hits) / len(hits),
                "",
                interval=interval,
                baseline=f"chance {chance:.3f}",
            )
        )
    return rows


def _training(units: Sequence[Unit]) -> list[Row]:
    """Claim (c): accuracies of all arms, and cDPO against each."""
    table = {arm: [unit["accuracy"][arm] for unit in units] for arm in ("before", *ARMS)}
    rows = []
    for rival in ("dpo", *ARMS[2:], "before"):
        mean, error = lab.gap(table["cdpo"], table[rival])
        interval = (mean - 2 * error, mean + 2 * error)
        judged = rival == "dpo"
        metric = GAIN if judged else f"accuracy, cDPO minus {rival}, points"
        rows.append(
            Row(
                metric,
                interval[0] if judged else mean,
                "points",
                None,
                "",
                interval,
                f"mean {mean:.3g}",
            )
        )
    rows += [
        Row(
            f"accuracy, {arm}",
            sum(values) / len(values),
            "points",
            baseline=", ".join(f"{one:.3g}" for one in values),
        )
        for arm, values in table.items()
    ]
    pairs = [unit["pairs"] for unit in units]
    rows.append(Row("pairs to train on", sum(pairs) / len(pairs)))
    return rows

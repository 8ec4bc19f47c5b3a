"""Reproduction of cautious next token prediction (arXiv 2507.03038) on two small models.

GSM8K, report half: greedy, beam search, sampling, self-consistency, the method, the method under
self-consistency, and its ablations (six trials everywhere, few trials where unsure, whole answers).
Temperature 1.2 and top-p 0.9 as in the paper; three draws for self-consistency, where the paper has
forty, and three beams, where it has five. Models of this size solve next to none of these problems,
so accuracy hardly tells methods apart, and only the paper's two headline comparisons have a bar;
beside it stands the share of the equations in a text that are right (ours), which does tell. Both
models get the same two worked examples, and an answer is one line of at most 96 tokens; a row says
how many were cut there. The method commits what has the lowest perplexity, so that its texts have
less than sampling's is by construction: what that costs in variety is the other half of that bar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pertoken._bootstrap import bootstrap, bootstrap_mean, bootstrap_ratio
from pertoken.decode.consistency import majority
from pertoken.loading import model_folder
from pertoken.reproduce._bars import of_each
from pertoken.reproduce._cautious_units import (
    BEAMS,
    DRAWS,
    METHODS,
    NEW_TOKENS,
    SAMPLED,
    SHOTS,
    Models,
    Question,
    Unit,
    measure,
    questions,
)
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row

VERSION = 2  # 1 did not round differences of shares, where a 0 can come out below 0
DTYPE = "float32"
SECOND = "gemma3-270m"  # its terms must have been accepted: PERTOKEN_ACCEPT_LICENCE=gemma3-270m
QUESTIONS = 100
CHUNK = 4  # questions at once; on the first ones sampling is held against trials without any
CONSISTENT = ("sampling", "cntp")  # under self-consistency too
ADAPTIVE = ("cntp", "fixed trials", "inverted trials", "whole answers")
COUNTED = ("uncertain", "places", "trials", "span_tokens", "rows", "new_tokens", "forwards")
"""Figures that a chunk of questions has together."""

_BARS = {
    "questions": ">= 100",
    "without trials: same texts as sampling": ">= 1",
    "accuracy: cntp minus greedy": ">= 0",
    "accuracy: cntp minus sampling": ">= 0",
    "equations right: cntp minus sampling": "> 0",
    "perplexity under the model: sampling over cntp": "> 1",
    "distinct pairs over three draws: cntp over sampling": ">= 0.7",
}
LABELS = {"first": "", "second": ", Gemma-3-270M"}
BARS = of_each(LABELS, _BARS)
_FLOOR = "next to nothing is solved by any method (rows), so that accuracy tells none apart"
REASONS: dict[str, str] = dict.fromkeys(
    ("accuracy: cntp minus greedy", "accuracy: cntp minus sampling"),
    f"{_FLOOR}: the interval has 0 inside",
) | {
    f"accuracy: cntp minus sampling{LABELS['second']}": (
        f"{_FLOOR}; as many answers are right with both: what is left of their shares of three "
        "draws is rounding, which a rerun with the figure rounded would not show"
    ),
}
_CAVEATS = {
    "without trials: same texts as sampling": (
        f"of {CHUNK} questions, as many draws as self-consistency has"
    ),
    "equations right: cntp minus sampling": (
        "greedy decoding and beam search have more of them right (rows), and the paper's accuracy "
        "has the method ahead of greedy"
    ),
    "perplexity under the model: sampling over cntp": (
        "by construction: of several texts the one with the least is committed"
    ),
    "distinct pairs over three draws: cntp over sampling": "the interval has the bar inside",
}
CAVEATS = of_each(LABELS, _CAVEATS) | {f"accuracy: cntp minus greedy{LABELS['second']}": _FLOOR}

_LLAMA = "Llama-3.1-8B-Instruct, GSM8K"
_OTHERWISE = {  # than here
    "beam": ", 5 beams",
    "whole answers": ", 2 of them",
    "self-consistency, sampling": ", 40 draws",
    "self-consistency, cntp": ", 40 draws",
}
PAPER: dict[str, float] = {  # accuracy
    "greedy": 0.798,
    "beam": 0.823,
    "sampling": 0.794,
    "cntp": 0.816,
    "fixed trials": 0.811,
    "inverted trials": 0.812,
    "whole answers": 0.792,
    "self-consistency, sampling": 0.848,
    "self-consistency, cntp": 0.852,
}
SMOKE = [
    {"question": f"{n} and 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"}
    for n in range(6)
]
Floats = NDArray[np.float64]


def run(context: Context) -> Reproduction:
    """All rows; hours on two slow cores, kept question by question."""
    if not context.smoke:
        model_folder(SECOND)  # a licence or network that is missing is said before the first hour
    asked = questions(context.data("gsm8k", smoke_rows=SMOKE), 2 if context.smoke else QUESTIONS)
    asked.sort(key=lambda question: len(question.prompt))  # like lengths together: less padding
    models = Models(context, SECOND)
    tokens = 6 if context.smoke else NEW_TOKENS
    chunks = [asked[place : place + CHUNK] for place in range(0, len(asked), CHUNK)]
    found = context.remember_all(
        {
            (which, place): (
                [which, chunk[0].number, len(chunk)],
                partial(
                    measure, models, which, chunk, context.seed, check=place == 0, tokens=tokens
                ),
            )
            for which in LABELS
            for place, chunk in enumerate(chunks)
        },
        "questions",
    )
    rows: list[Row] = []
    for which, label in LABELS.items():
        units = [unit for place in range(len(chunks)) for unit in found[which, place]]
        rows += _table(units, asked, label, context.seed) + _judged(
            units, asked, label, context.seed
        )
    return context.reproduction(
        rows,
        second_model=SECOND,
        questions=len(asked),
        split="report: odd rows of the test set; worked examples from even ones",
        worked_examples=SHOTS,
        draws=DRAWS,
        beams=BEAMS,
        max_new_tokens=tokens,
        sampled=SAMPLED,
        ends_text="the end of the line",
    )


def accuracies(units: Sequence[Unit], asked: Sequence[Question]) -> dict[str, list[float]]:
    """Method -> share of right answers per question; of a vote it is 0 or 1."""
    found = {name: [float(unit[name]["right"]) for unit in units] for name in METHODS}
    for name in CONSISTENT:
        votes = [majority(unit[name]["answers"]) for unit in units]
        right = [float(v == question.answer) for v, question in zip(votes, asked, strict=True)]
        found[f"self-consistency, {name}"] = right
    return found


def _table(units: Sequence[Unit], asked: Sequence[Question], label: str, seed: int) -> list[Row]:
    """Every figure of every method."""
    rows = [
        Row(
            f"accuracy: {name}{label}",
            float(np.mean(values)),
            "share",
            PAPER[name],
            _LLAMA + _OTHERWISE.get(name, ""),
            bootstrap_mean(values, seed),
        )
        for name, values in accuracies(units, asked).items()
    ]
    ratios: dict[str, tuple[str, str, tuple[str, ...]]] = {
        "equations right": ("equations_right", "equations", METHODS),
        "tokens a text": ("length", "", METHODS),
        f"texts cut at {NEW_TOKENS} tokens": ("cut", "", METHODS),
        "texts without a token": ("empty", "", METHODS),
        "distinct pairs of tokens in a text": ("distinct", "", METHODS),
        "repeated 4-grams": ("repeated", "", METHODS),
        "share of uncertain places": ("uncertain", "places", ADAPTIVE),
        "trials at an uncertain place": ("trials", "uncertain", ADAPTIVE),
        "mean committed length": ("span_tokens", "uncertain", ADAPTIVE),
        "rows read for each new token": ("rows", "new_tokens", ADAPTIVE),
        "forwards for each new token, all draws of four questions": (
            "forwards",
            "new_tokens",
            ("cntp",),
        ),
    }
    for figure, (top, bottom, methods) in ratios.items():
        for name in methods:
            some = units[::CHUNK] if top in COUNTED else units
            if top == "distinct":  # of an empty text it can't be told
                some = [unit for unit in units if not math.isnan(unit[name]["distinct"])]
            tops = [float(unit[name][top]) for unit in some]
            bottoms = [float(unit[name][bottom]) if bottom else 1.0 for unit in some]
            rows.append(
                Row(
                    f"{figure}: {name}{label}",
                    _ratio(np.array(tops), np.array(bottoms)).item(),
                    "tokens" if figure in ("tokens a text", "mean committed length") else "",
                    interval=bootstrap_ratio(tops, bottoms, seed),
                )
            )
    for name in METHODS:
        losses, counts = _losses(units, name)
        rows.append(
            Row(
                f"perplexity under the model: {name}{label}",
                _perplexity(np.array(losses), np.array(counts)).item(),
                interval=bootstrap(_perplexity, losses, counts, seed=seed),
            )
        )
    return rows


def _judged(units: Sequence[Unit], asked: Sequence[Question], label: str, seed: int) -> list[Row]:
    """The rows with bars."""
    checked = [float(unit["same"]) for unit in units if "same" in unit]
    same = "without trials: same texts as sampling"
    rows = [
        Row(f"questions{label}", float(len(units)), paper=1319, paper_setting=_LLAMA),
        Row(f"{same}{label}", float(np.mean(checked)), "share of questions"),
    ]
    right = accuracies(units, asked)
    solved = [max(own) > 0 for own in zip(*right.values(), strict=True)]
    rows.append(Row(f"questions that some method solves{label}", float(sum(solved))))
    pairs = [("cntp", other) for other in ("greedy", "sampling", *ADAPTIVE[1:])]
    pairs.append(("self-consistency, cntp", "self-consistency, sampling"))
    for first, second in pairs:
        more = [a - b for a, b in zip(right[first], right[second], strict=True)]
        name = f"{first} minus {second}"
        if "consistency" in first:
            name = "self-consistency, cntp minus sampling"
        rows.append(
            Row(
                f"accuracy: {name}{label}",
                round(float(np.mean(more)), 12),
                "share",
                round(PAPER[first] - PAPER[second], 3),
                _LLAMA + _OTHERWISE.get(second, ""),
                bootstrap_mean(more, seed),
                float(np.mean(right[second])),
            )
        )
    columns = [
        [float(unit[name][key]) for unit in units]
        for name in CONSISTENT[::-1]
        for key in ("equations_right", "equations")
    ]
    rows.append(
        _row("equations right: cntp minus sampling", _difference, columns, label, seed, "share")
    )
    losses = [column for name in CONSISTENT for column in _losses(units, name)]
    metric = "perplexity under the model: sampling over cntp"
    rows.append(_row(metric, _times, losses, label, seed, "x"))
    columns = [
        [float(unit[name][key]) for unit in units]
        for name in CONSISTENT[::-1]
        for key in ("distinct_pairs", "pairs")
    ]
    metric = "distinct pairs over three draws: cntp over sampling"
    rows.append(_row(metric, _ratio_of_ratios, columns, label, seed, "x"))
    return rows


def _row(
    metric: str,
    statistic: Callable[..., Floats],
    columns: Sequence[Sequence[float]],
    label: str,
    seed: int,
    unit: str,
) -> Row:
    here = statistic(*(np.array(column) for column in columns)).item()
    interval = bootstrap(statistic, *columns, seed=seed)
    return Row(metric + label, here, unit, interval=interval)


def _losses(units: Sequence[Unit], name: str) -> tuple[list[float], list[float]]:
    """Nats, and the tokens they are of, per question."""
    return [u[name]["loss"] for u in units], [float(u[name]["rated"]) for u in units]


def _ratio(top: Floats, bottom: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(top.sum(-1) / bottom.sum(-1))


def _perplexity(losses: Floats, counts: Floats) -> Floats:
    return np.exp(_ratio(losses, counts))


def _times(a: Floats, b: Floats, c: Floats, d: Floats) -> Floats:
    return np.asarray(_perplexity(a, b) / _perplexity(c, d))


def _ratio_of_ratios(a: Floats, b: Floats, c: Floats, d: Floats) -> Floats:
    return np.asarray(_ratio(a, b) / _ratio(c, d))


def _difference(a: Floats, b: Floats, c: Floats, d: Floats) -> Floats:
    return np.asarray(_ratio(a, b) - _ratio(c, d))

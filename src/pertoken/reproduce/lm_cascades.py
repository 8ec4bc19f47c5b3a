"""Reproduction of Language Model Cascades (arXiv 2404.10136): whom to believe, on two pairs.

The real pair: SmolLM2-135M answers first and Gemma-3-270M is deferred to, on the questions of
`_cascade_tasks`. Rules are fitted, and the quantile and the deferral thresholds chosen, on one half
of the questions (development); curves, areas and rates are of the other half. The paper's pair is
FLAN-T5 Base and Large on classification, question answering and translation.

The synthetic pair has an accuracy that is known question by question: the small model is right with
the chance of its least sure token, and the large one always with the same chance. So the best
possible curve is known, and a rule's share of it can be told. Its answers vary in length, and
length says next to nothing about them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np

from pertoken._bootstrap import bootstrap, bootstrap_mean
from pertoken.decode import deferral
from pertoken.decode._deferral_rule import Rule
from pertoken.decode._pairs import Pair, Quality, exact_match
from pertoken.decode.answers import Answer
from pertoken.decode.cascade import Cascade
from pertoken.decode.deferral import DeferralCurves, deferral_curves
from pertoken.reproduce._cascade_tasks import SMOKE, STOP, TASK, questions
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row

VERSION = 1
DTYPE = "float32"
SECOND = "gemma3-270m"  # its terms must have been accepted: PERTOKEN_ACCEPT_LICENCE=gemma3-270m
COUNT = 400  # questions of each half
CHUNK = 16  # questions of a unit
NEW_TOKENS = 40
RULES = (
    "chow-sum",
    "chow-average",
    "chow-quantile",
    "post-hoc-quantile",
    "post-hoc-embed-1",
    "post-hoc-embed-1+2",
)
RATES = tuple(place / 10 for place in range(1, 10))
SYNTHETIC = 5000  # questions of each half
LARGE = 0.7  # chance that the large model of the synthetic pair is right

_REAL, _SYNTHETIC = "real pair", "synthetic pair"
_MEAN = "deferral rate, mean distance from the one asked"
_GREATEST = "deferral rate, greatest distance from the one asked"
BARS = {
    f"{_REAL}: length bias, chow-sum minus chow-average": "> 0",
    f"{_REAL}: area, chow-sum minus random": "> 0",
    f"{_REAL}: area, chow-quantile minus chow-sum": "> 0",
    f"{_REAL}: area, post-hoc-quantile minus chow-sum": "> 0",
    f"{_REAL}: {_MEAN}, post-hoc-quantile": "<= 0.03",
    f"{_SYNTHETIC}: length bias, chow-sum": ">= 0.1",
    f"{_SYNTHETIC}: length bias, chow-average": "<= -0.1",
    f"{_SYNTHETIC}: area, chow-sum minus random": "> 0",
    f"{_SYNTHETIC}: area, chow-quantile minus chow-sum": "> 0",
    f"{_SYNTHETIC}: area, post-hoc-quantile minus chow-sum": "> 0",
    f"{_SYNTHETIC}: share of the best possible gain over random, post-hoc-quantile": ">= 0.9",
    f"{_SYNTHETIC}: {_GREATEST}, post-hoc-quantile": "<= 0.03",
}
REASONS: dict[str, str] = {
    f"{_REAL}: area, post-hoc-quantile minus chow-sum": (
        "not told apart: the interval has 0 inside. The synthetic pair says nothing about this "
        "one, for its small model is right with the chance of a quantile. Rules that see "
        "embeddings too lie above both (not tested by pairs); the one that reads early layers of "
        "the large model falls below random deferral once they are charged (its row)"
    ),
}
_MADE = (
    "so by construction: the small model was made right with the chance of its least sure token, "
    "which is one of the quantiles"
)
_UNSURE_ONE = "so by construction: answers have one unsure token each, and the others say nothing"
CAVEATS: dict[str, str] = {
    f"{_REAL}: {_MEAN}, post-hoc-quantile": (
        "a mean over rates from 10 to 90 %: with 400 questions to set the threshold by, the one "
        "furthest off is more than 3 points away (row of the greatest distance)"
    ),
    f"{_REAL}: area, chow-quantile minus chow-sum": ("not told apart: the interval has 0 inside"),
    f"{_REAL}: length bias, chow-sum minus chow-average": (
        "so for any answers, noise too: the sum is the average times the length. The quantile "
        "rules are as biased as the average here (their rows)"
    ),
    "synthetic pair: area, chow-quantile minus chow-sum": _MADE,
    "synthetic pair: area, post-hoc-quantile minus chow-sum": _MADE,
    "synthetic pair: share of the best possible gain over random, post-hoc-quantile": _MADE,
    "synthetic pair: length bias, chow-sum": _UNSURE_ONE,
    "synthetic pair: length bias, chow-average": _UNSURE_ONE,
}

PAPER = {  # FLAN-T5 Base and Large, MNLI: area and what it is over random deferral
    "chow-sum": "0.627 (-2.63 %)",
    "chow-average": "0.642 (-0.31 %)",
    "post-hoc-quantile": "0.711 (+10.4 %)",
    "post-hoc-embed-1+2": "0.722 (+12.24 %)",
}


def run(context: Context) -> Reproduction:
    """All rows; the real pair's answers are kept chunk by chunk."""
    data = context.data(TASK, smoke_rows=SMOKE)
    count = 24 if context.smoke else COUNT
    models = _Models(context)
    units = {}
    for split in ("dev", "report"):
        asked = questions(data, split, count)
        for start in range(0, len(asked), CHUNK):
            chunk = asked[start : start + CHUNK]
            units[split, start] = ([split, start], partial(_unit, models, chunk))
    found = context.remember_all(units, "questions")
    halves: dict[str, list[Pair]] = {"dev": [], "report": []}
    overheads = []
    for (split, _), unit in found.items():
        halves[split] += [_pair(row) for row in unit["rows"]]
        overheads.append(unit["overhead"])
    overhead = {"post-hoc-embed-1+2": float(np.mean(overheads))}
    rows = [
        Row(f"{_REAL}: {role} model's quality", float(np.mean(values)), interval=_mean(values))
        for role, values in (
            ("small", [pair.small_quality or 0.0 for pair in halves["report"]]),
            ("large", [pair.large_quality or 0.0 for pair in halves["report"]]),
        )
    ]
    rows += _rows(_REAL, halves["dev"], halves["report"], RULES, overhead, context.seed)
    size = 200 if context.smoke else SYNTHETIC
    made = [_synthetic(size, context.seed + number) for number in (1, 2)]
    rows += _rows(_SYNTHETIC, made[0], made[1], RULES[:4], {}, context.seed)
    rows += _best_possible(made[0], made[1], context.seed)
    return context.reproduction(
        rows,
        second_model=SECOND,
        task=TASK,
        questions=COUNT,
        max_new_tokens=NEW_TOKENS,
        synthetic={"questions": SYNTHETIC, "large": LARGE},
        split="fitted on dev, reported on report",
    )


class _Models:
    """The cascade whose rule reads all there is to read, made when a unit needs it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._cascade: Cascade | None = None

    def cascade(self) -> Cascade:
        """Both models, with a rule that reads all layers that any rule reads."""
        if self._cascade is None:
            small, large = self._context.load(), self._second()
            settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "stop": STOP, "chat": False}
            if self._context.smoke:
                settings["max_new_tokens"] = 3
            self._cascade = Cascade(small, large, "post-hoc-embed-1+2", **settings)
        return self._cascade

    def quality(self) -> Quality:
        """Exact match; in a smoke run, where nothing is ever right, a lot."""
        return _lot if self._context.smoke else exact_match

    def _second(self) -> tuple[Any, Any]:
        if self._context.smoke:
            from pertoken.testing import tiny_model

            _, tokenizer = self._context.load()
            return tiny_model("gemma3", vocab_size=len(tokenizer), seed=1), tokenizer
        from pertoken.loading import load

        device, dtype = self._context.device, self._context.dtype
        return load(SECOND, device=device, dtype=dtype, kind="decoder")


def _lot(text: str, reference: str) -> float:
    return float(sha256(f"{text} {reference}".encode("utf-8", "replace")).digest()[0] % 2)


def _unit(models: _Models, chunk: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Both models' answers to some questions, plain."""
    cascade = models.cascade()
    prompts, references = [each for each, _ in chunk], [each for _, each in chunk]
    pairs = cascade.answer(prompts, references, quality=models.quality())
    rows = [
        {
            "prompt": pair.prompt,
            "text": pair.small.text,
            "large_text": pair.large.text if pair.large else "",
            "logprobs": pair.small.logprobs,
            "state": [round(each, 3) for each in pair.small.state],
            "early": [float(f"{each:.4g}") for each in pair.early],
            "small": pair.small_quality,
            "large": pair.large_quality,
        }
        for pair in pairs
    ]
    return {"rows": rows, "overhead": cascade.overhead(pairs)}


def _pair(row: dict[str, Any]) -> Pair:
    small = Answer(row["text"], tuple(row["logprobs"]), tuple(row["state"]))
    large = Answer(row["large_text"])
    return Pair(row["prompt"], small, large, row["small"], row["large"], tuple(row["early"]))


def _rows(
    name: str,
    dev: Sequence[Pair],
    report: Sequence[Pair],
    rules: Sequence[str],
    overhead: dict[str, float],
    seed: int,
) -> list[Row]:
    """Areas, length bias and deferral rates of rules that were fitted on `dev`."""
    fitted = {rule: Rule(rule, seed=seed) for rule in rules}
    for rule in fitted.values():
        rule.fit(dev)
    scores = {rule: one.scores(report) for rule, one in fitted.items()}
    small = [pair.small_quality or 0.0 for pair in report]
    large = [pair.large_quality or 0.0 for pair in report]
    lengths = [len(pair.small.logprobs) for pair in report]
    curves = deferral_curves(scores, small, large, lengths=lengths, overhead=overhead, seed=seed)
    paper = PAPER if name == _REAL else {}
    rows = [
        Row(
            f"{name}: area, {rule}",
            curves.area(rule),
            paper=paper.get(rule),
            paper_setting="FLAN-T5 Base and Large, MNLI" if rule in paper else "",
            interval=curves.areas[rule][1],
            why=f"quantile {fitted[rule].alpha:g}" if rule == "chow-quantile" else "",
        )
        for rule in curves.areas
    ]
    rows += [
        Row(f"{name}: area charged for the early layers, {rule}", curves.charged(rule))
        for rule in overhead
    ]
    rows += _length_bias(name, curves)
    straight = [0.0] * len(report)
    for first, second in (
        ("chow-sum", "random"),
        ("chow-quantile", "chow-sum"),
        ("post-hoc-quantile", "chow-sum"),
        ("post-hoc-quantile", "chow-average"),
    ):
        pair = (scores[first], scores.get(second, straight))
        difference = partial(_difference, pair=pair, small=small, large=large)
        places = [float(place) for place in range(len(report))]
        rows.append(
            Row(
                f"{name}: area, {first} minus {second}",
                float(difference(np.array([places]))[0]),
                interval=bootstrap(difference, places, seed=seed),
            )
        )
    return rows + _rates(name, fitted, report, scores)


def _length_bias(name: str, curves: DeferralCurves) -> list[Row]:
    bias = {rule: float(value or 0.0) for rule, value in curves.length_bias.items()}
    rows = [
        Row(f"{name}: length bias, {rule}", value, "rank correlation")
        for rule, value in bias.items()
        if rule != "random"
    ]
    metric = f"{name}: length bias, chow-sum minus chow-average"
    return [*rows, Row(metric, bias["chow-sum"] - bias["chow-average"], "rank correlation")]


def _rates(
    name: str, fitted: dict[str, Rule], report: Sequence[Pair], scores: dict[str, list[float]]
) -> list[Row]:
    """How far the share deferred is from the one asked for."""
    rows = []
    for rule in ("chow-sum", "post-hoc-quantile"):
        distances = [
            abs(float(np.mean(fitted[rule].defers(report, scores[rule], rate))) - rate)
            for rate in RATES
        ]
        rows.append(Row(f"{name}: {_MEAN}, {rule}", float(np.mean(distances)), "share"))
        rows.append(Row(f"{name}: {_GREATEST}, {rule}", max(distances), "share"))
    return rows


def _difference(picks: Any, pair: Any, small: Sequence[float], large: Sequence[float]) -> Any:
    first, second = (deferral._areas(picks, scores, small, large) for scores in pair)
    return first - second


def _mean(values: Sequence[float]) -> tuple[float, float]:
    return bootstrap_mean(values)


def _synthetic(count: int, seed: int) -> list[Pair]:
    """Questions of a pair of known accuracy.

    An answer has 1 to 60 tokens: one of a chance that is uniform in 0 … 1, at a random place, and
    others of log-probability −0.05 on average. The small model is right with the chance of its
    least sure token, the large one with chance `LARGE`.
    """
    draw = np.random.default_rng(seed)
    pairs = []
    for place in range(count):
        logprobs = -draw.exponential(0.05, int(draw.integers(1, 61)))
        logprobs[int(draw.integers(len(logprobs)))] = np.log(draw.uniform(1e-6, 1))
        right = (float(draw.random() < _chance(logprobs)), float(draw.random() < LARGE))
        answer = Answer("", tuple(logprobs.tolist()))
        pairs.append(Pair(f"{seed} {place}", answer, Answer(""), *right))
    return pairs


def _chance(logprobs: Any) -> float:
    return float(np.exp(min(logprobs)))


def _best_possible(dev: Sequence[Pair], report: Sequence[Pair], seed: int) -> list[Row]:
    """The share of what deferring by the chances themselves would gain over random deferral."""
    rows = []
    for name in ("chow-sum", "post-hoc-quantile"):
        rule = Rule(name, seed=seed)
        rule.fit(dev)
        # Judged by the chances themselves, so that no luck of single answers is in it.
        chance = [_chance(pair.small.logprobs) for pair in report]
        area = deferral.deferral_area(rule.scores(report), chance, [LARGE] * len(report))
        best = deferral.deferral_area(chance, chance, [LARGE] * len(report))
        straight = (float(np.mean(chance)) + LARGE) / 2
        metric = f"{_SYNTHETIC}: share of the best possible gain over random, {name}"
        rows.append(Row(metric, (area - straight) / (best - straight), "share"))
    return rows

"""Reproduction of exact byte-level probabilities (arXiv 2410.09303) on two small models.

Proof of exactness by brute force; the next byte at random cut points against token healing and the
token model asked naively; code lines cut inside a token; what scoring and sampling cost; and an
ensemble of two models with different vocabularies. Texts and cut points are chosen by rule, see
`_byte_texts`. Neither model has fill-in-the-middle tokens, so of the paper's infilling task there
is the part that the byte model mends: the rest of a line behind a prompt cut inside a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from pertoken._bootstrap import bootstrap, bootstrap_ratio
from pertoken.reproduce._byte_texts import SMOKE_CODE, SMOKE_PROSE, Split, Text, code, cuts, prose
from pertoken.reproduce._byte_units import (
    CONTENDERS,
    Models,
    Unit,
    brute_force_error,
    chain_error,
    guess,
    line,
    log_probs,
    sampling,
    steps_error,
    token_score,
)
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row

VERSION = 1
DTYPE = "float32"
SECOND = "gemma3-270m"  # its terms must have been accepted: PERTOKEN_ACCEPT_LICENCE=gemma3-270m
GUESSES = {  # texts, and cuts in each
    ("first", "prose"): (90, 3),
    ("first", "code"): (82, 2),
    ("second", "prose"): (40, 2),
    ("second", "code"): (30, 1),
}
LINES = 82
SCORED = {"dev": 10, "report": 30}  # texts of each kind for the ensemble
SCORED_BYTES = 200
TIMED = 8
SAMPLED = {"prompts": 4, "bytes": 64}
WEIGHTS = [n / 20 for n in range(1, 20)]

BARS = {
    "brute force, validity renormalize: greatest error": "<= 1e-10",
    "brute force, validity truncate: greatest error": "<= 1e-10",
    "brute force, validity off: greatest error": "<= 1e-10",
    "chain rule over 257 outcomes: greatest relative error": "<= 1e-6",
    "chain rule over 257 outcomes: greatest relative error, Gemma-3-270M": "<= 1e-6",
    "next byte right, prose: byte model minus token healing": "> 0",
    "next byte right, prose: token healing minus naive": "> 0",
    "next byte right, code: byte model minus token healing": "> 0",
    "next byte right, code: token healing minus naive": "> 0",
    "rest of a code line cut inside a token: byte model minus naive": "> 0",
    "scoring: seconds over the token model's": "<= 3",
    "sampling: tokens through the model per byte": "<= 1.3",
    "ensemble with Gemma-3-270M, prose: bits per byte over the better member": "< 1",
}
REASONS = {
    "scoring: seconds over the token model's": (
        "every beginning of a text ends in tokens of its own, which go through the model beside "
        "the text's, and what may follow each is looked up on top; the interval reaches below 3"
    )
}
_SECOND_ALIKE = "on the second model not told apart from 0 (its row)"
CAVEATS: dict[str, str] = {
    "rest of a code line cut inside a token: byte model minus naive": (
        "every cut is inside a token, where the naive prompt cannot go on; against token healing "
        "it is not told apart from 0 (its row)"
    ),
    "next byte right, prose: byte model minus token healing": _SECOND_ALIKE,
    "next byte right, code: byte model minus token healing": _SECOND_ALIKE,
    "sampling: tokens through the model per byte": ("per byte: a token of text takes several"),
}

Choose = Callable[[Split, int], list[Text]]


def run(context: Context) -> Reproduction:
    """All rows; about forty minutes on two slow cores, half of it with two jobs."""
    models = Models(context, SECOND)
    texts: dict[str, Choose] = {
        "prose": partial(prose, context.data("gsm8k", smoke_rows=SMOKE_PROSE)),
        "code": partial(code, context.data("humaneval", smoke_rows=SMOKE_CODE)),
    }
    found = _units(context, models, texts)
    result = _exact_rows(context, models, texts)
    result += _guess_rows(context, found, "first", "")
    result += _line_rows(context, found["line", "first", "code", "report"])
    result += _cost_rows(context, models, texts["prose"])
    result += _ensemble_rows(context, found)
    result += _guess_rows(context, found, "second", ", Gemma-3-270M")
    return context.reproduction(
        result,
        second_model=SECOND,
        texts_and_cuts={" ".join(key): list(value) for key, value in GUESSES.items()},
        lines=LINES,
        scored=SCORED,
        scored_bytes=SCORED_BYTES,
        sampled=SAMPLED,
        split="report: odd numbers of GSM8K's test questions (prose) and of HumanEval (code)",
        weight="of the ensemble, chosen on dev: even numbers",
        cuts="random bytes that begin a character; in code within the solution",
    )


Found = Mapping[tuple[str, str, str, str], Mapping[int, Any]]


def _units(context: Context, models: Models, texts: Mapping[str, Choose]) -> Found:
    """All that is counted, not timed: (what, model, kind, split) -> text's number -> unit."""
    units: dict[tuple[str, str, str, str, int], tuple[object, Callable[[], Any]]] = {}

    def add(what: str, which: str, text: Text, split: str, compute: Callable[[], Any]) -> None:
        name = (what, which, text.kind, split, text.number)
        units[name] = (list(name), compute)

    few = 1 if context.smoke else None
    for (which, kind), (wanted, each) in GUESSES.items():
        for text in texts[kind]("report", few or wanted):
            places = cuts(text, few or each, context.seed)
            add("guess", which, text, "report", partial(guess, models, which, text, places))
    for text in texts["code"]("report", few or LINES):
        add("line", "first", text, "report", partial(line, models, text, context.seed))
    splits: tuple[Split, ...] = ("dev", "report")
    most = 24 if context.smoke else SCORED_BYTES
    for choose in texts.values():
        for split in splits:
            for text in choose(split, few or SCORED[split]):
                for which in ("first", "second"):
                    run_one = partial(log_probs, models, which, text, most)
                    add("score", which, text, split, run_one)

    found: dict[tuple[str, str, str, str], dict[int, Any]] = {}
    for name, value in context.remember_all(units, "texts").items():
        found.setdefault(name[:4], {})[name[4]] = value
    return found


def _exact_rows(context: Context, models: Models, texts: Mapping[str, Choose]) -> list[Row]:
    rows = [
        Row(
            f"brute force, validity {validity}: greatest error",
            brute_force_error(validity, 2 if context.smoke else 5, context.seed),
            "p",
            why="a tokenizer of six tokens, all texts of up to 5 letters, float64",
        )
        for validity in ("renormalize", "truncate", "off")
    ]
    few = 1 if context.smoke else 2
    chosen = [text for choose in texts.values() for text in choose("report", few)]
    tails = [text.data[: cuts(text, 1, context.seed)[0]][-24:] for text in chosen]
    beginnings = [tail.decode(errors="ignore").encode() for tail in tails]
    beginnings.append("A cut inside a character: caf\u00e9".encode()[:-1])
    short = chosen[0].data[:24]
    for which, suffix in (("first", ""), ("second", ", Gemma-3-270M")):
        chain = partial(chain_error, models, which, beginnings)
        steps = partial(steps_error, models, which, short)
        rows += [
            Row(
                f"chain rule over 257 outcomes: greatest relative error{suffix}",
                context.remember(["chain", which], chain),
                why=f"{len(beginnings)} texts of about 24 bytes, every beginning of them: product "
                "of its next-byte probabilities over the sum of its cover",
            ),
            Row(
                f"scores against asking byte by byte: greatest difference{suffix}",
                context.remember(["steps", which], steps),
                "nats",
                why=f"the first {len(short)} bytes of a text",
            ),
        ]
    return rows


def _guess_rows(context: Context, found: Found, which: str, suffix: str) -> list[Row]:
    rows = []
    for kind in ("prose", "code"):
        units = list(found["guess", which, kind, "report"].values())
        places = [unit["cuts"] for unit in units]
        hits = {name: [unit[name]["hits"] for unit in units] for name in CONTENDERS}
        bits = {name: [unit[name]["bits"] for unit in units] for name in CONTENDERS}
        for better, worse in pairwise(CONTENDERS):
            metric = f"next byte right, {kind}: {better} minus {worse}{suffix}"
            rows.append(_difference(metric, hits[better], hits[worse], places, context.seed))
        for better, worse in pairwise(CONTENDERS):
            rows.append(
                Row(
                    f"bits of the next byte, {kind}: {better} minus {worse}{suffix}",
                    (sum(bits[better]) - sum(bits[worse])) / sum(places),
                    "bits",
                    interval=bootstrap(
                        lambda a, b, n: (a.sum(-1) - b.sum(-1)) / n.sum(-1),
                        bits[better],
                        bits[worse],
                        places,
                        seed=context.seed,
                    ),
                    baseline=sum(bits[worse]) / sum(places),
                )
            )
        rows += [
            Row(
                f"next byte right, {kind}: {name}{suffix}",
                100 * sum(hits[name]) / sum(places),
                "%",
                interval=bootstrap(_percent, hits[name], places, seed=context.seed),
                why=f"{sum(places)} cuts in {len(units)} texts",
            )
            for name in CONTENDERS
        ]
    return rows


def _difference(
    metric: str,
    better: Sequence[float],
    worse: Sequence[float],
    places: Sequence[float],
    seed: int,
    **more: Any,
) -> Row:
    """Points by which one contender is right more often than another at the same cuts."""
    return Row(
        metric,
        100 * (sum(better) - sum(worse)) / sum(places),
        "points",
        interval=bootstrap(
            lambda a, b, n: _percent(a, n) - _percent(b, n), better, worse, places, seed=seed
        ),
        baseline=f"{100 * sum(worse) / sum(places):.1f} %",
        **more,
    )


def _percent(hits: Any, places: Any) -> Any:
    return 100 * hits.sum(-1) / places.sum(-1)


def _line_rows(context: Context, found: Mapping[int, Unit]) -> list[Row]:
    units = [unit for unit in found.values() if unit]
    right = {name: [float(unit[name]) for unit in units] for name in CONTENDERS}
    ones = [1.0] * len(units)
    metric = "rest of a code line cut inside a token"
    about = {
        "paper": "63.9 % by bytes, 45.0 % by tokens",
        "paper_setting": "fill-in-the-middle, code models, random spans, tests passed",
    }
    rows = [
        _difference(
            f"{metric}: byte model minus {other}",
            right["byte model"],
            right[other],
            ones,
            context.seed,
            **about,
        )
        for other in ("naive", "token healing")
    ]
    rows += [
        Row(
            f"{metric}: {name}",
            100 * sum(right[name]) / len(units),
            "%",
            interval=bootstrap(_percent, right[name], ones, seed=context.seed),
            why=f"greedy, exact to the line's end, {len(units)} lines",
        )
        for name in CONTENDERS
    ]
    return rows


def _cost_rows(context: Context, models: Models, choose: Choose) -> list[Row]:
    chosen = choose("report", 1 if context.smoke else TIMED)
    turns = [
        context.remember(["timed", text.number], partial(_timed, context, models, text, turn))
        for turn, text in enumerate(context.track(chosen, "timing"))
    ]
    kept = [turn for turn in turns if turn["kept"]]
    ours, theirs = ([turn[name] for turn in kept] for name in ("byte model", "token model"))
    size = sum(turn["bytes"] for turn in kept)
    prompts = choose("report", 1 if context.smoke else SAMPLED["prompts"])
    wanted = 8 if context.smoke else SAMPLED["bytes"]
    drawn = []
    for text in prompts:
        prefix = text.data[: cuts(text, 1, context.seed)[0]]
        draw = partial(sampling, models, prefix, wanted, context.seed)
        drawn.append(context.remember(["sampling", text.number], draw))
    new = sum(unit["bytes"] for unit in drawn) or math.nan
    forwards = sum(unit["forwards"] for unit in drawn) / new
    speed = new / sum(unit["seconds"] for unit in drawn)
    return [
        Row(
            "scoring: seconds over the token model's",
            sum(ours) / sum(theirs) if kept else math.nan,
            "x",
            interval=bootstrap_ratio(ours, theirs, seed=context.seed) if kept else None,
            baseline=f"{1000 * sum(theirs) / size:.2f} ms per byte" if kept else None,
            why=f"{len(kept)} texts in turns, {len(turns) - len(kept)} rounds dropped",
        ),
        Row(
            "sampling: tokens through the model per byte",
            sum(unit["tokens"] for unit in drawn) / new,
            "tokens",
            why=f"{forwards:.2f} forward passes and {1 / speed:.3f} s per byte, "
            f"{len(drawn)} prompts, the prompt's own passes left out",
        ),
    ]


def _timed(context: Context, models: Models, text: Text, turn: int) -> Unit:
    """Seconds to score a known text, by bytes and by tokens, one after the other."""
    from pertoken.timing import alternate

    contender = models.first
    data = text.data
    if turn == 0:  # warm up
        contender.bytes.score(data[:16])
        token_score(contender, text.text[:16])
    both = {
        "token model": lambda _: token_score(contender, text.text),
        "byte model": lambda _: float(contender.bytes.score(data).sum()),
    }
    names = list(both)[:: 1 if turn % 2 else -1]  # nobody always comes first
    watch = 0.0 if context.smoke else 0.5
    run = alternate({name: both[name] for name in names}, 1, watch=watch)
    calls = (run.kept or run.dropped)[0].calls
    unit: Unit = {name: call.seconds for name, call in calls.items()}
    return unit | {"kept": bool(run.kept), "bytes": len(data)}


def _ensemble_rows(context: Context, found: Found) -> list[Row]:
    rows = []
    for kind in ("prose", "code"):
        dev, report = (_log_probs(found, kind, split) for split in ("dev", "report"))
        weight = min(WEIGHTS, key=lambda w: sum(_bits(dev, w)))
        size = [len(first) for first, _ in report]
        bits = {"first": _bits(report, 1.0), "second": _bits(report, 0.0)}
        both = _bits(report, weight)
        better = min(bits, key=lambda name: sum(bits[name]))
        name = "Gemma-3-270M" if better == "second" else context.model
        rows.append(
            Row(
                f"ensemble with Gemma-3-270M, {kind}: bits per byte over the better member",
                sum(both) / sum(bits[better]),
                "x",
                paper="up to +3.7 % over the better member",
                paper_setting="accuracy on reasoning and knowledge tasks, 7B-9B models",
                interval=bootstrap_ratio(both, bits[better], seed=context.seed),
                baseline=f"{sum(bits[better]) / sum(size):.4f} bits, {name}",
                why=f"{sum(both) / sum(size):.4f} bits per byte, weight {weight:g} for "
                f"{context.model}; members {sum(bits['first']) / sum(size):.4f} and "
                f"{sum(bits['second']) / sum(size):.4f}; {len(size)} texts",
            )
        )
    return rows


def _log_probs(found: Found, kind: str, split: str) -> list[tuple[Any, Any]]:
    """(first model's, second model's) log-probabilities of the bytes of each text, in nats."""
    first, second = (found["score", which, kind, split] for which in ("first", "second"))
    return [(np.array(first[number]), np.array(second[number])) for number in first]


def _bits(texts: Sequence[tuple[Any, Any]], weight: float) -> list[float]:
    """Bits of each text under the weighted mean of the members' next-byte distributions."""
    with np.errstate(divide="ignore"):
        shares = np.log(weight), np.log(1.0 - weight)
    return [
        float(-np.logaddexp(first + shares[0], second + shares[1]).sum() / math.log(2))
        for first, second in texts
    ]

"""Reproduction of ReAGent (arXiv 2402.00794) on two small models.

Soft sufficiency and comprehensiveness of ReAGent and eleven other methods on the same draws, for
analogies and for cut prose; whether a planted fact that alone decides the answer is found, by
ReAGent and the seven methods that cost a pass or two. The paper's data sets and models are larger:
GPT-2 to OPT-6.7B.

Analogies are made as the paper's LongRA, with words and sentences of our own: a word, an aside, and
where the text stops the word that the first one decides. Sentences were chosen on the development
half's words, by how often a model completes them. Each model is asked about those that it completes
by itself with the aside and without (the authors ask all about those that GPT-2-medium completes).
Cut prose is ours.

Settings are the authors' for single tokens, but for far fewer steps (theirs are 3,000 and more; a
row says how often no probe had stopped by then), for replacements by the model itself, and for the
rationale, at most a quarter of the tokens. Importances are absolute values over their sum; the
authors take the softmax of attention weights, which flattens them, and of gradients the norms that
inseq gives. A start token, which Gemma has, is never replaced or zeroed. The paper counts cells,
of a model and a data set each: for those see the rows of one kind of text. How long methods take is
not asked: prompts are shared out to processes.

Random importances are nearly flat, and for sufficiency about one token's worth of elements
survives, so that any importance with a peak is ahead of them there; comprehensiveness asks more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pertoken._bootstrap import bootstrap, bootstrap_mean
from pertoken.errors import PertokenError
from pertoken.loading import model_folder
from pertoken.reproduce._bars import of_each
from pertoken.reproduce._context import Context
from pertoken.reproduce._reagent_prompts import Asked, analogies, planted, prose
from pertoken.reproduce._report import Reproduction, Row

VERSION = 1
DTYPE = "float32"
SECOND = "gemma3-270m"  # its terms must have been accepted: PERTOKEN_ACCEPT_LICENCE=gemma3-270m
LABELS = {"first": "", "second": ", Gemma-3-270M"}
ASKED = 60  # at most half of them analogies
PLANTED = 20
DRAWS = 20
STEPS = 50
METRICS = ("sufficiency", "comprehensiveness")
METHODS = (  # beside ReAGent the paper's seven, two more that are common, FrugalPrompt's two
    "reagent",
    "attention",
    "attention-last",
    "attention-rollout",
    "input-x-gradient",
    "gradient-norm",
    "decompx",
    "globenc",
    "integrated-gradients",
    "gradient-shap",
    "occlusion",
    "lime",
)
SEARCHED = METHODS[:8]  # for planted facts; the others cost as much as ReAGent

BARS = of_each(
    LABELS,
    {
        "sufficiency: reagent over random": "> 1",
        "comprehensiveness: reagent over random": "> 1",
        "sufficiency: reagent over the best other method": ">= 1",
        "comprehensiveness: reagent over the best other method": ">= 1",
        "planted facts the model repeats": ">= 0.5",
        "planted fact in the top 20 % of tokens, where repeated: reagent": ">= 0.8",
    },
)
_BEST = "the best of eleven others is asked, and the interval, which seeks it anew, is below 1 too"
_WHY = (
    "with the ratio 0.3 the prediction is mostly lost whichever tokens are replaced, and the sum "
    "counts how often a token was drawn: reports/bench/reagent_sum.json, reagent_sum_gemma3.json, "
    "where the same steps with their mean taken off find every planted fact, and the ratio 0.1 all "
    "but one for each model"
)
_LIKELY = f"likely as for the planted facts: {_WHY}"
REASONS = of_each(
    LABELS,
    {
        "sufficiency: reagent over the best other method": (
            f"{_BEST}; ReAGent cannot be told from random importances by this metric, and few "
            f"methods are far from them; {_LIKELY}"
        ),
        "comprehensiveness: reagent over the best other method": (
            f"{_BEST}; DecompX leads on both models, and occlusion and attention of the last layer "
            f"are ahead of ReAGent too; {_LIKELY}"
        ),
        "planted fact in the top 20 % of tokens, where repeated: reagent": (
            "found far more often than by chance; attention, gradient norm and DecompX find it "
            f"every time; {_WHY}"
        ),
    },
)
CAVEATS = of_each(
    LABELS,
    {
        "sufficiency: reagent over random": (
            "the interval holds 1, and any importance with a peak is ahead of random ones here"
        ),
        "comprehensiveness: reagent over random": (
            "so are nearly all others, several of them further"
        ),
    },
)

_WARNINGS = {  # what a note of a method says
    "reagent": f"no probe stopped within {STEPS} steps",
    "integrated-gradients": "did not add up to the difference",
}

SMOKE_PROSE = [{"question": "one two three four five six seven eight nine ten " * 4}] * 4
Unit = dict[str, Any]
Floats = NDArray[np.float64]


def run(context: Context) -> Reproduction:
    """All rows; some three hours on two slow cores, kept prompt by prompt."""
    if not context.smoke:
        model_folder(SECOND)  # a licence or network that is missing is said before the first hour
    rows = context.data("gsm8k", smoke_rows=SMOKE_PROSE)
    count = 2 if context.smoke else ASKED
    texts = prose(rows, "report", count)
    if len(texts) < count:
        raise PertokenError(f"{count} long questions at odd places are needed, got {len(texts)}")
    facts = planted("report", 1 if context.smoke else PLANTED)
    load = {which: _loader(context, which) for which in LABELS}
    known = context.remember_all(
        {which: (["known", which], partial(_known, load[which])) for which in LABELS}, "models"
    )
    units: dict[tuple[str, str, int], tuple[object, Callable[[], Unit]]] = {}

    def add(which: str, kind: str, asked: Asked) -> None:
        compute = _planted if kind == "planted" else _faithful
        seed = context.seed + asked.number
        key = (which, kind, asked.number)
        units[key] = list(key), partial(compute, load[which], asked, seed, context.smoke)

    words = {each.number: each for each in analogies("report")}
    for place in range(count):  # both models from the start
        for which in LABELS:
            pairs = known[which][: count // 2] or ([1] if context.smoke else [])
            if place < len(pairs):
                add(which, "analogies", words[pairs[place]])
            if place < count - len(pairs):
                add(which, "prose", texts[place])
            if place < len(facts):
                add(which, "planted", facts[place])
    found = context.remember_all(units, "prompts")
    result: list[Row] = []
    for which, label in LABELS.items():
        result += _model_rows(which, label, found, context.seed)
        share = len(known[which]) / len(words)
        result.append(Row(f"analogies the model completes{label}", share, "share"))
    return context.reproduction(
        result,
        second_model=SECOND,
        analogies={which: min(len(numbers), ASKED // 2) for which, numbers in known.items()},
        analogies_and_prose=ASKED,
        planted=PLANTED,
        draws=DRAWS,
        methods=METHODS,
        methods_for_planted_facts=SEARCHED,
        reagent={"probes": 5, "ratio": 0.3, "keep": 8, "top_k": 3, "max_steps": STEPS},
        replacer="lm_topk",
        split="report: odd numbers",
        quantity="probability",
        distance="hellinger",
    )


def _loader(context: Context, which: str) -> Callable[[], tuple[Any, Any]]:
    kept: list[tuple[Any, Any]] = []

    def load() -> tuple[Any, Any]:
        if which == "first" or context.smoke:
            return context.load()
        if not kept:
            from pertoken.loading import load as load_model

            kept.append(load_model(SECOND, device=context.device, dtype=context.dtype))
        return kept[0]

    return load


def _options(smoke: bool) -> dict[str, dict[str, Any]]:
    if not smoke:
        return {"reagent": {"max_steps": STEPS}}
    return {
        "reagent": {"max_steps": 1, "probes": 1},
        "integrated-gradients": {"steps": 1},
        "gradient-shap": {"samples": 1},
        "occlusion": {"draws": 1},
        "lime": {"samples": 2},
    }


def _known(load: Callable[[], tuple[Any, Any]]) -> list[int]:
    """Numbers of the analogies that the model completes, with the aside and without."""
    from pertoken.attribute._question import ask

    model, tokenizer = load()
    found = []
    for each in analogies("report"):
        wanted = ask(model, tokenizer, each.prompt, each.target)
        texts = (each.prompt, each.plain)
        if len(wanted.targets) == 1 and all(
            ask(model, tokenizer, text, 1).ids[-1] == wanted.ids[-1] for text in texts
        ):
            found.append(each.number)
    return found


def _faithful(load: Callable[[], tuple[Any, Any]], asked: Asked, seed: int, smoke: bool) -> Unit:
    """Each method's metrics on one prompt, and whether it gave a warning."""
    from pertoken.attribute import evaluate_attribution

    model, tokenizer = load()
    prompt: Any = asked.prompt if asked.target is None else (asked.prompt, asked.target)
    found = evaluate_attribution(
        model,
        tokenizer,
        [prompt],
        METHODS,
        draws=1 if smoke else DRAWS,
        seed=seed,
        options=_options(smoke),
    )
    return {
        name: {
            "sufficiency": float(result.sufficiency.mean()),
            "comprehensiveness": float(result.comprehensiveness.mean()),
            "warned": name in found.signals[0] and bool(found.signals[0][name].notes),
        }
        for name, result in found.results.items()
    }


def _planted(load: Callable[[], tuple[Any, Any]], asked: Asked, seed: int, smoke: bool) -> Unit:
    """Is a token of the fact in each method's top 20 %; and does the model know the answer?"""
    from pertoken.attribute import attribute
    from pertoken.attribute._question import ask

    model, tokenizer = load()
    target, fact = asked.target or "", asked.fact or (0, 0)
    wanted = ask(model, tokenizer, asked.prompt, target)
    written = ask(model, tokenizer, asked.prompt, len(wanted.targets))
    found: Unit = {"answered": wanted.targets == written.targets}
    if not (found["answered"] or smoke):
        return found
    options = _options(smoke)
    for name in SEARCHED:
        signal = attribute(
            model,
            tokenizer,
            asked.prompt,
            target,
            name,
            seed=seed,
            **options.get(name, {}),
        )
        first = signal.target(0) if signal.targets else signal
        top = first.top(math.ceil(0.2 * len(first)))
        found[name] = any(each.start < fact[1] and each.end > fact[0] for each in top)
        hits = sum(start < fact[1] and end > fact[0] for start, end in first.offsets)
        # That none of the top is the fact's, were they drawn at random.
        missed = math.comb(len(first) - hits, len(top)) / math.comb(len(first), len(top))
        found["chance"] = 1 - missed
    return found


def _model_rows(
    which: str, label: str, found: dict[tuple[str, str, int], Unit], seed: int
) -> list[Row]:
    """All rows of one model: of all texts, of facts, and of each kind of text."""
    of: dict[str, list[Unit]] = {"analogies": [], "prose": [], "planted": []}
    for (model, kind, _), unit in found.items():
        if model == which:
            of[kind].append(unit)
    both = of["analogies"] + of["prose"]
    result = _rows(both, label, seed) + _planted_rows(of["planted"], label, seed)
    result += _means(both, f"all{label}", seed)
    for kind in ("analogies", "prose"):
        if of[kind]:
            result += _rows(of[kind], f", {kind}{label}", seed)
            result += _means(of[kind], f"{kind}{label}", seed)
    return result


def _rows(units: list[Unit], label: str, seed: int) -> list[Row]:
    """ReAGent against random and against the best of the others, over the prompts."""
    rows = []
    for metric in METRICS:
        columns = {name: [float(unit[name][metric]) for unit in units] for name in units[0]}
        own, flat = columns.pop("reagent"), columns.pop("random")
        best = max(columns, key=lambda name: sum(columns[name]))
        for against, name, rivals in (
            ("random", "random", [flat]),
            ("the best other method", best, list(columns.values())),
        ):
            rows.append(
                Row(
                    f"{metric}: reagent over {against}{label}",
                    _ratio(np.array(own), *map(np.array, rivals)).item(),
                    "x",
                    paper="best in most cells" if against != "random" else None,
                    paper_setting="six models, three data sets" if against != "random" else "",
                    interval=bootstrap(_ratio, own, *rivals, seed=seed),
                    baseline=f"{name}: {max(map(np.mean, rivals)):.4g}",
                )
            )
    return rows


def _ratio(top: Floats, *bottoms: Floats) -> Floats:
    """A mean over the largest of the others', which is sought anew in each draw."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(top.mean(-1) / np.max([each.mean(-1) for each in bottoms], axis=0))


def _planted_rows(units: list[Unit], label: str, seed: int) -> list[Row]:
    """Shares over the prompts whose answer the model knows: elsewhere the fact decides nothing."""
    known = [unit for unit in units if unit["answered"]]
    rows = [Row(f"planted facts the model repeats{label}", len(known) / len(units), "share")]
    for name in (*SEARCHED, "chance"):
        hits = [float(unit[name]) for unit in known]
        rows.append(
            Row(
                f"planted fact in the top 20 % of tokens, where repeated: {name}{label}",
                float(np.mean(hits)) if hits else math.nan,
                "share",
                interval=bootstrap_mean(hits, seed) if hits else None,
                baseline=f"{len(known)} facts",
            )
        )
    return rows


def _means(units: list[Unit], label: str, seed: int) -> list[Row]:
    """The table: every method's figures on one kind of text."""
    rows = []
    for name in units[0]:
        for metric in METRICS:
            values = [float(unit[name][metric]) for unit in units]
            interval = bootstrap_mean(values, seed)
            rows.append(
                Row(f"{metric}: {name}, {label}", float(np.mean(values)), "", None, "", interval)
            )
    for name, what in _WARNINGS.items():
        warned = float(np.mean([unit[name]["warned"] for unit in units]))
        rows.append(Row(f"{name}: {what}, {label}", warned, "share of prompts, with any target"))
    return rows

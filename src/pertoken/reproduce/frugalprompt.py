"""Reproduction of FrugalPrompt (arXiv 2510.16439) on two small models.

What is left of a prompt's use when 20 to 60 % of its words are gone: on mails that are spam or not,
questions about a planted fact, summaries and school mathematics; by GlobEnc, DecompX, and the
paper's controls. Models of this size solve next to none of GSM8K, so that all four tasks are put on
one scale, and mathematics has no other: `information left` is the share of what the prompt's body
takes off the negative log-likelihood of the right answer (among the choices where there are some;
of the model's own answer to the whole prompt in summaries) that the compressed body still takes
off. Accuracy and ROUGE-1 stand beside it. Mails are classified by a linear layer on the model's
states, learnt on whole development mails: asked in words, these models answer all mails alike;
without a mail both labels are taken to be as likely. The paper scores on task classifiers; here the
encoder is MiniLM without a head, so its ablation over classes is not run.

The summaries' articles are Spec-Bench's: PERTOKEN_DATA names the folder that holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pertoken._bootstrap import bootstrap, bootstrap_mean
from pertoken.reproduce._context import Context
from pertoken.reproduce._frugal_classifier import DECAY, Classifier, learn
from pertoken.reproduce._frugal_tasks import (
    TASKS,
    Item,
    classification,
    mathematics,
    questions,
    summaries,
)
from pertoken.reproduce._frugal_units import Unit, classified, measured
from pertoken.reproduce._report import Reproduction, Row

if TYPE_CHECKING:
    from pertoken._embedded import Kind

VERSION = 1
DTYPE = "float32"
SECOND = "gemma3-270m"  # its terms must have been accepted: PERTOKEN_ACCEPT_LICENCE=gemma3-270m
COUNTS = {"classification": 60, "questions": 60, "summaries": 12, "mathematics": 40}
SHARES = (0.8, 0.6, 0.5, 0.4)
RATINGS = {
    "globenc": ("globenc", False),
    "decompx": ("decompx", False),
    "self-information": ("self-information", False),
    "stop-words": ("stop-words", False),
    "random": ("random", False),
    "bottom (globenc)": ("globenc", True),
}
LEARNT_ON = 160  # development mails
NEW_TOKENS = 48  # of a summary

_BARS = {
    "information left at 60 %, globenc: least of the other tasks minus mathematics": "> 0",
    "information left at 60 %, mathematics: globenc minus random": "> 0",
    "information left at 60 %, mathematics: random minus bottom (globenc)": "> 0",
    "information left at 60 %, classification: globenc minus random": ">= 0",
    "information left at 60 %, classification: random minus bottom (globenc)": ">= 0",
    "classification, globenc: accuracy lost at 80 %": "<= 0.03",
    "questions, globenc: accuracy lost at 80 %": "<= 0.05",
    "information left at 80 %, summaries: globenc": ">= 0.9",
}
LABELS = {"first": "", "second": ", Gemma-3-270M"}
BARS = {metric + label: bar for label in LABELS.values() for metric, bar in _BARS.items()}
REASONS: dict[str, str] = {}

SMOKE: dict[str, list[dict[str, Any]]] = {
    "spam-assassin": [
        {"text": f"buy this {number} now and save {label} " * 10, "label": label}
        for number, label in enumerate(("ham", "ham", "spam", "spam") * 2)
    ],
    "spec-bench": [{"question_id": 1, "category": "summarization", "turns": ["Sum: a b c d e"]}],
    "gsm8k": [{"question": "1 and 1 and 1?", "answer": "<<1+1=2>>3\n#### 3"}] * 2,
}
Floats = NDArray[np.float64]


class _Models:
    """The models of a run, each loaded when it is first needed, and their classifiers of mails."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._second: Any = None
        self._encoder: Any = None
        self._learnt: dict[str, Any] = {}

    def decoder(self, which: str) -> Any:
        """(model, tokenizer) of the first or the second family."""
        if which == "first" or self._context.smoke:
            return self._context.load()
        if self._second is None:
            self._second = self._load(SECOND, "decoder")
        return self._second

    def learn(self, mails: Sequence[Item]) -> None:
        """Linear layers on the decoders' states, from whole mails; once for all processes."""
        labels = [mail.choices.index(mail.answer) for mail in mails]
        bodies = [mail.body for mail in mails]

        def learnt(which: str) -> Any:
            model, tokenizer = self.decoder(which)
            return learn(model, tokenizer, bodies, labels)

        self._learnt = self._context.remember_all(
            {which: (["classifier", which], partial(learnt, which)) for which in LABELS},
            "classifiers",
        )

    def classifier(self, which: str) -> Classifier:
        """The layer that a decoder has learnt."""
        model, tokenizer = self.decoder(which)
        return Classifier(model, tokenizer, self._learnt[which])

    def rater(self, salience: str) -> Any:
        """(model, tokenizer) of a salience; (None, None) where it needs none."""
        from pertoken.prune import SALIENCE

        need = SALIENCE[salience]
        if need is None or self._context.smoke:
            return None, None
        kind, name = need
        if kind == "decoder":
            return self.decoder("first")
        if self._encoder is None:
            self._encoder = self._load(name, kind)
        return self._encoder

    def _load(self, name: str, kind: Kind) -> Any:
        from pertoken.loading import load

        return load(name, device=self._context.device, dtype=self._context.dtype, kind=kind)


def run(context: Context) -> Reproduction:
    """All rows; some hours on two slow cores, kept item by item."""
    mails = context.data("spam-assassin", smoke_rows=SMOKE["spam-assassin"])
    learnt_on = classification(mails, 2 if context.smoke else LEARNT_ON, "dev")
    items, models = _items(context), _Models(context)
    models.learn(learnt_on)
    tokens = 2 if context.smoke else NEW_TOKENS
    found = context.remember_all(
        {
            (item.task, item.number): (
                [item.task, item.number],
                partial(_unit, context, models, item, tokens),
            )
            for item in items
        },
        "items",
    )
    rows: list[Row] = []
    for which, label in LABELS.items():
        units: dict[str, list[Unit]] = {task: [] for task in TASKS}
        for item in items:
            units[item.task].append(found[item.task, item.number][which])
        rows += _table(units, label, context.seed) + _judged(units, label, context.seed)
    return context.reproduction(
        rows,
        second_model=SECOND,
        encoder="minilm",
        raters={"globenc, decompx": "minilm", "self-information": context.model},
        items=COUNTS,
        facts=len({item.body.partition(".")[0] for item in items if item.task == "questions"}),
        classifier={"learnt_on": LEARNT_ON, "decay": DECAY},
        shares=list(SHARES),
        split="report: odd numbers",
        protected="nothing; only the body of the prompt is compressed",
    )


def _unit(context: Context, models: _Models, item: Item, tokens: int) -> dict[str, Unit]:
    """The item, compressed once and put to both models."""
    bodies = _bodies(context, models, item)
    if item.task == "classification":
        return {which: classified(models.classifier(which), item, bodies) for which in LABELS}
    found = {}
    for which in LABELS:
        model, tokenizer = models.decoder(which)
        found[which] = measured(model, tokenizer, item, bodies, tokens)
    return found


def _items(context: Context) -> list[Item]:
    data = {name: context.data(name, smoke_rows=rows) for name, rows in SMOKE.items()}
    counts = dict.fromkeys(COUNTS, 2) if context.smoke else COUNTS
    return [
        *classification(data["spam-assassin"], counts["classification"]),
        *questions(counts["questions"]),
        *summaries(data["spec-bench"], counts["summaries"]),
        *mathematics(data["gsm8k"], counts["mathematics"]),
    ]


def _bodies(context: Context, models: _Models, item: Item) -> dict[str, list[str]]:
    """The item's body by every rating, at every share; in a smoke run at random."""
    from pertoken.prune import compress

    found = {}
    rated: dict[str, Any] = {}  # by model: once for all shares, and for the lowest words too
    for name, (salience, lowest) in RATINGS.items():
        model, tokenizer = models.rater(salience)
        own: Any = {"protect_defaults": False, "seed": context.seed + item.number}
        by: Any = {"salience": "random" if context.smoke else salience}
        if model is not None:
            if salience not in rated:
                by |= {"model": model, "tokenizer": tokenizer}
                rated[salience] = compress(item.body, min(SHARES), **by, **own).signal
            by = {"salience": rated[salience]}
        found[name] = [
            compress(item.body, share, lowest=lowest, **by, **own).text for share in SHARES
        ]
    return found


def _left(units: list[Unit], rating: str, share: float) -> tuple[list[float], list[float]]:
    """(what the compressed body takes off the loss, what the whole body does), per item."""
    place = SHARES.index(share)
    small = [unit["empty"] - unit[rating][place]["loss"] for unit in units]
    whole = [unit["empty"] - unit["full"][0]["loss"] for unit in units]
    return small, whole


def _ratio(top: Floats, bottom: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(top.sum(-1) / bottom.sum(-1))


def _table(units: dict[str, list[Unit]], label: str, seed: int) -> list[Row]:
    """Every task, rating and share: information left, and the task's own metric."""
    rows = []
    for task, found in units.items():
        metric = {"summaries": "ROUGE-1 to the own answer", "mathematics": ""}.get(task, "accuracy")
        _, whole = _left(found, "globenc", SHARES[0])
        rows.append(
            Row(
                f"{task}: the whole body takes off the loss{label}",
                float(np.mean(whole)),
                "nats an item",
                interval=bootstrap_mean(whole, seed),
            )
        )
        if metric == "accuracy":
            values = [unit["full"][0]["solved"] for unit in found]
            interval, mean = bootstrap_mean(values, seed), float(np.mean(values))
            metric_of_all = f"{task}: {metric}, whole prompt{label}"
            rows.append(Row(metric_of_all, mean, "share", interval=interval))
        for rating in RATINGS:
            for place, share in enumerate(SHARES):
                where = f"{rating} at {share:.0%}{label}"
                small, whole = _left(found, rating, share)
                rows.append(
                    Row(
                        f"{task}: information left, {where}",
                        _ratio(np.array(small), np.array(whole)).item(),
                        "share",
                        interval=bootstrap(_ratio, small, whole, seed=seed),
                    )
                )
                if metric:
                    values = [unit[rating][place]["solved"] for unit in found]
                    interval = bootstrap_mean(values, seed)
                    mean = float(np.mean(values))
                    rows.append(Row(f"{task}: {metric}, {where}", mean, "share", interval=interval))
    return rows


def _judged(units: dict[str, list[Unit]], label: str, seed: int) -> list[Row]:
    """The rows with bars."""
    left = {task: _left(found, "globenc", 0.6) for task, found in units.items()}
    shares = {task: _ratio(np.array(a), np.array(b)).item() for task, (a, b) in left.items()}
    least = min((task for task in TASKS if task != "mathematics"), key=shares.__getitem__)
    rows = [
        Row(
            "information left at 60 %, globenc: least of the other tasks minus mathematics" + label,
            shares[least] - shares["mathematics"],
            "share",
            paper="accuracy .941 of .955 against .462 of .961",
            paper_setting="o3-mini, IMDB and GSM8K, 60 % kept",
            interval=_gap_interval(left, seed),
            baseline=f"{least}: {shares[least]:.3g}",
        )
    ]
    pairs = (("globenc", "random"), ("random", "bottom (globenc)"), ("decompx", "random"))
    for task in TASKS:
        for first, second in pairs:
            a, whole = _left(units[task], first, 0.6)
            b, _ = _left(units[task], second, 0.6)
            rows.append(
                Row(
                    f"information left at 60 %, {task}: {first} minus {second}{label}",
                    _difference(np.array(a), np.array(b), np.array(whole)).item(),
                    "share",
                    interval=bootstrap(_difference, a, b, whole, seed=seed),
                )
            )
    for task in ("classification", "questions"):
        lost = [unit["full"][0]["solved"] - unit["globenc"][0]["solved"] for unit in units[task]]
        rows.append(
            Row(
                f"{task}, globenc: accuracy lost at 80 %{label}",
                float(np.mean(lost)),
                "share",
                paper={"classification": 0.007, "questions": 0.015}[task],
                paper_setting="Llama-3-8B, " + {"classification": "IMDB"}.get(task, "CosmosQA"),
                interval=bootstrap_mean(lost, seed),
            )
        )
    small, whole = _left(units["summaries"], "globenc", 0.8)
    rows.append(
        Row(
            f"information left at 80 %, summaries: globenc{label}",
            _ratio(np.array(small), np.array(whole)).item(),
            "share",
            interval=bootstrap(_ratio, small, whole, seed=seed),
        )
    )
    return rows


def _gap_interval(
    left: dict[str, tuple[list[float], list[float]]], seed: int
) -> tuple[float, float]:
    """Of the least ratio of the other tasks minus mathematics', each task's items drawn anew."""
    draw, ratios = np.random.default_rng(seed), {}
    for task, columns in left.items():
        picks = draw.integers(0, len(columns[0]), size=(2000, len(columns[0])))
        ratios[task] = _ratio(*(np.array(column)[picks] for column in columns))
    own = ratios.pop("mathematics")
    gaps = np.min(list(ratios.values()), axis=0) - own
    low, high = np.percentile(gaps[np.isfinite(gaps)], [2.5, 97.5])
    return float(low), float(high)


def _difference(first: Floats, second: Floats, whole: Floats) -> Floats:
    return _ratio(first, whole) - _ratio(second, whole)

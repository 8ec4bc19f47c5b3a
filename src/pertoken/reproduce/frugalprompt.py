"""Reproduction of FrugalPrompt (arXiv 2510.16439) on two small models.

What is left of a prompt's use when 20 to 60 % of its words are gone: on mails that are spam or not,
questions about a planted fact, summaries and school mathematics; by GlobEnc, DecompX, and the
paper's controls. Models of this size solve next to none of GSM8K, so that all four tasks are put on
one scale: `information left` is the share of what the prompt's body takes off the negative
log-likelihood of the right answer (among the choices where there are some; of the model's own
answer to the whole prompt in summaries) that the compressed body still takes off. Accuracy and
ROUGE-1 stand beside it. Mails are classified by a linear layer on the model's states, learnt on
whole development mails: asked in words, these models answer all mails alike. The paper scores on
task classifiers; here the encoder is MiniLM without a head, so its ablation over classes is not
run.

The summaries' articles are Spec-Bench's: PERTOKEN_DATA names the folder that holds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pertoken._bootstrap import bootstrap, bootstrap_mean
from pertoken.reproduce._context import Context
from pertoken.reproduce._frugal_classifier import DECAY, Classifier
from pertoken.reproduce._frugal_tasks import (
    TASKS,
    Item,
    classification,
    mathematics,
    questions,
    rouge_1,
    summaries,
)
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
        {"text": f"buy this now and save {label} " * 10, "label": label}
        for label in ("ham", "ham", "spam", "spam") * 2
    ],
    "spec-bench": [{"question_id": 1, "category": "summarization", "turns": ["Sum: a b c d e"]}],
    "gsm8k": [{"question": "1 and 1 and 1?", "answer": "<<1+1=2>>3\n#### 3"}] * 2,
}
Unit = dict[str, Any]
Floats = NDArray[np.float64]


class _Models:
    """The models of a run, each loaded when it is first needed, and their classifiers of mails."""

    def __init__(self, context: Context, learnt_on: Sequence[Item]) -> None:
        self._context = context
        self._learnt_on = learnt_on
        self._second: Any = None
        self._encoder: Any = None
        self._classifiers: dict[str, Classifier] = {}

    def decoder(self, which: str) -> Any:
        """(model, tokenizer) of the first or the second family."""
        if which == "first" or self._context.smoke:
            return self._context.load()
        if self._second is None:
            self._second = self._load(SECOND, "decoder")
        return self._second

    def classifier(self, which: str) -> Classifier:
        """The linear layer on a decoder's states, learnt when it is first needed."""
        if which not in self._classifiers:
            mails = self._learnt_on
            labels = [mail.choices.index(mail.answer) for mail in mails]
            model, tokenizer = self.decoder(which)
            bodies = [mail.body for mail in mails]
            self._classifiers[which] = Classifier(model, tokenizer, bodies, labels)
        return self._classifiers[which]

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
    items, models = _items(context), _Models(context, learnt_on)
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
        items=COUNTS,
        classifier={"learnt_on": LEARNT_ON, "decay": DECAY},
        shares=list(SHARES),
        split="report: odd numbers",
        protected="nothing; only the body of the prompt is compressed",
    )


def _unit(context: Context, models: _Models, item: Item, tokens: int) -> dict[str, Unit]:
    """The item, compressed once and put to both models."""
    bodies = _bodies(context, models, item)
    if item.task == "classification":
        return {which: _classified(models.classifier(which), item, bodies) for which in LABELS}
    return {which: _measure(models.decoder, which, item, bodies, tokens) for which in LABELS}


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
    for name, (salience, lowest) in RATINGS.items():
        model, tokenizer = models.rater(salience)
        options: Any = {"salience": "random" if context.smoke else salience, "lowest": lowest}
        options |= {"model": model, "tokenizer": tokenizer, "seed": context.seed + item.number}
        found[name] = [
            compress(item.body, share, protect_defaults=False, **options).text for share in SHARES
        ]
    return found


def _classified(classifier: Classifier, item: Item, bodies: dict[str, list[str]]) -> Unit:
    """Losses of a mail's label; without the mail both labels are as likely."""
    label = item.choices.index(item.answer)
    found: Unit = {"empty": math.log(2)}
    for name, texts in {"full": [item.body], **bodies}.items():
        losses = [classifier.loss(text, label) for text in texts]
        found[name] = [{"loss": loss, "solved": float(loss < math.log(2))} for loss in losses]
    return found


def _measure(
    load: Callable[[str], Any], which: str, item: Item, bodies: dict[str, list[str]], tokens: int
) -> Unit:
    """Losses of the answer behind every form of the prompt, and whether the task is solved."""
    model, tokenizer = load(which)
    answer = item.answer
    if not answer:
        answer = _write(model, tokenizer, item.prompt(item.body), tokens)
    found: Unit = {"empty": _loss(model, tokenizer, item.prompt(""), answer, item.choices)[0]}
    forms = {"full": [item.body], **bodies}
    for name, texts in forms.items():
        found[name] = []
        for body in texts:
            prompt = item.prompt(body)
            loss, first = _loss(model, tokenizer, prompt, answer, item.choices)
            solved: float | None = None
            if item.choices:
                solved = float(first)
            elif not item.answer:
                written = answer if name == "full" else _write(model, tokenizer, prompt, tokens)
                solved = rouge_1(written, answer)
            found[name].append({"loss": loss, "solved": solved})
    return found


def _loss(
    model: Any, tokenizer: Any, prompt: str, answer: str, choices: Sequence[str]
) -> tuple[float, bool]:
    """Negative log-likelihood of the answer behind the prompt, nats; among choices if there are
    any, and then whether it is the likeliest of them."""
    import torch

    before = tokenizer(prompt)["input_ids"]
    after = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in choices or [answer]]
    single = all(len(each) == 1 for each in after)
    sums = []
    with torch.no_grad():
        # One token each: one forward tells them all.
        for each in after[:1] if single else after:
            ids = torch.tensor([before + each], device=model.device)
            out = model(input_ids=ids, use_cache=False, logits_to_keep=len(each) + 1)
            logits = out.logits[0, :-1].float()
            chances = logits.log_softmax(-1)
            if single:
                sums = [chances[0, own[0]] for own in after]
            else:
                sums.append(chances.gather(-1, ids[0, len(before) :, None]).sum())
    found = torch.stack(sums)
    if not choices:
        return -float(found[0]), True
    place = list(choices).index(answer)
    return -float(found.log_softmax(0)[place]), int(found.argmax()) == place


def _write(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """What the model writes behind the prompt, greedily, up to the end of the line."""
    import torch

    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    written = model.generate(ids, max_new_tokens=tokens, **given)[0, ids.shape[1] :]
    text = str(tokenizer.decode(written, skip_special_tokens=True))
    line = text.lstrip().split("\n")[0].strip()
    return f" {line or 'nothing'}"


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
        if metric:
            values = [unit["full"][0]["solved"] for unit in found]
            rows.append(Row(f"{task}: {metric}, whole prompt{label}", float(np.mean(values))))
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
            baseline=f"{least}: {shares[least]:.3g}",
        )
    ]
    for task in ("mathematics", "classification"):
        for first, second in (("globenc", "random"), ("random", "bottom (globenc)")):
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


def _difference(first: Floats, second: Floats, whole: Floats) -> Floats:
    return _ratio(first, whole) - _ratio(second, whole)

"""Reproduction of CharBench (arXiv 2508.02591) on two small models.

The published set and its words are in no package, so that the words are those of Brown, cut and
filtered as the authors do it: unique words of 4 to 10 letters, their case kept, so many of each
length for each task, none twice. The paper's models have 7B parameters and more; models of 135M and
270M answer few questions right, so that the correlations are those of a model that mostly guesses.
What is compared with the paper is their sign: the figures of its tables are not at hand. The
spelled-out form is ours and asked for fewer words. A program that answers 1 to every question and
never reads a word stands beside them: what it does too says nothing about tokens.

Asked as published, through its chat template, SmolLM2 wrote no bare number to any of 448
development questions ("The answer is 1"), and only a bare number counts. So both models are asked
as base models are, behind solved questions of the same task (ours), and the first line of what they
write counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pertoken._bootstrap import bootstrap_mean
from pertoken.probe._charbench_report import (
    Answered,
    CharBench,
    average_correlations,
    error_overlap,
)
from pertoken.probe._questions import EXAMPLES, LENGTHS, POSITION, TASKS, Question, questions
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row
from pertoken.reproduce._word_models import REPORT, SECOND, TwoModels, brown_words

VERSION = 1
DTYPE = "float32"

EACH = 286  # of each task and length: 2,002 of a task
SPELLED = 40  # of them also spelled out: 280 of a task
SHOTS = 3
TOGETHER = 512  # questions of a unit
BATCH = 32
NEW_TOKENS = 4

COUNTING = "count_character_frequency"
LEAST = "questions of a model and task, least"
BALANCE = "questions of a task and length, most minus least"
ORACLE = "accuracy of an oracle, least of the tasks"
COPIER = "accuracy of a model that copies the question, most of the tasks"
TOKEN = "places: r of right answers with the letters of the token, mean of tasks and models"
COUNT = (
    "counts of a letter: |r| with the number of tokens minus |r| with the count, means of models"
)
BARS = {
    LEAST: ">= 2000",
    BALANCE: "== 0",
    ORACLE: "== 1",
    COPIER: "== 0",
    TOKEN: "< 0",
    COUNT: "< 0",
}
REASONS: dict[str, str] = {}
_GUESSED = (
    "a program that answers 1 to every question has the same sign, and these models answer 1 to "
    "nearly all"
)
CAVEATS = {
    **dict.fromkeys((LEAST, BALANCE, ORACLE, COPIER), "a check of the questions and the scorer"),
    TOKEN: f"{_GUESSED}; with the place itself held fixed longer tokens go with more right answers "
    "(rows of log-odds)",
    COUNT: _GUESSED,
}

_SETTING = "mean of 7 models, Mistral-7B to GPT-4o and Llama-3.1-405B"
ACCURACY = {
    "count_character_frequency": "about 50 %",
    "count_unique_chars": "about 43 %",
    "find_first_occurrence": "about 43.6 %",
    "find_last_occurrence": "about 32.3 %",
}
SIGNS = {
    ("counts", "word_length"): "negative",
    ("counts", "gold"): "negative",
    ("counts", "number_of_tokens"): "weak",
    ("counts", "compression_rate"): "weak",
    ("places", "target_token_length"): "negative",
}
Unit = list[list[Any]]


def run(context: Context) -> Reproduction:
    """All rows, some hundred questions at a time."""
    words = brown_words(context, REPORT)
    words = [word for word in words if word not in dict(EXAMPLES)]
    asked = questions(words, 1 if context.smoke else EACH, seed=context.seed)
    pairs = [(question, "plain") for question in asked]
    for task in TASKS:
        those = [question for question in asked if question.task == task]
        pairs += [(question, "spelled") for question in those[: SPELLED * len(LENGTHS)]]
    models = TwoModels(context)
    units: dict[tuple[str, int], tuple[object, Callable[[], Unit]]] = {}
    for which in ("first", "second"):
        for start in range(0, len(pairs), TOGETHER):
            part = pairs[start : start + TOGETHER]
            units[which, start] = ([which, start], partial(_asked, context, models, which, part))
    found = context.remember_all(units, "questions")
    reports = {}
    for which, name in (("first", context.model), ("second", SECOND)):
        replies = [row for key, unit in found.items() if key[0] == which for row in unit]
        reports[name] = CharBench(
            [
                Answered(question, form, reply, answer, letters)
                for (question, form), (reply, answer, letters) in zip(pairs, replies, strict=True)
            ],
            {},
        )
    rows = _judged(asked, reports)
    rows += _always_one(reports)
    for name, own in reports.items():
        rows += _accuracies(name, own, context.seed)
        rows += _relations(name, own)
    rows += [
        Row(
            f"{row['task']}, {row['form']}: overlap of the models' errors (Jaccard)",
            _number(row["overlap"]),
        )
        for row in error_overlap(reports)
    ]
    return context.reproduction(
        rows,
        second_model=SECOND,
        questions=len(asked),
        spelled_out=len(pairs) - len(asked),
        words=f"{len(words)} of Brown, texts whose number modulo 4 is 3",
        shots=SHOTS,
        chat=False,
        new_tokens=NEW_TOKENS,
        batch=BATCH,
        decoding="greedy",
    )


def _asked(
    context: Context, models: TwoModels, which: str, pairs: Sequence[tuple[Question, str]]
) -> Unit:
    """[reply, number, letters of the word's tokens] of some questions."""
    from pertoken.probe.characters import ask_questions

    model, tokenizer = models.load(which)
    tokens, batch = (2, 4) if context.smoke else (NEW_TOKENS, BATCH)
    found = ask_questions(
        model,
        tokenizer,
        pairs,
        shots=1 if context.smoke else SHOTS,
        chat=False,
        max_new_tokens=tokens,
        batch=batch,
    )
    return [[one.reply, one.answer, one.letters] for one in found]


def _judged(asked: Sequence[Question], reports: dict[str, CharBench]) -> list[Row]:
    """The rows with bars."""
    cells = Counter((question.task, len(question.word)) for question in asked)
    counts = [len(own.of(task)) for own in reports.values() for task in TASKS]
    means = {
        (row["task"], row["metric"]): row["r"]
        for row in average_correlations(reports)
        if row["form"] == "plain"
    }
    places = [_number(means.get((task, "target_token_length"))) for task in POSITION]
    sizes = {name: _mean_size(reports, COUNTING, name) for name in ("number_of_tokens", "gold")}
    return [
        Row(LEAST, min(counts)),
        Row(BALANCE, max(cells.values()) - min(cells.values())),
        Row(ORACLE, min(_scores(asked, lambda question: str(question.answer))), "share"),
        Row(COPIER, max(_scores(asked, lambda question: question.prompt())), "share"),
        Row(TOKEN, sum(places) / len(places), paper="negative", paper_setting=_SETTING),
        Row(
            COUNT,
            sizes["number_of_tokens"] - sizes["gold"],
            paper="tokens weak, counts more",
            paper_setting=_SETTING,
            baseline=f"{sizes['number_of_tokens']:.3g} and {sizes['gold']:.3g}",
        ),
    ]


def _always_one(reports: dict[str, CharBench]) -> list[Row]:
    """What a program has that answers 1 to all, with the tokens of each model."""
    rows = []
    for name, own in reports.items():
        constant = CharBench(
            [replace(one, reply="1", answer=1) for one in own.answered if one.form == "plain"], {}
        )
        found = {(row["task"], row["metric"]): row["r"] for row in constant.correlations()}
        rows += [
            Row(
                f"always 1, {task}: accuracy, questions of {name}", constant.accuracy(task), "share"
            )
            for task in TASKS
        ]
        wanted = [(task, "target_token_length") for task in POSITION]
        wanted += [(COUNTING, "gold"), (COUNTING, "number_of_tokens")]
        rows += [
            Row(
                f"always 1, {task}: r with {metric}, tokens of {name}", _number(found[task, metric])
            )
            for task, metric in wanted
        ]
    return rows


def _scores(asked: Sequence[Question], reply: Callable[[Question], str]) -> list[float]:
    """Accuracy of a made-up model in each task, by the prompts that it is given."""
    from pertoken.probe.characters import ask_questions

    by_prompt = {question.prompt(): reply(question) for question in asked}

    def model(messages: Any) -> str:
        return by_prompt[messages[0]["content"]]

    pairs = [(question, "plain") for question in asked]
    found = CharBench(ask_questions(model, None, pairs, max_new_tokens=1, batch=1), {})
    return [found.accuracy(task) for task in TASKS]


def _mean_size(reports: dict[str, CharBench], task: str, metric: str) -> float:
    """Mean size of a correlation over the models that have it."""
    found = [
        abs(row["r"])
        for own in reports.values()
        for row in own.correlations()
        if (row["form"], row["task"], row["metric"]) == ("plain", task, metric)
        and row["r"] is not None
    ]
    return sum(found) / len(found) if found else float("nan")


def _accuracies(name: str, own: CharBench, seed: int) -> list[Row]:
    """Accuracy, replies without a number, case and bias."""
    rows = []
    for row in own.summary():
        label = f"{name}, {row['task']}, {row['form']}"
        plain = row["form"] == "plain"
        rows += [
            Row(
                f"{label}: accuracy",
                row["accuracy"],
                "share",
                paper=ACCURACY[row["task"]] if plain else None,
                paper_setting=_SETTING if plain else "",
                interval=row["interval"],
                baseline=f"{row['n']} questions",
            ),
            Row(f"{label}: no number", row["no_number"], "share"),
        ]
    for task in TASKS:
        spelled = own.of(task, "spelled")
        asked = {one.question for one in spelled}
        plainly = {one.question: one.right for one in own.of(task) if one.question in asked}
        gains = [float(one.right) - float(plainly[one.question]) for one in spelled]
        rows.append(
            Row(
                f"{name}, {task}: accuracy spelled out minus plain",
                sum(gains) / len(gains),
                "share",
                interval=bootstrap_mean(gains, seed),
            )
        )
    for row in own.mixed_case():
        if row["form"] == "plain":
            gap = _number(row["mixed"]) - _number(row["other"])
            metric = f"{name}, {row['task']}: accuracy where both cases matter minus elsewhere"
            rows.append(Row(metric, gap, "share", baseline=f"{row['n_mixed']} questions"))
    for row in own.bias():
        if row["form"] == "plain":
            metric = f"{name}, {row['task']}: answer minus right answer, over wrong counts"
            baseline = f"{row['n']} answers, deviation {_number(row['std']):.3g}"
            rows.append(Row(metric, _number(row["mean"]), baseline=baseline))
    return rows


def _relations(name: str, own: CharBench) -> list[Row]:
    """Correlations, logistic regression, and places by the token that holds them."""
    rows = []
    for row in own.correlations():
        if row["form"] != "plain" or row["n"] == 0:
            continue
        kind = "places" if row["task"] in POSITION else "counts"
        sign = SIGNS.get((kind, row["metric"]))
        rows.append(
            Row(
                f"{name}, {row['task']}: r with {row['metric']}",
                _number(row["r"]),
                paper=sign,
                paper_setting=_SETTING if sign else "",
                interval=row["interval"],
            )
        )
    for row in own.regressions():
        if row["form"] == "plain":
            metric = f"{name}, {row['task']}: log-odds per deviation of {row['predictor']}"
            rows.append(Row(metric, row["log_odds"], interval=row["interval"]))
    cells: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in own.by_token_length():
        if row["form"] == "plain":
            key = row["task"], row["target_token_length"]
            cells.setdefault(key, []).append((row["n"], row["accuracy"]))
    for (task, letters), found in sorted(cells.items()):
        total = sum(n for n, _ in found)
        metric = f"{name}, {task}: accuracy in tokens of {letters} letters"
        share = sum(n * accuracy for n, accuracy in found) / total
        rows.append(Row(metric, share, "share", baseline=f"{total} questions"))
    return rows


def _number(value: float | None) -> float:
    return float("nan") if value is None else value

"""Reproduction of SIFT (arXiv 2502.14922) on GSM8K with two small models: reported as it is.

The paper's models have 3B parameters and more. Models of 135M and 270M solve next to no problem of
GSM8K and write poor notes, so that no gain is to be expected; the rows say what happens instead:
accuracy at each stage (the consensus by then, else the direct answer), how often the answers agree,
calls and tokens. So few questions carry no bar on accuracy: the rows have their intervals. What is
judged is the algorithm (`_sift_flow`): its calls in every branch, many questions as each alone, and
a file that was stopped and gone on with, against a scripted model. The wordings were written
without looking at any problem of the data set.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pertoken._bootstrap import bootstrap_mean
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row
from pertoken.reproduce._sift_flow import branches, in_lockstep, resumed

VERSION = 1
DTYPE = "float32"
SECOND = "gemma3-270m"  # its terms must have been accepted: PERTOKEN_ACCEPT_LICENCE=gemma3-270m
COUNTS = {"smollm2": 16, SECOND: 8}  # an hour on two slow cores
TOGETHER = 4  # questions that go through the stages together, one kept unit
NEW_TOKENS = 160

BRANCHES = "branches of the algorithm with the paper's calls in their order"
LOCKSTEP = "questions in lockstep equal to the same questions one by one, whole traces"
RESUMED = "a resumed file equal to one written at once, no finished question asked again"
BARS = {BRANCHES: ">= 1", LOCKSTEP: ">= 1", RESUMED: ">= 1"}
REASONS: dict[str, str] = {}

SMOKE_ROWS = [{"question": f"{n} and 1?", "answer": f"#### {n + 1}"} for n in range(4)]
PAPER = {
    "direct": ("74.37 %", 0.7437),
    "stage 1": ("77.56 %", 0.7756),
    "stage 2": ("78.62 %", 0.7862),
    "stage 3": ("79.23 %", 0.7923),
}
Unit = dict[str, Any]


def run(context: Context) -> Reproduction:
    """All rows, a few questions at a time."""
    problems = context.data("gsm8k", smoke_rows=SMOKE_ROWS)[1::2]  # odd numbers: the report half
    models = _Models(context)
    units: dict[Any, tuple[object, Callable[[], Any]]] = {}
    for name, count in COUNTS.items():
        chosen = problems[: 1 if context.smoke else count]
        for start in range(0, len(chosen), TOGETHER):
            part = chosen[start : start + TOGETHER]
            units[name, start] = ([name, start], partial(_sifted, context, models, name, part))
    found = context.remember_all(units, "questions")
    rows = [
        Row(BRANCHES, branches(), "share"),
        Row(LOCKSTEP, in_lockstep(), "share", baseline="16 questions, two for each of the 8 ways"),
        Row(RESUMED, resumed(), "share", baseline="stopped at every call, cut off every 101 bytes"),
    ]
    for name in COUNTS:
        rows += _rows(
            [one for key, part in found.items() if key[0] == name for one in part],
            name,
            context.seed,
        )
    return context.reproduction(
        rows,
        second_model=SECOND,
        questions=COUNTS,
        new_tokens=NEW_TOKENS,
        decoding="greedy",
        split="report: odd numbers of the test set, the first ones",
    )


class _Models:
    """The models of a run, the second loaded when it is first needed."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._second: Any = None

    def load(self, name: str) -> Any:
        """(model, tokenizer) by name."""
        if name != SECOND:
            return self._context.load()
        if self._second is None:
            if self._context.smoke:
                self._second = self._context.load()
            else:
                from pertoken.loading import load

                where = self._context.device
                self._second = load(SECOND, device=where, dtype=DTYPE, kind="decoder")
        return self._second


def _sifted(context: Context, models: _Models, name: str, problems: list[Any]) -> list[Unit]:
    """What SIFT and the direct answer make of some problems."""
    from pertoken._answers import answer_of, equivalent, number_of
    from pertoken._chat import asker
    from pertoken.decode.sift import WORDING, Wording, sift_all

    model, tokenizer = models.load(name)
    # A smoke run's model has few positions.
    short = Wording("{question}", "{question}", "{prediction}", "{sticker}", "{text}")
    wording = short if context.smoke else WORDING
    tokens = 4 if context.smoke else NEW_TOKENS
    questions = [problem["question"] for problem in problems]
    found = sift_all(
        questions,
        model,
        tokenizer=tokenizer,
        max_new_tokens=tokens,
        batch=2 * TOGETHER,
        wording=wording,
    ).found
    ask = asker(model, tokenizer, tokens, 2 * TOGETHER)
    direct = ask([wording.predict.format(text=question) for question in questions])
    units = []
    for problem, one, said in zip(problems, found, direct, strict=True):
        right = problem["answer"].rpartition("####")[2].strip()
        units.append(
            {
                "stage": one.stage,
                "right": equivalent(one.answer, right),
                "direct": equivalent(answer_of(said.text), right),
                "number": number_of(one.answer) is not None,
                "calls": one.calls,
                "tokens": one.tokens,
                "direct_tokens": said.tokens,
            }
        )
    return units


def _rows(units: list[Unit], name: str, seed: int) -> list[Row]:
    """The figures of a model."""
    rows = []
    right = {"direct": [float(one["direct"]) for one in units]}
    for stage in (1, 2, 3):
        right[f"stage {stage}"] = [
            float(one["right"] if (one["stage"] or 9) <= stage else one["direct"]) for one in units
        ]
    for label, values in right.items():
        rows.append(
            Row(
                f"accuracy, {label}, {name}",
                sum(values) / len(values),
                "share",
                paper=PAPER[label][0],
                paper_setting="Llama-3.2-3B-Instruct, all of GSM8K",
                interval=bootstrap_mean(values, seed),
            )
        )
    gains = [a - b for a, b in zip(right["stage 3"], right["direct"], strict=True)]
    gain = PAPER["stage 3"][1] - PAPER["direct"][1]
    rows.append(
        Row(
            f"accuracy at stage 3 minus the direct answer's, {name}",
            sum(gains) / len(gains),
            "share",
            paper=round(gain, 4),
            paper_setting="Llama-3.2-3B-Instruct, all of GSM8K",
            interval=bootstrap_mean(gains, seed),
            baseline=f"{len(units)} questions",
        )
    )
    for stage in (1, 2, 3):
        agree = sum((one["stage"] or 9) <= stage for one in units) / len(units)
        rows.append(Row(f"consensus by stage {stage}, {name}", agree, "share"))
    means = (
        ("calls per question", "calls"),
        ("tokens written per question", "tokens"),
        ("tokens of the direct answer", "direct_tokens"),
        ("answers with a number", "number"),
    )
    rows += [
        Row(f"{label}, {name}", sum(float(one[key]) for one in units) / len(units))
        for label, key in means
    ]
    return rows

"""What CharBench tells of a model, and of several: accuracy, correlations, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pertoken._bootstrap import bootstrap, bootstrap_mean
from pertoken._extras import need
from pertoken._html import report
from pertoken.probe._logistic import logistic
from pertoken.probe._questions import POSITION, Question
from pertoken.result import Part, Result, figure, plain

__all__ = ["METRICS", "Answered", "CharBench", "average_correlations", "error_overlap"]

_SHOWN = 10  # replies that are no number, on the page
_TEXT = 40  # letters of such a reply in the table


@dataclass(frozen=True)
class Answered:
    """A question and what came of it.

    answer: None where the reply is no number. letters: how many letters of the word each of its
    tokens holds; None without a tokenizer.
    """

    question: Question
    form: str
    reply: str
    answer: int | None
    letters: Sequence[int] | None

    @property
    def right(self) -> bool:
        """Whether the answer is right; what is no number is wrong."""
        return self.answer == self.question.answer

    @property
    def target_token_length(self) -> int | None:
        """Letters in the token with the place that was asked for; None for counts."""
        if self.letters is None or self.question.task not in POSITION:
            return None
        ends = enumerate(accumulate(self.letters))
        return next(self.letters[t] for t, end in ends if end > self.question.answer)

    def metric(self, name: str) -> float | None:
        """One of `METRICS`, None where it does not apply."""
        found = METRICS[name](self)
        return None if found is None else float(found)


METRICS: dict[str, Callable[[Answered], float | None]] = {
    "word_length": lambda one: len(one.question.word),
    "gold": lambda one: one.question.answer,
    "gold_per_length": lambda one: one.question.answer / len(one.question.word),
    "number_of_tokens": lambda one: len(one.letters) if one.letters else None,
    "compression_rate": lambda one: (
        len(one.question.word) / len(one.letters) if one.letters else None
    ),
    "target_token_length": lambda one: one.target_token_length,
}
"""What right answers are held against: letters, the right answer, its share of the letters, tokens,
letters per token, letters of the token with the place that is asked for."""

_PREDICTORS = ("word_length", "gold", "number_of_tokens", "target_token_length")


class CharBench(Result):
    """What `charbench` found: `answered`, one for each question and form, and `settings`."""

    _title = "Letters of words (CharBench)"

    def __init__(self, answered: Sequence[Answered], settings: dict[str, Any]) -> None:
        self.answered, self.settings = list(answered), settings

    @property
    def groups(self) -> list[tuple[str, str]]:
        """(form, task) in the order they were asked."""
        return list(dict.fromkeys((one.form, one.question.task) for one in self.answered))

    def of(self, task: str, form: str = "plain") -> list[Answered]:
        """The answers of a task in a form."""
        return [a for a in self.answered if (a.form, a.question.task) == (form, task)]

    def accuracy(self, task: str, form: str = "plain") -> float:
        """Share of right answers; NaN where none was asked for."""
        return _mean([one.right for one in self.of(task, form)])

    @property
    def unread(self) -> list[Answered]:
        """Replies that are no number; they count as wrong."""
        return [one for one in self.answered if one.answer is None]

    def summary(self) -> list[dict[str, Any]]:
        """A record per form and task: questions, accuracy with its 95 % interval, no number."""
        return [
            {
                "form": form,
                "task": task,
                "n": len(own),
                "accuracy": self.accuracy(task, form),
                "interval": bootstrap_mean([float(one.right) for one in own]),
                "no_number": _mean([one.answer is None for one in own]),
            }
            for form, task, own in self._each()
        ]

    def correlations(self) -> list[dict[str, Any]]:
        """Pearson's r of being right with each metric, per form and task, with 95 % intervals.

        None where one of the two does not vary, or the metric does not apply.
        """
        found = []
        for form, task, own in self._each():
            for name in METRICS:
                pairs = [(one.metric(name), float(one.right)) for one in own]
                x = [value for value, _ in pairs if value is not None]
                y = [right for value, right in pairs if value is not None]
                r = float(_pearson(np.asarray(x), np.asarray(y))) if x else float("nan")
                ends = bootstrap(_pearson, x, y) if r == r else None
                row = {"form": form, "task": task, "metric": name, "n": len(x)}
                found.append(row | {"r": r if r == r else None, "interval": ends})
        return found

    def regressions(self) -> list[dict[str, Any]]:
        """Logistic regression of being right, per form and task (ours): log-odds per standard
        deviation with 95 % intervals; no record where it has no solution."""
        found = []
        for form, task, own in self._each():
            columns = {name: [one.metric(name) for one in own] for name in _PREDICTORS}
            used = {
                name: [float(value) for value in column if value is not None]
                for name, column in columns.items()
                if None not in column
            }
            fitted = logistic([one.right for one in own], used)
            for name, (weight, low, high) in fitted.items():
                row = {"form": form, "task": task, "predictor": name, "n": len(own)}
                found.append(row | {"log_odds": weight, "interval": (low, high)})
        return found

    def by(self, metric: str) -> list[dict[str, Any]]:
        """Accuracy at every value of a metric, per form and task."""
        found = []
        for form, task, own in self._each():
            values = sorted({v for one in own if (v := one.metric(metric)) is not None})
            for value in values:
                those = [one.right for one in own if one.metric(metric) == value]
                row = {"form": form, "task": task, metric: value, "n": len(those)}
                found.append(row | {"accuracy": _mean(those)})
        return found

    def by_token_length(self) -> list[dict[str, Any]]:
        """Accuracy by letters of the token that holds the place, within each length of word."""
        found = []
        for form, task, own in self._each():
            cells: dict[tuple[int, int], list[bool]] = {}
            for one in own:
                if one.target_token_length is not None:
                    key = (len(one.question.word), one.target_token_length)
                    cells.setdefault(key, []).append(one.right)
            for (length, letters), rights in sorted(cells.items()):
                row = {"form": form, "task": task, "word_length": length}
                row |= {"target_token_length": letters, "n": len(rights)}
                found.append(row | {"accuracy": _mean(rights)})
        return found

    def mixed_case(self) -> list[dict[str, Any]]:
        """Accuracy where both cases matter, see `Question.mixed_case`, and where they do not."""
        return [
            {
                "form": form,
                "task": task,
                "n_mixed": sum(one.question.mixed_case for one in own),
                "mixed": _known(_mean([one.right for one in own if one.question.mixed_case])),
                "other": _known(_mean([one.right for one in own if not one.question.mixed_case])),
            }
            for form, task, own in self._each()
        ]

    def bias(self) -> list[dict[str, Any]]:
        """Mean and standard deviation of answer minus right answer, over wrong counts."""
        found = []
        for form, task, own in self._each():
            if task in POSITION:
                continue
            off = [
                float(one.answer - one.question.answer)
                for one in own
                if one.answer is not None and not one.right
            ]
            row = {"form": form, "task": task, "n": len(off)}
            spread = float(np.std(off, ddof=1)) if len(off) > 1 else None
            found.append(row | {"mean": float(np.mean(off)) if off else None, "std": spread})
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A record per question and form."""
        return [
            {
                "form": one.form,
                "task": one.question.task,
                "word": one.question.word,
                "character": one.question.character,
                "reply": one.reply,
                "answer": one.answer,
                "right": one.right,
                "letters_of_tokens": None if one.letters is None else list(one.letters),
                **{name: one.metric(name) for name in METRICS},
            }
            for one in self.answered
        ]

    def to_dict(self) -> dict[str, Any]:
        """Settings, every analysis, and every answer."""
        found: dict[str, Any] = plain(
            {
                "settings": self.settings,
                "summary": self.summary(),
                "correlations": self.correlations(),
                "regressions": self.regressions(),
                "mixed_case": self.mixed_case(),
                "bias": self.bias(),
                "by_word_length": self.by("word_length"),
                "by_token_length": self.by_token_length(),
                "answered": self.rows(),
            }
        )
        return found

    def plot(self, metric: str = "word_length") -> Any:
        """Accuracy by a metric, a line per task and form (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        rows = self.by(metric)
        lines = []
        for form, task in self.groups:
            own = [row for row in rows if (row["form"], row["task"]) == (form, task)]
            x, y = [row[metric] for row in own], [row["accuracy"] for row in own]
            lines.append(graph.Scatter(x=x, y=y, mode="lines+markers", name=f"{task}, {form}"))
        axis: dict[str, Any] = {"title": "right answers", "rangemode": "tozero"}
        return figure(lines, yaxis=axis, xaxis={"title": metric.replace("_", " ")})

    def _each(self) -> Iterator[tuple[str, str, list[Answered]]]:
        for form, task in self.groups:
            yield form, task, self.of(task, form)

    def _parts(self) -> list[Part]:
        return [*_accuracy_parts(self), *_token_parts(self)]

    def _page(self) -> str:
        """The tables, accuracy by token length, the first prompt, replies that are no number."""
        lines = [["task, letters of the word", "letters of the token", "n", "right"]]
        for row in self.by_token_length():
            first = f"{row['task']}, {row['form']}, {row['word_length']}"
            shown = [str(row["target_token_length"]), str(row["n"]), f"{row['accuracy']:.1%}"]
            lines.append([first, *shown])
        parts = [*self._parts(), Part("Places by the token that holds them", lines)]
        tables = "\n".join(part.html() for part in parts)
        prompt = escape(str(self.settings.get("first_prompt", "")))
        lost = "\n".join(f"<pre>{escape(one.reply)}</pre>" for one in self.unread[:_SHOWN])
        unread = f"<h2>Replies that are no number</h2>\n{lost}" if lost else ""
        main = f"{tables}\n<h2>The first prompt</h2>\n<pre>{prompt}</pre>\n{unread}"
        return report("pertoken probe characters", self._title, main)


def _accuracy_parts(found: CharBench) -> list[Part]:
    """Accuracies, cases, biases."""
    lines = [["task, form", "n", "right", "95 %", "no number", "mixed case", "other", "bias"]]
    cases = found.mixed_case()
    biases = {(row["form"], row["task"]): row["mean"] for row in found.bias()}
    for row, case in zip(found.summary(), cases, strict=True):
        low, high = row["interval"]
        off = biases.get((row["form"], row["task"]))
        first = [f"{row['task']}, {row['form']}", str(row["n"]), f"{row['accuracy']:.1%}"]
        both = [_percent(case["mixed"]), _percent(case["other"])]
        ends = [f"{low:.1%}-{high:.1%}", f"{row['no_number']:.1%}"]
        lines.append([*first, *ends, *both, "-" if off is None else f"{off:+.2f}"])
    notes = ["bias: answer minus right answer, over wrong counts"]
    if found.unread:
        replies = [" ".join(one.reply.split()) for one in found.unread[:3]]
        short = [text if len(text) <= _TEXT else f"{text[: _TEXT - 1]}…" for text in replies]
        notes.append(f"no number, such as: {', '.join(map(repr, short))}")
    return [Part("Right answers", lines, notes)]


def _token_parts(found: CharBench) -> list[Part]:
    """Correlations and regressions, a column each for a metric."""
    parts = []
    names = [name.replace("_", " ") for name in METRICS]
    for title, rows, key, value, note in (
        ("Right answers: Pearson's r with", found.correlations(), "metric", "r", ""),
        (
            "Right answers: logistic regression on",
            found.regressions(),
            "predictor",
            "log_odds",
            "log-odds per standard deviation, all of a line together",
        ),
    ):
        lines = [["task, form", *names]]
        for form, task in found.groups:
            own = {r[key]: r for r in rows if (r["form"], r["task"]) == (form, task)}
            cells = [_with_ends(own.get(name), value) for name in METRICS]
            lines.append([f"{task}, {form}", *cells])
        parts.append(Part(title, lines, [note] if note else []))
    return parts


def _with_ends(row: Mapping[str, Any] | None, value: str) -> str:
    if row is None or row[value] is None:
        return "-"
    low, high = row["interval"]
    return f"{row[value]:+.2f} ({low:+.2f}, {high:+.2f})"


def error_overlap(reports: Mapping[str, CharBench]) -> list[dict[str, Any]]:
    """Jaccard overlap of the errors of every two models, per form and task; None without errors."""
    names, found = list(reports), []
    for form, task in next(iter(reports.values())).groups if names else []:
        errors = {
            name: {
                (a.question.word, a.question.character) for a in own.of(task, form) if not a.right
            }
            for name, own in reports.items()
        }
        for place, first in enumerate(names):
            for second in names[place + 1 :]:
                union = errors[first] | errors[second]
                both = errors[first] & errors[second]
                row = {"form": form, "task": task, "first": first, "second": second}
                found.append(row | {"overlap": len(both) / len(union) if union else None})
    return found


def average_correlations(reports: Mapping[str, CharBench]) -> list[dict[str, Any]]:
    """The mean of each correlation over the models that have it, as the paper's last rows."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for own in reports.values():
        for row in own.correlations():
            if row["r"] is not None:
                values.setdefault((row["form"], row["task"], row["metric"]), []).append(row["r"])
    return [
        {"form": form, "task": task, "metric": metric, "r": _mean(found), "models": len(found)}
        for (form, task, metric), found in values.items()
    ]


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's r over the last axis; NaN where one does not vary."""
    dx, dy = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    # What is constant must not vary by rounding.
    size = np.sqrt((dx**2).sum(-1) * (dy**2).sum(-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(size > 1e-12, (dx * dy).sum(-1) / size, np.nan))


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else float("nan")


def _known(value: float) -> float | None:
    return None if value != value else value


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"

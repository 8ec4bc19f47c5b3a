"""Outcomes of additions, as a table, a frame, JSON, a plot and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from pertoken._bootstrap import bootstrap_mean
from pertoken._extras import need
from pertoken._html import report
from pertoken.probe._addition import Problem, Reading
from pertoken.probe._addition_errors import Errors, longest_chain
from pertoken.result import Part, Result, figure, plain

_ACCURACIES = "as long, longer: where the sum has the digits of an addend, or more than both"
_KINDS = (
    "shares of all problems; kinds may overlap: no number read, wrong length, off by a power of "
    "ten, a wrong digit that takes or gives a carry, right with a digit dropped, with addends "
    "aligned at the left, with groups added one by one"
)
_DIGITS = "shares of the wrong answers that have the right number of digits, from the left"


@dataclass(frozen=True)
class Outcome:
    """One problem in one format.

    errors: None where the answer is right, or none was read.
    """

    format: str
    problem: Problem
    response: str
    reading: Reading
    right: bool
    errors: Errors | None

    def to_dict(self) -> dict[str, Any]:
        """One flat row; digits and tokens are numbered from the left, beginning with 1."""
        problem, errors = self.problem, self.errors
        row: dict[str, Any] = {
            "format": self.format,
            "first": problem.first,
            "second": problem.second,
            "digits_first": problem.lengths[0],
            "digits_second": problem.lengths[1],
            "digits_answer": problem.lengths[2],
            "longer": problem.longer,
            "longest_carry_chain": longest_chain(problem),
            "response": self.response,
            "answer": self.reading.answer,
            "right": self.right,
            "format_kept": self.reading.format_kept,
            "repeated": self.reading.repeated,
        }
        kinds = asdict(errors) if errors else dict.fromkeys(Errors.__dataclass_fields__)
        row |= {f"error_{name}": value for name, value in kinds.items()}
        for name in ("digits", "tokens"):
            wrong = kinds[name]
            row[f"error_{name}"] = (
                None if wrong is None else [i + 1 for i, x in enumerate(wrong) if x]
            )
        return row


class ArithmeticReport(Result):
    """What `arithmetic` found: `outcomes`, one per problem and format, and `settings`."""

    def __init__(self, outcomes: Sequence[Outcome], settings: dict[str, Any]) -> None:
        self.outcomes = list(outcomes)
        self.settings = settings

    @property
    def formats(self) -> list[str]:
        """In the order they were asked."""
        return list(dict.fromkeys(outcome.format for outcome in self.outcomes))

    def of(self, name: str) -> list[Outcome]:
        """The outcomes of a format."""
        return [outcome for outcome in self.outcomes if outcome.format == name]

    def accuracy(self, name: str, longer: bool | None = None) -> float:
        """Share of right answers of a format; NaN where there is no problem.

        longer: only where the answer has more digits than both addends, or only where not.
        """
        rights = _rights(self.of(name), longer)
        return sum(rights) / len(rights) if rights else float("nan")

    def wrong_digits(self, name: str) -> dict[int, list[float]]:
        """Answer length -> share of wrong answers of that length with each digit wrong, from the
        left. Lengths without a wrong answer of the right length are left out.
        """
        found: dict[int, list[tuple[bool, ...]]] = {}
        for outcome in self.of(name):
            if outcome.errors and outcome.errors.digits:
                found.setdefault(len(outcome.errors.digits), []).append(outcome.errors.digits)
        return {
            length: [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            for length, rows in sorted(found.items())
        }

    def summary(self) -> list[dict[str, Any]]:
        """A row per format: accuracies, and the shares of all problems with each kind of error.

        unread: no number, or several; the kinds may overlap. interval: 95 %, over problems.
        """
        return [self._row(name) for name in self.formats]

    def _row(self, name: str) -> dict[str, Any]:
        outcomes = self.of(name)
        wrong = [outcome.errors for outcome in outcomes if outcome.errors]

        def share(found: Sequence[Any]) -> float:
            return sum(map(bool, found)) / len(outcomes)

        return {
            "format": name,
            "n": len(outcomes),
            "accuracy": self.accuracy(name),
            "interval": bootstrap_mean([float(outcome.right) for outcome in outcomes]),
            "accuracy_as_long": _known(self.accuracy(name, longer=False)),
            "accuracy_longer": _known(self.accuracy(name, longer=True)),
            "format_kept": share([outcome.reading.format_kept for outcome in outcomes]),
            "repeated": share([outcome.reading.repeated for outcome in outcomes]),
            "unread": share([outcome.reading.answer is None for outcome in outcomes]),
            "length": share([each.length for each in wrong]),
            "power_of_ten": share([each.power_of_ten is not None for each in wrong]),
            "carry_in": share([each.carry_in for each in wrong]),
            "carry_out": share([each.carry_out for each in wrong]),
            "dropped_digit": share([each.dropped_digit for each in wrong]),
            "left_aligned": share([each.left_aligned for each in wrong]),
            "chunkwise": share([each.chunkwise for each in wrong]),
        }

    def cells(self) -> list[list[str]]:
        """The accuracies of the summary as text, the head first."""
        lines = [["format", "n", "right", "95 %", "as long", "longer"]]
        for row in self.summary():
            low, high = row["interval"]
            shares = [_percent(row[key]) for key in ("accuracy_as_long", "accuracy_longer")]
            first = [row["format"], str(row["n"]), _percent(row["accuracy"])]
            lines.append([*first, f"{low:.0%}-{high:.0%}", *shares])
        return lines

    def error_cells(self) -> list[list[str]]:
        """The kinds of errors of the summary as text, the head first."""
        kinds = {
            "unread": "unread",
            "length": "length",
            "10^k": "power_of_ten",
            "carry in": "carry_in",
            "carry out": "carry_out",
            "dropped": "dropped_digit",
            "left": "left_aligned",
            "chunks": "chunkwise",
        }
        lines = [["format", *kinds]]
        for row in self.summary():
            lines.append([row["format"], *(_percent(row[key]) for key in kinds.values())])
        return lines

    def digit_cells(self) -> list[list[str]]:
        """Of wrong answers of the right length: how often each digit is wrong; head first."""
        found = [(name, self.wrong_digits(name)) for name in self.formats]
        most = max((len(row) for _, rows in found for row in rows.values()), default=0)
        lines = [["format", "digits", *(f"digit {place + 1}" for place in range(most))]]
        for name, rows in found:
            for length, shares in rows.items():
                blank = [""] * (most - length)
                lines.append([name, str(length), *map(_percent, shares), *blank])
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Settings, the summary by format, which digits are wrong, and every outcome."""
        found: dict[str, Any] = plain(
            {
                "settings": self.settings,
                "summary": self.summary(),
                "wrong_digits": {name: self.wrong_digits(name) for name in self.formats},
                "outcomes": self.rows(),
            }
        )
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A record per problem and format, see `Outcome.to_dict`."""
        return [outcome.to_dict() for outcome in self.outcomes]

    def plot(self) -> Any:
        """Accuracy by format, for sums as long as an addend and longer ones (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        kinds = {"as long as an addend": False, "longer than both": True}
        bars = [
            graph.Bar(name=label, x=self.formats, y=[self.accuracy(f, kind) for f in self.formats])
            for label, kind in kinds.items()
        ]
        axis = {"title": "right answers", "range": [0, 1]}
        return figure(bars, barmode="group", yaxis=axis)

    def _parts(self) -> list[Part]:
        shots = self.settings["shots"]
        return [
            Part(f"Right answers, {shots} examples in front", self.cells(), [_ACCURACIES]),
            Part("Kinds of errors", self.error_cells(), [_KINDS]),
        ]

    def _page(self) -> str:
        """The tables and the first prompt."""
        digits = Part("Which digits are wrong", self.digit_cells(), [_DIGITS])
        tables = "\n".join(part.html() for part in [*self._parts(), digits])
        prompt = escape(str(self.settings["first_prompt"]))
        return report(
            "pertoken arithmetic",
            f"{self.settings['problems']} additions in {len(self.formats)} formats",
            f"{tables}\n<h2>The first prompt</h2>\n<pre>{prompt}</pre>",
        )


def _rights(outcomes: Sequence[Outcome], longer: bool | None) -> list[bool]:
    return [each.right for each in outcomes if longer is None or each.problem.longer == longer]


def _known(number: float) -> float | None:
    return None if number != number else number


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"

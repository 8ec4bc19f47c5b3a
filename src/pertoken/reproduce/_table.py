"""Reports as text: the table of `pertoken reproduce`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken.reproduce._report import Report, Row

if TYPE_CHECKING:
    from rich.table import Table

NO_REASON = "no reason given yet"


def number(value: float | str | None) -> str:
    """A figure as people read it: four significant digits, text as it is, a dash for nothing.

    >>> number(1.23456), number(80), number(None), number("2x"), number(123456.7)
    ('1.235', '80', '–', '2x', '123457')
    """
    if value is None or value != value:
        return "–"
    if isinstance(value, str):
        return value
    if value == int(value) or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}"


def figure(row: Row) -> str:
    """The measured number with its unit and interval.

    >>> figure(Row("speed-up", 1.5, unit="x", interval=(1.4, 1.62)))
    '1.5 x (1.4–1.62)'
    """
    text = f"{number(row.here)} {row.unit}".strip()
    if row.interval is not None:
        text += f" ({number(row.interval[0])}–{number(row.interval[1])})"
    return text


def verdict(row: Row) -> str:
    """Whether the bar holds, in a word; empty for a row without a bar."""
    if not row.bar:
        return ""
    return {True: "holds", False: "does not hold here", None: "not judged"}[row.holds]


def title(report: Report) -> str:
    """What stands above the table."""
    text = f"{report.slug} on {report.model}, {report.settings.get('dtype', '')}"
    return text + (" (smoke run: the figures mean nothing)" if report.smoke else "")


def lines(report: Report) -> list[list[str]]:
    """The figures as text, the head first."""
    found = [["metric", "paper", "here", "baseline here", "bar", "verdict"]]
    for row in report.figures:
        paper = number(row.paper) + (f" ({row.paper_setting})" if row.paper_setting else "")
        found.append([row.metric, paper, figure(row), number(row.baseline), row.bar, verdict(row)])
    return found


def table(report: Report) -> Table:
    """The figures of one report, for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title(report)), title_justify="left", box=box.SIMPLE_HEAD)
    head, *body = lines(report)
    for heading in head:
        shown.add_column("" if heading == "verdict" else heading, overflow="fold")
    for row, (*cells, last) in zip(report.figures, body, strict=True):
        colour = {True: "green", False: "red", None: ""}[row.holds]
        shown.add_row(*map(Text, cells), Text(last, style=colour))
    return shown


def notes(report: Report) -> list[str]:
    """One line per reason or note, and where the report was written."""
    lines = []
    for row in report.figures:
        if row.holds is False:
            lines.append(f"{row.metric}: does not hold here: {row.why or NO_REASON}")
        elif row.why:
            lines.append(f"{row.metric}: {row.why}")
        if row.caveat:
            lines.append(f"{row.metric}: holds, but {row.caveat}")
    if report.path is not None:
        lines.append(f"written to {report.path}")
    return lines
